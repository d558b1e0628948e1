"""Samples: python -m dopsd_jax.sample --model PATH [--lora FILE] --prompt "..." --out DIR"""

import itertools
from pathlib import Path

from dopsd_jax.common import program

OPTIONS = program.options(__name__)
MODEL = OPTIONS.path("model", None, "model folder, converted checkpoint or hub id")
LORA = OPTIONS.loras(
    "lora", [], "LoRA file to apply, or FILE:STRENGTH; may be given several times: they add up"
)
PROMPT = OPTIONS.multi_string("prompt", None, "what to draw; may be given several times")
REFERENCE = OPTIONS.multi_string(
    "reference", [], "picture to edit, if the model can; may be given several times"
)
OUT = OPTIONS.path("out", None, "folder for the pictures")
HEIGHT = OPTIONS.integer("height", None, "pixels; default: the model's own size", 1, 65536)
WIDTH = OPTIONS.integer("width", None, "pixels; default: the model's own size", 1, 65536)
STEPS = OPTIONS.integer("steps", None, "sampling steps; default: the released sampler's", 1, 1000)
SEED = OPTIONS.integer("seed", 0, "seed of the first picture of a prompt", 0, 2**32 - 1)
COUNT = OPTIONS.integer("count", 1, "pictures per prompt, seeds from --seed on", 1, 10**6)
DTYPE = OPTIONS.enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16"],
    "type of activations; auto: float32 on CPU only",
)

if __name__ == "__main__":
    # Wrong options end it here: the imports below take seconds.
    program.parse(required=("model", "prompt", "out"))

import jax

import dopsd_jax
from dopsd_jax.common.atomic import disk_error, remove_leftovers
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.progress import Progress
from dopsd_jax.data.images import open_image
from dopsd_jax.families.base import STUDENT
from dopsd_jax.families.pipeline import start_noise
from dopsd_jax.reporting.pictures import save_picture


def main() -> None:
    out = Path(OUT.value).expanduser()
    dtype = DTYPE.value
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    pipe = dopsd_jax.load_pipeline(MODEL.value, dtype=dtype, lora=LORA.value)
    loras = ", ".join(f"{lora.path}:{lora.strength:g}" for lora in LORA.value)
    references = [open_image(path) for path in REFERENCE.value]
    for path, picture in zip(REFERENCE.value, references, strict=True):
        pipe.reference_size(*picture.shape[:2], f"--reference {path}")
    height, width = HEIGHT.value or pipe.own_size, WIDTH.value or pipe.own_size
    shape = pipe.latent_shape(height, width)
    for prompt in PROMPT.value:  # all faults before the first picture
        pipe.request(STUDENT, prompt)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--out {out}: is a file; name a folder") from None
    except OSError as error:
        raise disk_error(error, out) from error
    remove_leftovers(out)
    seeds = range(SEED.value, SEED.value + COUNT.value)
    todo = [(n, prompt, seed) for n, prompt in enumerate(PROMPT.value) for seed in seeds]
    for note in pipe.notes():
        print(note)
    print(
        f"{MODEL.value}: to draw {len(todo)} of {width}x{height} pixels, {dtype} on "
        f"{jax.default_backend()}; the first takes longer: the sampler is compiled",
        flush=True,
    )
    progress = Progress("picture", len(todo), every=0)
    for number, prompt, seed in todo:
        if seed == SEED.value:  # the first picture of a prompt
            context = pipe.encode_prompt([prompt], references)
        image = pipe(
            [prompt],
            height=height,
            width=width,
            steps=STEPS.value,
            latents=start_noise(seed, 1, shape),
            context=context,
        )[0]
        path = unused(out / f"{number:03d}_seed{seed}.png")
        save_picture(path, image, {"prompt": prompt, "seed": str(seed), "lora": loras})
        progress.advance(text=str(path))


def unused(path: Path) -> Path:
    """The path, or with a number where an earlier picture has that name: none is overwritten."""
    names = itertools.chain(
        [path], (path.with_stem(f"{path.stem}_{n}") for n in itertools.count(2))
    )
    return next(name for name in names if not name.exists())


if __name__ == "__main__":
    program.run(main)
