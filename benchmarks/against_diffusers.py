"""Drawing beside diffusers' pipelines: the same small weights, prompts and noise, in turns.

    python benchmarks/against_diffusers.py --family=zimage --page=docs/sampling.md
    python benchmarks/against_diffusers.py --family=flux2_klein --page=docs/sampling.md
    python benchmarks/against_diffusers.py --family=zimage --miniature --side=64 --batch=8
    python benchmarks/against_diffusers.py --family=zimage --wide        # see wide_mkl.py

The weights are random, of a network whose time is that of its products; with --miniature those that
are shipped, of a much smaller one.

Both draw in this process on one core of the processor, in turns, and the processor's own time
counts: what else the machine does meets both alike. Every round draws prompts of different lengths,
from the texts to 8-bit pictures, and then does each part alone. What is compiled for a shape is
compiled before. Only ratios are printed: seconds would be of this machine.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import jax
import numpy as np
import torch
import wide_mkl
from absl import flags

import dopsd_jax
from dopsd_jax import families
from dopsd_jax.common import program
from dopsd_jax.common.errors import UserError
from dopsd_jax.config.find import shipped
from dopsd_jax.families.flux2_klein import random as klein
from dopsd_jax.families.sampling import start_noise
from dopsd_jax.models.flux2_config import ROWS_FIELD, Flux2Config
from dopsd_jax.random_model import Size, write_random_model

FAMILY = flags.DEFINE_enum("family", "zimage", ["zimage", "flux2_klein"], "whose model")
SIDE = flags.DEFINE_integer("side", 256, "pixels", 64)
BATCH = flags.DEFINE_integer("batch", 2, "pictures at once", 1)
MINIATURE = flags.DEFINE_bool("miniature", False, "the shipped model of the family")
ROUNDS = flags.DEFINE_integer("rounds", 5, "how often both are timed", 1)
WIDE = flags.DEFINE_bool("wide", False, "PyTorch's products at the processor's full width")
PAGE = flags.DEFINE_string("page", None, "page whose row of this family is written anew")

VAE = (32, 64, 128, 128)
SMALL = Size(
    dim=512, layers=8, heads=8, axes=(16, 24, 24), text_dim=256, text_layers=8, vae_channels=VAE
)
PROMPTS = (
    "a red circle",
    "a large blue star on the left of a small green square, on a striped grey background",
)
SHIPPED = {"zimage": "miniature", "flux2_klein": "klein_miniature"}
PARTS = ("all", "texts", "steps", "decoding")
Actions = dict[str, Callable[[], Any]]


def main() -> None:
    if WIDE.value and not wide_mkl.is_on():
        variables = wide_mkl.environment(Path(tempfile.mkdtemp()))
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | variables)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX starts its threads
    folder = model()
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(BATCH.value)]
    both = ours(folder, prompts), theirs(folder, prompts)
    seconds = {part: [timed(both, part) for _ in range(ROUNDS.value + 1)][1:] for part in PARTS}
    pictures = [own["all"]() for own in both]
    if pictures[0].shape != pictures[1].shape:
        raise UserError(f"pictures of {pictures[0].shape} and {pictures[1].shape}")
    difference = np.abs(pictures[0].astype(int) - pictures[1]).max()
    ratio = {p: statistics.median(a / b for a, b in pairs) for p, pairs in seconds.items()}
    whole = statistics.median(a for a, _ in seconds["all"])
    share = {p: statistics.median(a for a, _ in pairs) / whole for p, pairs in seconds.items()}
    cells = [f"{ratio[p]:.2f}" + f" ({share[p]:.0%})" * (p != "all") for p in PARTS]
    case = f"{BATCH.value} of {SIDE.value} x {SIDE.value}"
    row = f"| {name()} | {case} | {' | '.join(cells)} | {difference} |"
    print(f"| family | pictures | {' | '.join(PARTS)} | largest difference, of 255 |\n{row}")
    print(f"jax {jax.__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}")
    if PAGE.value:
        write(Path(PAGE.value), row)


def timed(both: tuple[Actions, Actions], part: str) -> list[float]:
    """Seconds of the processor for this part, of both."""
    found = []
    for own in both:
        begin = time.process_time()
        own[part]()
        found.append(time.process_time() - begin)
    return found


def name() -> str:
    """What the page calls the network."""
    return FAMILY.value + ", miniature" * MINIATURE.value + ", wide MKL" * WIDE.value


def model() -> Path:
    """Its folder. Random weights are of a network whose time is mostly that of its products."""
    if MINIATURE.value:
        return shipped("examples", SHIPPED[FAMILY.value]) / "model"
    folder = Path(tempfile.gettempdir()) / f"dopsd_small_{FAMILY.value}"
    if (folder / "model_index.json").exists():
        return folder
    if FAMILY.value == "zimage":
        return write_random_model(folder, size=SMALL)
    size = Flux2Config(
        heads=8, head_dim=64, double_layers=2, single_layers=6, channels=16, text_dim=96,
        axes_dims=(16, 16, 16, 16),
    )  # fmt: skip
    wide = klein.autoencoder() | {"block_out_channels": list(VAE)}
    with (
        mock.patch.object(klein, "random_size", lambda: size),
        mock.patch.object(klein, "autoencoder", lambda: wide),
    ):
        return klein.write_random_model(folder)


def ours(folder: Path, prompts: list[str]) -> Actions:
    """What is timed of our pipeline."""
    pipe, side = dopsd_jax.load_pipeline(str(folder), dtype="float32"), SIDE.value
    noise = np.asarray(start_noise(0, len(prompts), pipe.latent_shape(side, side)))
    grid, context = pipe.deployed_grid(noise.shape[1:]), pipe.encode_prompt(prompts)
    return {
        "all": lambda: pipe(prompts, height=side, width=side, latents=noise),
        "texts": lambda: pipe.encode_prompt(prompts),
        "steps": lambda: np.asarray(pipe.sample(pipe.split[1], noise, context, grid)),
        "decoding": lambda: pipe.decode(noise),
    }


def theirs(folder: Path, prompts: list[str]) -> Actions:
    """The same of diffusers' pipeline."""
    torch.set_grad_enabled(False)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    own = dopsd_jax.load_pipeline(str(folder), dtype="float32")
    noise = np.array(start_noise(0, len(prompts), own.latent_shape(SIDE.value, SIDE.value)))
    noise = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    steps = families.load(FAMILY.value).DEPLOYED_STEPS
    unguided = 0.0 if FAMILY.value == "zimage" else 1.0
    size = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    rows = {ROWS_FIELD: size[ROWS_FIELD]} if ROWS_FIELD in size else {}
    draw = lambda **more: pipe(
        height=SIDE.value, width=SIDE.value, num_inference_steps=steps, latents=noise,
        guidance_scale=unguided, **rows, **more,
    ).images  # fmt: skip
    # A list of its own: it is written to.
    texts = lambda: pipe.encode_prompt(list(prompts), **rows)[0]
    encoded, config = texts(), pipe.vae.config
    channels = config.latent_channels
    cells = noise if FAMILY.value == "zimage" else torch.randn(
        len(prompts), channels, 2 * noise.shape[2], 2 * noise.shape[3]
    )  # fmt: skip
    return {
        "all": lambda: (255 * draw(prompt=list(prompts), output_type="np")).round().astype("u1"),
        "texts": texts,
        "steps": lambda: draw(prompt_embeds=encoded, output_type="latent"),
        "decoding": lambda: pipe.vae.decode(cells).sample,
    }


def write(page: Path, row: str) -> None:
    """Puts the row in the place of this family's on the page. Raises `UserError`."""
    text = page.read_text(encoding="utf-8")
    text, count = re.subn(rf"^\| {name()} \|.*$", row, text, count=1, flags=re.MULTILINE)
    if not count:
        raise UserError(f"--page {page}: has no row of {name()}")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    program.parse()
    program.run(main)
