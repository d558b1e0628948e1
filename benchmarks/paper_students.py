"""Other students for the study, which are not shipped: the miniature before its last stages.

    python benchmarks/paper_students.py --states=DIR --out=runs/students
    python benchmarks/paper.py --students="not distilled=runs/students/many,\\
endpoint=runs/students/endpoint,segment=runs/students/segment"

DIR is the --out of `python -m dopsd_jax.miniature.train`, with its states. Two students are read
from there. The third learns the mean velocity of each segment between nodes of the deployed grid,
as the first miniature did: its clean estimate at full noise stays a mean of pictures. Ten minutes
on two cores; a second call goes on.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from dopsd_jax.common import program
from dopsd_jax.common.errors import UserError
from dopsd_jax.miniature import endpoint, families, few_steps, optimizer
from dopsd_jax.miniature import train as miniature
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.saved import load_tree
from dopsd_jax.miniature.training import Loss, Source, Stage, run

OPTIONS = program.options(__name__)
STATES = OPTIONS.path("states", None, "folder with the states of a training")
OUT = OPTIONS.path("out", None, "folder for the students")
STEPS = OPTIONS.integer("steps", 80, "of the segments, 32 samples each", lower_bound=1)
SEED = 1


class Kept(NamedTuple):
    """What is read of a stage's state."""

    average: Parameters


def main() -> None:
    states, out = Path(STATES.value), Path(OUT.value)
    family = families.family("zimage")
    _, vae = family.read(states / "model")
    like = optimizer.flat(family.start(SEED))[1]
    many, end = (_average(states / f"{n}.safetensors", like) for n in ("pretrain", "endpoint"))
    out.mkdir(parents=True, exist_ok=True)
    encode, _ = miniature.coders(vae)
    texts = family.texts(transformers.AutoTokenizer.from_pretrained(states / "tokenizer"))
    tx = optimizer.muon(endpoint.MUON_RATE, endpoint.ADAM_RATE, STEPS.value, warmup=10)
    counts = endpoint.TEXTS, endpoint.IMAGES
    stage = Stage("segments", STEPS.value, loss(family, many), tx, many, *counts)
    nothing = lambda parameters, step: None
    source = Source(family, SEED, texts, encode)
    segment = run(out / "segment.safetensors", stage, source, nothing, print)
    for name, parameters in (("many", many), ("endpoint", end), ("segment", segment)):
        if not (out / name).exists():
            family.write(out / name, parameters, vae)
        print(out / name)


def _average(path: Path, like: Parameters) -> Parameters:
    """What a stage handed on: its average."""
    if not path.is_file():
        raise UserError(f"--states: {path} is missing; train the miniature first")
    return jax.tree.map(jnp.asarray, load_tree(path, Kept(like))[0].average)


def loss(family: families.Family, many: Parameters) -> Loss:
    """Squared error of the velocities at all nodes; `many`: the many-step model's weights."""
    module, grid = family.abstract(), family.grid
    nodes = len(grid) - 1
    between = endpoint.STEPS // nodes
    at = np.arange(nodes * between + 1) / between
    fine = tuple(np.interp(at, np.arange(nodes + 1), grid))

    def evaluate(parameters: Parameters, batch: families.Batch, keys: jax.Array):
        drop, draw = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        noise = few_steps.normal(draw, batch.latents.shape[1:])
        teacher = few_steps.guided(optimizer.merge(module, many), batch, drop)
        states = jax.lax.stop_gradient(few_steps.path(teacher, noise, fine))[::between]
        sigmas = jnp.asarray(grid, jnp.float32)
        student = few_steps.told(optimizer.merge(module, parameters), batch, drop)

        def error(total, segment):
            x, after, sigma, following = segment
            mean = (after - x) / (following - sigma)
            return total + jnp.mean((student(x, jnp.full(len(x), sigma)) - mean) ** 2), None

        segments = states[:-1], states[1:], sigmas[:-1], sigmas[1:]
        return jax.lax.scan(error, jnp.zeros(()), segments)[0] / nodes

    return evaluate


if __name__ == "__main__":
    program.parse(required=("states", "out"))
    program.run(main)
