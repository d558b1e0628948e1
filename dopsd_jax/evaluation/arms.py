"""The models that are compared: base, teacher, tuned."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from ml_collections import ConfigDict

from dopsd_jax.common.atomic import is_remote
from dopsd_jax.common.config_fields import shown
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.files import expand, open_regular
from dopsd_jax.common.json_files import read_json
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.conditioning.cached import DIGESTS
from dopsd_jax.config.schema import flat
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.evaluation.drawing import Painter, Shot, without_adapters
from dopsd_jax.evaluation.gallery import key
from dopsd_jax.families.base import STUDENT, TEACHER
from dopsd_jax.families.pipeline import Pipeline, pipeline
from dopsd_jax.run.workdir import CONFIG
from dopsd_jax.training.results import Results
from dopsd_jax.weights.lora_files import PEFT_CONFIG, PEFT_WEIGHTS
from dopsd_jax.weights.stored import open_stored, source_digest


class Tuned(NamedTuple):
    """The result of a run: LoRA files, whose changes add up, or a whole model's folder."""

    loras: tuple[LoraOption, ...] = ()
    model: Path | None = None

    def __str__(self) -> str:
        ends = (f":{lora.strength:g}" if lora.strength != 1 else "" for lora in self.loras)
        names = (f"{lora.path}{end}" for lora, end in zip(self.loras, ends, strict=True))
        return ", ".join(names) if self.model is None else str(self.model)


class Arm(NamedTuple):
    """One model in the comparison.

    role: STUDENT sees the prompt, TEACHER the target picture as well. weights: their digest.
    trained: loads them, as `painter.pipe.sample` takes them.
    """

    name: str
    role: int
    painter: Painter
    weights: str
    trained: Callable[[], nnx.State]

    def key(self, shot: Shot) -> str:
        """What a picture depends on."""
        pipe, case = self.painter.pipe, shot.case
        types = [str(pipe.dtype), str(pipe.base_dtype)]
        size, grid = [case.height, case.width], list(self.painter.grid(case))
        return key(self.weights, self.painter.key(case, self.role), shot.seed, size, grid, types)


def of_run(workdir: str, config: ConfigDict) -> Tuned:
    """The newest result of a run.

    Raises `UserError` if the run has another model, or no result yet, or one that is not as it was
    recorded.
    """
    if is_remote(workdir):
        raise UserError(f"--workdir {workdir}: copy its lora/ here and name a file with --lora")
    folder = expand(workdir)
    recorded, _ = read_json(folder / CONFIG) if os.path.exists(folder / CONFIG) else (None, "")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("config"), Mapping):
        raise UserError(f"--workdir {workdir}: holds no run ({CONFIG} is missing or no run's)")
    now = flat(config)
    raise_if(
        f"--workdir {workdir}: its run has config.{name} = {shown(recorded['config'].get(name))}, "
        f"here it is {shown(now[name])}; set it to the run's, or name its result "
        "with --lora or --model"
        for name in ("model", "train", "teacher.vlm")
        if recorded["config"].get(name) != now[name]
    )
    whole = config.train == "full"
    where, pattern = ("model", r"step_(\d+)") if whole else ("lora", r"step_(\d+)\.safetensors")
    found = {
        int(match[1]): path
        for path in (folder / where).glob("step_*")
        if (match := re.fullmatch(pattern, path.name))
    }
    if not found:
        what = "model folder (config.export must have diffusers)" if whole else "LoRA file"
        raise UserError(f"--workdir {workdir}: has no {what} in {where}/ yet; train further")
    newest = found[max(found)]
    raise_if(
        f"{fault}; start the training again, which writes its last result again, or name what "
        f"you want to judge with {'--model' if whole else '--lora'}"
        for fault in Results(folder, recorded["config"]).faults([newest])
    )
    return Tuned(model=newest) if whole else Tuned((LoraOption(newest),))


def make_arms(
    config: ConfigDict,
    pipe: Pipeline,
    tuned: Tuned | None,
    cache: Path,
    batch: int,
) -> list[Arm]:
    """Base and teacher, both with the weights of config.model, and the tuned model if there is one.

    cache: folder of encoder features. Raises `UserError` for one that does not fit the base.
    """
    memo, kept = cache / DIGESTS, FeatureCache(cache)
    painter = Painter(pipe, config.teacher, batch, kept, pipe.encoder_digest(memo))
    base = _digest(pipe, memo)
    if tuned is None or tuned.model:
        own = lambda: pipe.split[1]
    else:
        pipe.plan_loras(tuned.loras)  # files with faults are told before anything is drawn
        own = lambda: without_adapters(pipe.split[1])
    arms = [
        Arm("base", STUDENT, painter, base, own),
        Arm("teacher", TEACHER, painter, base, own),
    ]
    if tuned is None:
        return arms
    if not tuned.model:
        adapters = map(_lora_digest, tuned.loras)
        weights = lambda: pipe.split[1]
        return [*arms, Arm("tuned", STUDENT, painter, key(base, *adapters), weights)]
    other = pipeline(
        tuned.model,
        pipe.family.NAME,
        beside=pipe.beside,
        dtype=config.dtype,
        base_dtype=config.base_dtype,
        attention=pipe.attention,
        remat=pipe.remat,
        sharding_for=pipe.sharding_for,
        mesh=pipe.mesh,
        trained=pipe.trained,
    )
    if other.config != pipe.config:
        raise UserError(f"{tuned.model}: its transformer has other sizes than {pipe.folder}'s")
    painter = Painter(other, config.teacher, batch, kept, other.encoder_digest(memo))
    weights = lambda: other.split[1]
    return [*arms, Arm("tuned", STUDENT, painter, _digest(other, memo), weights)]


def _lora_digest(lora: LoraOption) -> str | list[str | float]:
    """Of a file, with its strength where that is not 1, and with PEFT's settings beside it."""
    folder = lora.path if os.path.isdir(lora.path) else lora.path.parent
    file = folder / PEFT_WEIGHTS if os.path.isdir(lora.path) else lora.path
    with open_regular(file) as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    more: list[str | float] = [lora.strength] if lora.strength != 1 else []
    if file.name == PEFT_WEIGHTS and os.path.isfile(folder / PEFT_CONFIG):
        more.append(read_json(folder / PEFT_CONFIG)[1])
    return [found, *more] if more else found


def _digest(pipe: Pipeline, memo: Path) -> str:
    """Of what makes a picture out of features: transformer, autoencoder, scheduler."""
    parts: list[Any] = [pipe.scheduler]
    for name in ("transformer", "vae"):
        stored = open_stored(pipe.folder / name, pipe.family.NETWORKS[name])
        parts += [source_digest(stored, memo), stored.config_text]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
