"""Samples: python -m dopsd_jax.sample --model PATH [--lora FILE] --prompt "..." --out DIR"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dopsd_jax.common import program
from dopsd_jax.common.errors import Attempts, UserError, raise_if
from dopsd_jax.common.files import expand
from dopsd_jax.data.sources.files import IMAGE_SUFFIXES
from dopsd_jax.models import kinds

OPTIONS = program.options(__name__)
MODEL = OPTIONS.path("model", None, "model folder, converted checkpoint or hub id")
LORA = OPTIONS.loras(
    "lora", [], "LoRA file to apply, or FILE:STRENGTH; may be given several times: they add up"
)
STRENGTHS = OPTIONS.list(
    "strengths",
    [],
    "numbers that the strengths of all --lora are multiplied with, such as 0,0.5,1: every picture "
    "is drawn with each, 0 is the base model, and a sheet for every seed shows them side by side",
)
PROMPT = OPTIONS.multi_string("prompt", [], "what to draw; may be given several times")
PROMPTS = OPTIONS.path("prompts", None, "text file with a prompt a line")
REFERENCE = OPTIONS.multi_string(
    "reference", [], "picture to edit, if the model can; may be given several times"
)
OUT = OPTIONS.path("out", None, "folder for the pictures")
HEIGHT = OPTIONS.integer("height", None, "pixels; default: the model's own size", 1, 65536)
WIDTH = OPTIONS.integer("width", None, "pixels; default: the model's own size", 1, 65536)
STEPS = OPTIONS.integer("steps", None, "sampling steps; default: the released sampler's", 1, 1000)
SEED = OPTIONS.list("seed", ["0"], "seed of the picture of every prompt, or several: 3,7,42")
COUNT = OPTIONS.integer("count", 1, "pictures per prompt, seeds from --seed on", 1, 10**6)
DTYPE = OPTIONS.enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16"],
    "type of activations; auto: float32 on CPU only",
)
BASE_DTYPE = OPTIONS.enum("base_dtype", kinds.AUTO, kinds.DRAWN_BASES, kinds.DRAWN_HELP)
LARGEST_SEED = 2**32 - 1


def seeds() -> list[int]:
    """The seeds that the options name. Raises `UserError`."""
    given = list(dict.fromkeys(SEED.value))
    raise_if(
        f"--seed {text!r}: is no whole number from 0 to {LARGEST_SEED}"
        for text in given or [""]
        if not (re.fullmatch(r"[0-9]{1,10}", text) and int(text) <= LARGEST_SEED)
    )
    first = int(given[0])
    if len(given) > 1 and COUNT.value > 1:
        raise UserError("--count: counts seeds from one on; leave it out with several --seed")
    if first + COUNT.value - 1 > LARGEST_SEED:
        raise UserError(f"--count {COUNT.value}: seeds end at {LARGEST_SEED}; lower --seed")
    return list(range(first, first + COUNT.value)) if len(given) == 1 else [*map(int, given)]


def strengths() -> list[float]:
    """The factors that --strengths names, each once; 1 alone without it. Raises `UserError`."""
    if STRENGTHS.value and not LORA.value:
        raise UserError("--strengths: there is nothing to weaken; give a file with --lora")
    found = []
    for text in STRENGTHS.value or ["1"]:
        try:
            found.append(float(text))
        except ValueError:
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise UserError(f"--strengths {text!r}: is no number; write numbers and commas: 0,0.5")
    return list(dict.fromkeys(found))


def check() -> None:
    """Raises `UserError` for options that are wrong together."""
    seeds()
    strengths()
    if not PROMPT.value and not PROMPTS.value:
        raise UserError("--prompt: there is nothing to draw; give --prompt or --prompts")
    out = expand(OUT.value)
    if out.suffix.lower() in IMAGE_SUFFIXES and not os.path.isdir(out):
        raise UserError(f"--out {OUT.value}: is the name of a picture; name a folder for pictures")


if __name__ == "__main__":
    # Wrong options end it here: the imports below take seconds.
    program.parse(required=("model", "out"), check=check)

import jax
import numpy as np

import dopsd_jax
from dopsd_jax.common.atomic import disk_error, remove_leftovers
from dopsd_jax.common.progress import Progress
from dopsd_jax.conditioning.anchors import lines_of
from dopsd_jax.conditioning.padding import padded_rows, shapes_of
from dopsd_jax.data.images import open_image
from dopsd_jax.families.base import STUDENT
from dopsd_jax.families.drawing import decoded, filled, together
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.families.prompts import prompt_features
from dopsd_jax.families.sampling import finite, start_noise
from dopsd_jax.reporting import parameters, pictures
from dopsd_jax.reporting.parameters import Parameters


def prompts() -> list[tuple[str, str]]:
    """What the options ask for: where each prompt stands, and its text. Raises `UserError`."""
    lines = lines_of(expand(PROMPTS.value), "--prompts") if PROMPTS.value else []
    placed = [(f"{PROMPTS.value}:{number}", text) for number, text in lines]
    return [*(("--prompt", text) for text in PROMPT.value), *placed]


def check_prompts(pipe: Pipeline, asked: Sequence[tuple[str, str]]) -> None:
    """Raises `UserError` with every prompt of `prompts` that the model cannot take."""
    faults: dict[str, list[str]] = {}
    for where, prompt in asked:
        try:
            pipe.request(STUDENT, prompt)
        except UserError as error:
            for problem in error.problems:
                faults.setdefault(problem, []).append(where)
    # What is wrong for several, such as a missing tokenizer, is not of one prompt.
    raise_if(f"{w[0]}: {fault}" if len(w) == 1 else fault for fault, w in faults.items())


def main() -> None:
    out = expand(OUT.value)
    dtype = DTYPE.value
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    base = kinds.drawn_base(BASE_DTYPE.value, dtype)
    attempt = Attempts()  # all faults before the first picture
    references = [attempt(lambda path=path: open_image(path)) for path in REFERENCE.value]
    placed = attempt(prompts)
    pipe = attempt(
        lambda: dopsd_jax.load_pipeline(MODEL.value, dtype=dtype, lora=LORA.value, base_dtype=base)
    )
    attempt.end()
    for path, picture in zip(REFERENCE.value, references, strict=True):
        size, where = picture.shape[:2], f"--reference {path}"
        attempt(lambda size=size, where=where: pipe.reference_size(*size, where))
    height, width = HEIGHT.value or pipe.own_size, WIDTH.value or pipe.own_size
    shape = attempt(lambda: pipe.latent_shape(height, width))
    attempt(lambda: check_prompts(pipe, placed))
    attempt.end()
    asked = [text for _, text in placed]
    loras = parameters.used(LORA.value)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--out {out}: is a file; name a folder") from None
    except OSError as error:
        raise disk_error(error, out) from error
    remove_leftovers(out)
    factors = strengths()
    todo = len(asked) * len(seeds()) * len(factors)
    for note in pipe.notes():
        print(note)
    print(
        f"{MODEL.value}: to draw {todo} of {width}x{height} pixels, {dtype} on "
        f"{jax.default_backend()}; the first takes longer: the sampler is compiled",
        flush=True,
    )
    grid = pipe.deployed_grid(shape, STEPS.value)
    steps = len(grid) - 1
    about = Parameters("", steps, 0, width, height, Path(MODEL.value).name)
    progress = Progress("picture", todo, every=0)
    features = prompt_features(pipe, asked, references)
    pipe.release_encoders()  # before the transformer comes
    # One length for all prompts, so that one program draws them.
    padded = padded_rows(map(shapes_of, features), pipe, STUDENT, "--prompt")
    shots = [(seed, number) for seed in seeds() for number in range(len(asked))]
    size, trained = together(len(shots), height * width), pipe.split[1]

    def draw(factor: float) -> Iterator[np.ndarray]:
        """The pictures of `shots`."""
        for some, count in filled(shots, size):
            noise = np.concatenate([start_noise(seed, 1, shape) for seed, _ in some])
            context = pipe.family.collate([features[number] for _, number in some], padded)
            latents = np.asarray(pipe.sample(trained, noise, context, grid, factor))
            yield from decoded(pipe, finite(latents, factor)[:count], size)

    sheets = {seed: [pictures.GridRow(prompt, []) for prompt in asked] for seed in seeds()}
    for factor in factors:
        own = tuple(lora._replace(strength=lora.strength * factor) for lora in loras)
        for (seed, number), image in zip(shots, draw(factor), strict=True):
            name = f"{number:03d}_seed{seed}"
            name += f"_strength{factor:g}" if STRENGTHS.value else ""
            path = unused(out / f"{name}.png")
            made = about._replace(prompt=asked[number], seed=seed, loras=own)
            pictures.save_picture(path, image, parameters.chunks(made))
            progress.advance(text=str(path))
            sheets[seed][number].images.append(pictures.shrunk(image))
    if STRENGTHS.value:
        for seed, rows in sheets.items():
            path, title = unused(out / f"sheet_seed{seed}.png"), f"seed {seed}, {steps} forwards"
            pictures.save_grid(path, [f"{factor:g}" for factor in factors], rows, title=title)
            progress.note(f"sheet: {path}")


def unused(path: Path) -> Path:
    """The path, or with a number where an earlier picture has that name: none is overwritten."""
    names = itertools.chain(
        [path], (path.with_name(f"{path.stem}_{n}.png") for n in itertools.count(2))
    )
    return next(name for name in names if not os.path.exists(name))


if __name__ == "__main__":
    program.run(main)
