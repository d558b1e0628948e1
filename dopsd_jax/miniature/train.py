"""Makes the miniature from nothing: python -m dopsd_jax.miniature.train --out DIR

Autoencoder, then encoder and transformer by flow matching, then the few-step model by endpoint
regression and distribution matching, then the model folder. A second call goes on where the first
was stopped.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np
import transformers

import dopsd_jax
from dopsd_jax.common import program
from dopsd_jax.common.atomic import disk_error, write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.miniature import (
    autoencoder,
    configs,
    endpoint,
    export,
    few_steps,
    gates,
    matching,
    optimizer,
    pool,
    pretrain,
    probe,
    training,
)
from dopsd_jax.models.autoencoder import Autoencoder, to_uint8
from dopsd_jax.random_model.tokenizer import QWEN3_TEMPLATE

OPTIONS = program.options(__name__)
OUT = OPTIONS.path("out", None, "folder for states, logs, pictures and the model")
START = OPTIONS.path(
    "start",
    None,
    "model folder to go on from: its autoencoder is kept, flow matching begins with it",
)
SEED = OPTIONS.integer("seed", 0, "of the whole training", lower_bound=0)
AUTOENCODER_STEPS = OPTIONS.integer("autoencoder_steps", 2600, "of 8 pictures", lower_bound=1)
PRETRAIN_STEPS = OPTIONS.integer("pretrain_steps", 12000, "of 48 samples", lower_bound=1)
ENDPOINT_STEPS = OPTIONS.integer("endpoint_steps", 120, "of 32 samples", lower_bound=1)
MATCHING_STEPS = OPTIONS.integer("matching_steps", 480, "of 48 samples", lower_bound=1)

MANY_STEPS = 20  # of the sampler before distillation, which has the guidance that is distilled
PROBE_STEPS = 10  # of its probes during training


def main() -> None:
    out = Path(OUT.value).expanduser()
    try:
        (out / "probes").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out {out}: is not a folder, or has a file named probes") from None
    except OSError as error:
        raise disk_error(error, out) from error
    log = _logger(out / "log.txt")
    size = configs.Size()
    initial = pretrain.start(size, SEED.value)
    if START.value is None:
        vae = autoencoder.train(out, SEED.value, AUTOENCODER_STEPS.value, log)
    else:
        learned, vae = export.read_model(Path(START.value).expanduser())
        _check_sizes(size, initial, learned, vae)
        initial |= learned
    encode, decode = _coders(vae)

    export.write_words(out / "tokenizer", QWEN3_TEMPLATE, 131072)
    texts = pool.Texts(transformers.AutoTokenizer.from_pretrained(out / "tokenizer"))
    source = training.Source(SEED.value, texts, encode)
    measure = probe.Probe(
        probe.Sampler(size, texts, decode), lambda x: decode(encode(x)), out / "probes"
    )

    def report(name: str, **sampler):
        def write(parameters: optimizer.Parameters, step: int) -> None:
            scores = measure(parameters, f"{name}_{step:06d}", **sampler)
            log(f"{name} {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))

        return write

    def trained(stage: training.Stage, file: str, **sampler) -> optimizer.Parameters:
        path = out / f"{file}.safetensors"
        return training.run(path, stage, source, report(file, **sampler), log)

    many = pretrain.stage(size, initial, PRETRAIN_STEPS.value)
    many = trained(many, "pretrain", steps=PROBE_STEPS, guidance=few_steps.GUIDANCE)
    few = endpoint.stage(size, many, ENDPOINT_STEPS.value)
    few = trained(few, "endpoint", steps=few_steps.STEPS)
    few = matching.stage(size, few, many, MATCHING_STEPS.value)
    few = trained(few, "matching", steps=few_steps.STEPS)
    if not (out / "model").exists():
        export.write_model(out / "model", size, few, vae)
    log(f"the model: {out / 'model'}")
    _scores(out, many, measure.sampler, encode, log)


def _check_sizes(size: configs.Size, initial, learned: optimizer.Parameters, vae: Autoencoder):
    """Raises `UserError` unless the model of --start has the sizes that are trained here."""
    shapes = lambda parameters: {name: value.shape for name, value in parameters.items()}
    wanted = shapes(pretrain.without_heads(initial))
    cfg = configs.parsed(size, vae.cfg.scaling_factor, vae.cfg.shift_factor)[-1]
    if shapes(learned) != wanted or vae.cfg != cfg:
        raise UserError(
            f"--start {START.value}: is a model of other sizes than miniature/configs.py has; name "
            "a folder that miniature.train wrote"
        )


def _scores(out: Path, many: optimizer.Parameters, sampler: probe.Sampler, encode, log):
    """Writes what the gates need to know of the model before distillation, and all scores."""
    trial, pipe = gates.Trial(), dopsd_jax.load_pipeline(out / "model")
    few = sampler.artist(many, encode, few_steps.STEPS)
    fine = sampler.artist(many, encode, MANY_STEPS, few_steps.GUIDANCE)
    found = {
        gates.SHIPPED: gates.of_folder(pipe, trial),
        gates.UNDISTILLED_FEW: trial(few),
        gates.UNDISTILLED_MANY: trial(fine),
    }
    write_text(out / gates.SCORES, json.dumps(found, indent=1) + "\n")
    rows = gates.verdicts(found[gates.SHIPPED], gates.undistilled(out / gates.SCORES))
    for line in gates.lines(rows):
        log(line)


def _coders(vae: Autoencoder):
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
