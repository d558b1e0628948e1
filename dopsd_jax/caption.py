"""Captions pictures: python -m dopsd_jax.caption --images FOLDER --model ID_OR_FOLDER

A Qwen3-VL, such as the one that Z-Image's teacher needs, writes a text file beside every picture
that has no caption. The same command again goes on where it was stopped. Read the captions before
you train: a model describes what it believes to see. See docs/data.md.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dopsd_jax.common import program
from dopsd_jax.common.errors import UserError, one_line, raise_if
from dopsd_jax.common.files import can_enter, expand

INSTRUCTION = (
    "Write a caption of this picture for training an image generator: one plain sentence that says "
    "what is shown, what it does, where it is, what is in the background, in which light and from "
    "where it is seen, and whether it is a photo, a drawing or another kind of picture. Name only "
    "what can be seen. Say nothing about quality, and do not begin with words such as 'the picture "
    "shows'. Answer with the sentence alone."
)
CALLED = (
    " Call the main subject {trigger}, in exactly these words. They stand for how it looks: "
    "describe everything else, but not the look of the subject itself."
)

TEXT_SUFFIXES = (".txt", ".caption", ".cap", ".text", ".tags")

OPTIONS = program.options(__name__)
IMAGES = OPTIONS.path("images", None, "folder of pictures; its subfolders are looked through, too")
MODEL = OPTIONS.path(
    "model", None, "folder or hub id of a Qwen3-VL, or model folder that has one in its folder vlm"
)
CHOSEN = OPTIONS.string("instruction", INSTRUCTION, "what the model is told to do with a picture")
TRIGGER = OPTIONS.string(
    "trigger", "", "words for what is trained, such as '[V] dog'; every caption then has them"
)
OVERWRITE = OPTIONS.bool("overwrite", False, "write captions anew for pictures that have one")
EXTENSION = OPTIONS.enum("extension", ".txt", TEXT_SUFFIXES, "ending of the caption files")
TOKENS = OPTIONS.integer("max_tokens", 128, "tokens of the longest caption", 1, 4096)
TEMPERATURE = OPTIONS.float(
    "temperature", 0.0, "of drawing the tokens; 0: the most likely ones", 0.0, 10.0
)
TOP_P = OPTIONS.float(
    "top_p", 0.8, "with a temperature: share of the probability that is drawn from", 0.0, 1.0
)
SEED = OPTIONS.integer(
    "seed", 0, "of drawing; each picture has random numbers of its own", 0, 2**31
)
PIXELS = OPTIONS.integer(
    "max_pixels", 768 * 768, "largest area that the model is shown", 32 * 32, 2**28
)
BATCH = OPTIONS.integer("batch", 4, "pictures of one size that are captioned together", 1, 1024)
DTYPE = OPTIONS.enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16"],
    "type of activations; auto: float32 on CPU only",
)


def check_options() -> None:
    """Raises `UserError` for options that cannot be used."""
    faults = [
        f"--{name}: {value} is not a number; leave it out"
        for name, value in (("temperature", TEMPERATURE.value), ("top_p", TOP_P.value))
        if not math.isfinite(value)
    ]
    if not CHOSEN.value.strip():
        faults.append("--instruction: is empty; leave it out, or say what the model is to do")
    if TRIGGER.value and TRIGGER.value != " ".join(TRIGGER.value.split()):
        faults.append(f"--trigger: {TRIGGER.value!r} has needless blanks; remove them")
    raise_if(faults)


if __name__ == "__main__":
    # Wrong options end it here: the imports below take seconds.
    program.parse(required=("images", "model"), check=check_options)

import jax

from dopsd_jax.common.atomic import remove_leftovers, write_text
from dopsd_jax.common.progress import Progress
from dopsd_jax.data.images import inspect_image, open_image
from dopsd_jax.data.sources import uncaptioned
from dopsd_jax.families.captioner import Captioner, Settings
from dopsd_jax.weights import hub
from dopsd_jax.weights.model_folder import INDEX


class Todo(NamedTuple):
    """A picture, the caption file to write, and the picture's grid of patches."""

    picture: str
    text: str
    grid: tuple[int, int]


def main() -> None:
    top = expand(IMAGES.value)
    if not can_enter(top):
        raise UserError(
            f"--images {top}: is no folder that can be read; name the folder of the pictures"
        )
    found = uncaptioned.find(top, EXTENSION.value, overwrite=OVERWRITE.value)
    for note in found.notes:
        print(one_line(note))
    print(f"{top}: {len(found.wanted)} pictures to caption, {found.captioned} have captions")
    if not found.wanted:
        raise_if(found.faults)
        return

    dtype = DTYPE.value
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    captioner = Captioner(model_folder(MODEL.value), settings(), dtype)
    todo, faults = measured(captioner, found.wanted)
    faults = [*found.faults, *faults]
    if faults:
        print(f"{top}: {len(faults)} files have faults; they are named at the end")
    remove_leftovers(*{Path(one.text).parent for one in todo})
    written = 0
    if todo:
        print(
            f"{MODEL.value}: {dtype} on {jax.default_backend()}; the first picture of each size "
            "takes longer: its program is compiled",
            flush=True,
        )
        progress = Progress("captions", len(todo))
        for batch in batches(todo, BATCH.value):
            captions, own = caption(captioner, batch)
            for one, text in captions:
                write_text(one.text, text + "\n")
            written += len(captions)
            faults += own
            shown = [f"{one.picture}: {text}" for one, text in captions[-1:]]
            progress.advance(len(batch.todo), "".join(shown))
    print(f"{top}: {written} captions written")
    raise_if(faults)  # after all that could be done


def settings() -> Settings:
    """Of the command line."""
    trigger = TRIGGER.value
    return Settings(
        CHOSEN.value.strip() + (CALLED.format(trigger=trigger) if trigger else ""),
        TOKENS.value,
        TEMPERATURE.value,
        TOP_P.value,
        SEED.value,
        PIXELS.value,
    )


def model_folder(model: str) -> Path:
    """The folder of the Qwen3-VL that --model means. Raises `UserError`."""
    folder = hub.resolve(model, patterns=hub.ROOT).path
    if os.path.isdir(folder / "vlm"):
        return folder / "vlm"
    if os.path.isfile(folder / INDEX):
        raise UserError(
            f"--model {model}: draws pictures and has no folder vlm; name a model that describes "
            "them, such as Qwen/Qwen3-VL-4B-Instruct"
        )
    return folder


def measured(
    captioner: Captioner, wanted: Iterable[uncaptioned.Wanted]
) -> tuple[list[Todo], list[str]]:
    """The pictures with their grids, and what is wrong with the others."""
    todo, faults = [], []
    for picture, text in wanted:
        try:
            info = inspect_image(picture, verify=False)
            todo.append(Todo(picture, text, captioner.grid(info.height, info.width, picture)))
        except UserError as error:
            faults += error.problems
    return todo, faults


class Batch(NamedTuple):
    """Pictures of one grid; they are filled up to `size`, so that one program is compiled."""

    todo: list[Todo]
    size: int


def batches(todo: Sequence[Todo], most: int) -> list[Batch]:
    """All pictures, those of one grid together, grids in the order of their first picture."""
    grids: dict[tuple[int, int], list[Todo]] = {}
    for one in todo:
        grids.setdefault(one.grid, []).append(one)
    return [
        Batch(same[first : first + most], min(most, len(same)))
        for same in grids.values()
        for first in range(0, len(same), most)
    ]


def caption(captioner: Captioner, batch: Batch) -> tuple[list[tuple[Todo, str]], list[str]]:
    """The captions of a batch, and what is wrong with pictures that get none."""
    opened, faults = [], []
    for one in batch.todo:
        try:
            pixels = open_image(one.picture)
            if captioner.grid(*pixels.shape[:2], one.picture) != one.grid:
                raise UserError(f"{one.picture}: was changed meanwhile; run the same command again")
            opened.append((one, pixels))
        except UserError as error:
            faults += error.problems
    if not opened:
        return [], faults
    pictures = [pixels for _, pixels in opened]
    pictures += pictures[-1:] * (batch.size - len(pictures))
    captions = []
    for (one, _), answer in zip(opened, captioner.answers(pictures), strict=False):
        text = None if answer is None else with_trigger(plain(answer), TRIGGER.value)
        if text:
            captions.append((one, text))
            continue
        what = f"does not end within {TOKENS.value} tokens" if answer is None else "is empty"
        faults.append(
            f"{one.picture}: the model's answer {what}; run again with a larger --max_tokens, "
            "--temperature=0.7, or another --instruction"
        )
    return captions, faults


def plain(answer: str) -> str:
    """An answer as a caption: one line, without quotation marks around it."""
    text = " ".join("".join(c if c.isprintable() else " " for c in answer).split())
    if len(text) > 1 and (text[0], text[-1]) in (('"', '"'), ("'", "'"), ("“", "”")):
        text = text[1:-1].strip()
    return text


def with_trigger(text: str, trigger: str) -> str:
    """The caption with the trigger's exact words: where the model put them, else in front."""
    if not (text and trigger):
        return text
    # As words of their own: a hotdog is no dog. Scripts without blanks, from Thai on, have no such.
    joins = r"[^\W\u0e00-\u1dff\u2000-\U0010ffff]"
    own = rf"(?<!{joins}){re.escape(trigger)}(?!{joins})"
    exact, found = re.subn(own, lambda _: trigger, text, flags=re.IGNORECASE)
    return exact if found else f"{trigger}, {text}"


if __name__ == "__main__":
    program.run(main)
