"""A page on this machine that draws, and watches a run: python -m dopsd_jax.serve --model PATH

Draws a prompt by the base model and with LoRA files at several strengths, side by side; with --run
a second tab follows a training. Needs the extra `ui`: pip install 'dopsd_jax[ui]'.
"""

from dopsd_jax.common import program
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import expand
from dopsd_jax.models import kinds

LOCAL = "127.0.0.1"
OPTIONS = program.options(__name__)
MODEL = OPTIONS.path("model", None, "model folder, converted checkpoint or hub id")
LORAS = OPTIONS.path("loras", None, "folder of LoRA files, such as RUN/lora; no others can be used")
RUN = OPTIONS.path("run", None, "work directory of a training to watch")
HOST = OPTIONS.string("host", LOCAL, "address to listen on; the default is reached from here only")
PORT = OPTIONS.integer("port", 7860, "port to listen on; 0: the first free one from 7860", 0, 65535)
DTYPE = OPTIONS.enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16"],
    "type of activations; auto: float32 on CPU only",
)
BASE_DTYPE = OPTIONS.enum("base_dtype", kinds.AUTO, kinds.DRAWN_BASES, kinds.DRAWN_HELP)


def check() -> None:
    """Raises `UserError` for options that are wrong together."""
    if not MODEL.value and not RUN.value:
        raise UserError("--model: there is nothing to show; give --model, --run or both")
    if LORAS.value and not MODEL.value:
        raise UserError("--loras: give the model that they are for with --model")


if __name__ == "__main__":
    # Wrong options end it here: the imports below take seconds.
    program.parse(check=check)

import jax

import dopsd_jax
from dopsd_jax.serving import page
from dopsd_jax.serving.drawing import Studio
from dopsd_jax.serving.watching import Watched


def main() -> None:
    page.need_gradio()  # before a model is loaded
    watched = Watched(expand(RUN.value)) if RUN.value else None
    studio = None
    if MODEL.value:
        dtype = DTYPE.value
        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        base = kinds.drawn_base(BASE_DTYPE.value, dtype)
        pipe = dopsd_jax.load_pipeline(MODEL.value, dtype=dtype, base_dtype=base)
        folder = expand(LORAS.value) if LORAS.value else None
        studio = Studio(pipe, MODEL.value, folder)
        for note in pipe.notes():
            print(note)
        print(f"{MODEL.value}: loading", flush=True)
        _ = pipe.transformer
    if HOST.value != LOCAL:
        print(f"note: who can reach {HOST.value} can draw here; there is no password", flush=True)
    page.serve(page.build(studio, watched), HOST.value, PORT.value)


if __name__ == "__main__":
    program.run(main)
