"""Samples: python -m dopsd_jax.sample --model PATH [--lora FILE] --prompt "..." --out DIR"""

from pathlib import Path

import jax
from absl import flags

import dopsd_jax
from dopsd_jax.common import errors
from dopsd_jax.common.atomic import disk_error
from dopsd_jax.common.errors import UserError
from dopsd_jax.families.zimage.pipeline import start_noise
from dopsd_jax.reporting.pictures import save_picture

MODEL = flags.DEFINE_string("model", None, "model folder, converted checkpoint or hub id")
LORA = flags.DEFINE_string("lora", None, "LoRA file to apply")
PROMPT = flags.DEFINE_multi_string("prompt", None, "what to draw; may be given several times")
OUT = flags.DEFINE_string("out", None, "folder for the pictures")
HEIGHT = flags.DEFINE_integer("height", 1024, "pixels", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 1024, "pixels", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", None, "forwards; default: the deployed 8", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the first picture of a prompt", lower_bound=0)
COUNT = flags.DEFINE_integer("count", 1, "pictures a prompt, with seeds from --seed", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "of activations; auto: float32 on CPU only"
)


def main() -> None:
    out = Path(OUT.value).expanduser()
    dtype = DTYPE.value
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    pipe = dopsd_jax.load_pipeline(MODEL.value, dtype=dtype, lora=LORA.value)
    shape = pipe.latent_shape(HEIGHT.value, WIDTH.value)
    for prompt in PROMPT.value:  # all faults before the first picture
        pipe.student_tokens(prompt)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--out {out}: is a file; name a folder") from None
    except OSError as error:
        raise disk_error(error, out) from error
    for number, prompt in enumerate(PROMPT.value):
        for seed in range(SEED.value, SEED.value + COUNT.value):
            image = pipe(
                [prompt],
                height=HEIGHT.value,
                width=WIDTH.value,
                steps=STEPS.value,
                latents=start_noise(seed, 1, shape),
            )[0]
            path = out / f"{number:03d}_seed{seed}.png"
            save_picture(
                path, image, {"prompt": prompt, "seed": str(seed), "lora": LORA.value or ""}
            )
            print(path, flush=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "prompt", "out"])
    errors.run(main)
