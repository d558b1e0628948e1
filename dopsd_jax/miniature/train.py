"""Makes a miniature from nothing: python -m dopsd_jax.miniature.train --family NAME --out DIR

Autoencoder, then encoders and transformer by flow matching, then the few-step model by endpoint
regression and distribution matching, with --keeping_steps also what a picture in context must not
move, then the model folder. A second call goes on where the first was stopped.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import transformers

import dopsd_jax
from dopsd_jax.common import program
from dopsd_jax.common.atomic import disk_error, write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import expand
from dopsd_jax.miniature import (
    autoencoder,
    endpoint,
    families,
    few_steps,
    gates,
    keeping,
    matching,
    optimizer,
    pretrain,
    probe,
    training,
)
from dopsd_jax.models.autoencoder import Autoencoder, to_uint8

OPTIONS = program.options(__name__)
OUT = OPTIONS.path("out", None, "folder for states, logs, pictures and the model")
FAMILY = OPTIONS.enum("family", "zimage", list(families.NAMES), "architecture")
START = OPTIONS.path(
    "start",
    None,
    "model folder to go on from, for flux2_klein also one of zimage: its autoencoder is kept, "
    "flow matching begins with what fits",
)
SEED = OPTIONS.integer("seed", 0, "of the whole training", lower_bound=0)
AUTOENCODER_STEPS = OPTIONS.integer("autoencoder_steps", 2600, "of 8 pictures", lower_bound=1)
PRETRAIN_STEPS = OPTIONS.integer("pretrain_steps", 12000, "of 48 samples", lower_bound=1)
ENDPOINT_STEPS = OPTIONS.integer("endpoint_steps", 120, "of 32 samples", lower_bound=1)
MATCHING_STEPS = OPTIONS.integer("matching_steps", 480, "of 48 samples", lower_bound=1)
KEEPING_STEPS = OPTIONS.integer("keeping_steps", 0, "of 40 samples; 0: none", lower_bound=0)

MANY_STEPS = 20  # of the sampler before distillation, which has the guidance that is distilled
PROBE_STEPS = 10  # of its probes during training


def main() -> None:
    out = expand(OUT.value)
    try:
        (out / "probes").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out {out}: is not a folder, or has a file named probes") from None
    except OSError as error:
        raise disk_error(error, out) from error
    log = _logger(out / "log.txt")
    family = families.family(FAMILY.value)
    initial = pretrain.start(family, SEED.value)
    if START.value is None:
        vae = autoencoder.train(out, family.autoencoder, SEED.value, AUTOENCODER_STEPS.value, log)
        vae = family.normalized(vae, SEED.value)
    else:
        learned, vae = family.read(expand(START.value))
        _check_sizes(family, initial, learned, vae)
        initial |= learned
    encode, decode = coders(vae)

    family.write_words(out / "tokenizer")
    texts = family.texts(transformers.AutoTokenizer.from_pretrained(out / "tokenizer"))
    source = training.Source(family, SEED.value, texts, encode)
    sampler = probe.Sampler(family, texts, encode, decode)
    measure = probe.Probe(sampler, out / "probes")

    def report(name: str, **sampler):
        def write(parameters: optimizer.Parameters, step: int) -> None:
            scores = measure(parameters, f"{name}_{step:06d}", **sampler)
            log(f"{name} {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))

        return write

    def trained(stage: training.Stage, file: str, **sampler) -> optimizer.Parameters:
        path = out / f"{file}.safetensors"
        return training.run(path, stage, source, report(file, **sampler), log)

    many = pretrain.stage(family, initial, PRETRAIN_STEPS.value)
    probed = {"grid": few_steps.many(PROBE_STEPS), "guidance": few_steps.GUIDANCE}
    many = trained(many, "pretrain", **probed)
    few = endpoint.stage(family, many, ENDPOINT_STEPS.value)
    few = trained(few, "endpoint", grid=family.grid)
    few = matching.stage(family, few, many, MATCHING_STEPS.value)
    few, last = trained(few, "matching", grid=family.grid), "matching"
    if KEEPING_STEPS.value:
        source = source._replace(family=keeping.Chosen(family, sampler, few))
        few = keeping.stage(family, few, KEEPING_STEPS.value)
        few, last = trained(few, "keeping", grid=family.grid), "keeping"
    if _is_older(out / "model", out / f"{last}.safetensors"):
        shutil.rmtree(out / "model", ignore_errors=True)
        family.write(out / "model", few, vae)
    log(f"the model: {out / 'model'}")
    _scores(out, many, sampler, log)


def _is_older(model: Path, state: Path) -> bool:
    """Whether the state is of more steps than the model's folder, or the folder is not there."""
    return not model.exists() or model.stat().st_mtime < state.stat().st_mtime


def _check_sizes(
    family: families.Family, initial: optimizer.Parameters, learned: optimizer.Parameters, vae
) -> None:
    """Raises `UserError` unless the model of --start has the sizes that are trained here."""
    cfg = dataclasses.replace(
        family.autoencoder().cfg,
        scaling_factor=vae.cfg.scaling_factor,
        shift_factor=vae.cfg.shift_factor,
    )
    fits = lambda name, value: name in initial and initial[name].shape == value.shape
    if vae.cfg != cfg or not all(fits(*item) for item in learned.items()):
        raise UserError(
            f"--start {START.value}: is a model of other sizes than are trained here; name a "
            "folder that miniature.train wrote"
        )


def _scores(out: Path, many: optimizer.Parameters, sampler: probe.Sampler, log):
    """Writes what the gates need to know of the model before distillation, and all scores."""
    trial, pipe = gates.Trial(), dopsd_jax.load_pipeline(out / "model")
    few = sampler.artist(many, sampler.family.grid)
    fine = sampler.artist(many, few_steps.many(MANY_STEPS), few_steps.GUIDANCE)
    found = {
        gates.SHIPPED: trial(gates.of_folder(pipe)),
        gates.UNDISTILLED_FEW: trial(few),
        gates.UNDISTILLED_MANY: trial(fine),
    }
    write_text(out / gates.SCORES, json.dumps(found, indent=1) + "\n")
    rows = gates.verdicts(found[gates.SHIPPED], gates.undistilled(out / gates.SCORES))
    for line in gates.lines(rows):
        log(line)


def coders(vae: Autoencoder):
    """Pictures -> latents (float16) and back, some at a time."""
    down = jax.jit(lambda x: vae.encode_images(x))
    up = jax.jit(lambda z: to_uint8(vae.decode_images(z)))
    some = lambda function, a: np.concatenate(
        [np.asarray(function(a[i : i + 16])) for i in range(0, len(a), 16)]
    )
    return (
        lambda images: some(down, images).astype(np.float16),
        lambda latents: some(up, np.asarray(latents, np.float32)),
    )


def _logger(path: Path):
    def log(line: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {line}"
        print(line, flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return log


if __name__ == "__main__":
    program.parse(required=("out",))
    program.run(main)
