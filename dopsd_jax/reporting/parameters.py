"""How a picture was drawn, as text in its PNG file, which other programs read and write as well.

The form is that of AUTOMATIC1111's web UI, in the chunk `parameters`: the prompt, a line with the
LoRA files if there are any, a line of settings.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dopsd_jax import __version__
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import open_regular
from dopsd_jax.common.json_files import parse_json
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.data.images import DECODE_ERRORS
from dopsd_jax.weights.lora_files import PEFT_WEIGHTS
from dopsd_jax.weights.safetensors_io import read_header

CHUNK = "parameters"
DIGITS = 12  # of a LoRA's digest
GUIDANCE = 1.0  # none: few-step models are drawn without
MAX_SETTINGS = 1 << 16  # characters of the line of settings; `sample` writes a few hundred
# Name: value, the value in JSON's quotes if it has a comma, a colon or a line feed. Without a limit
# on the name a text without colons takes time by its square.
SETTING = re.compile(r'(\w[\w /-]{1,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
LORA = re.compile(r"<lora:([^:<>]*):([^:<>]*)>")
SIZE = re.compile(r"(\d+)x(\d+)")


class Lora(NamedTuple):
    """A LoRA file: its name without the ending, its strength, the first digits of its digest."""

    name: str
    strength: float
    digest: str = ""


class Parameters(NamedTuple):
    """Everything that a picture depends on, but references. guidance: 1 is none."""

    prompt: str
    steps: int
    seed: int
    width: int
    height: int
    model: str = ""
    guidance: float = GUIDANCE
    loras: tuple[Lora, ...] = ()


def used(loras: Iterable[LoraOption]) -> tuple[Lora, ...]:
    """What to write of LoRA files. Raises `UserError` for those that cannot be read."""
    return tuple(Lora(_plain(path), strength, digest(path)) for path, strength in loras)


def digest(path: Path) -> str:
    """The first digits of the sha256 of a file's tensors: Civitai's AutoV3.

    What its header says does not change it. Raises `UserError`.
    """
    whole = path / PEFT_WEIGHTS if os.path.isdir(path) else path
    read_header(whole)  # else there are no tensors to find
    with open_regular(whole) as file:
        try:
            file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
            return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def chunks(made: Parameters) -> dict[str, str]:
    """The text chunks of a picture's file."""
    loras = ", ".join(f"{lora.name}:{lora.strength:g}" for lora in made.loras)
    plain = {"prompt": made.prompt, "seed": str(made.seed), "lora": loras}
    return {**plain, CHUNK: text(made)}


def text(made: Parameters) -> str:
    """The text of the chunk `parameters`."""
    settings = {
        "Steps": str(made.steps),
        "Sampler": "Euler",
        "CFG scale": f"{made.guidance:g}",
        "Seed": str(made.seed),
        "Size": f"{made.width}x{made.height}",
        "Model": made.model,
        "Lora hashes": ", ".join(f"{lora.name}: {lora.digest}" for lora in made.loras),
        "Version": f"dopsd_jax {__version__}",
    }
    lines = [made.prompt]
    if made.loras:
        lines += [" ".join(f"<lora:{lora.name}:{lora.strength!r}>" for lora in made.loras)]
    lines += [", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value)]
    return "\n".join(lines)


def parse(given: str, where: str) -> Parameters:
    """What `text` wrote, or another program in the same form. Raises `UserError` naming `where`.

    A negative prompt is left in the prompt: it has no effect without guidance.
    """
    *lines, last = given.split("\n")
    if len(last) > MAX_SETTINGS:
        raise UserError(
            f"{where}: its parameters end with a line of {len(last)} characters, which are no "
            "settings; was it drawn by `sample`?"
        )
    found = {name: _unquoted(value) for name, value in SETTING.findall(last)}
    size = SIZE.fullmatch(found.get("Size", ""))
    loras: list[Lora] = []
    if "Lora hashes" in found and lines and not LORA.sub("", lines[-1]).strip():
        digests = [pair.rpartition(": ")[2] for pair in found["Lora hashes"].split(", ")]
        tags = zip(LORA.findall(lines.pop()), digests, strict=False)
        loras = [Lora(name, _number(n, float, where), own) for (name, n), own in tags]
    missing = [name for name in ("Steps", "Seed") if name not in found]
    missing += [] if size else ["Size"]
    if missing:
        raise UserError(
            f"{where}: its parameters have no {', '.join(missing)}; was it drawn by `sample`?"
        )
    return Parameters(
        prompt="\n".join(lines),
        steps=_number(found["Steps"], int, where),
        seed=_number(found["Seed"], int, where),
        width=_number(size[1], int, where),
        height=_number(size[2], int, where),
        model=found.get("Model", ""),
        guidance=_number(found.get("CFG scale", "1"), float, where),
        loras=tuple(loras),
    )


def read_parameters(path: str | os.PathLike) -> Parameters:
    """How the picture of a PNG file was drawn. Raises `UserError` for a file that does not say."""
    texts = read_texts(path)
    if CHUNK not in texts:
        raise UserError(f"{path}: does not say how it was drawn; give a PNG file of `sample`")
    return parse(texts[CHUNK], str(path))


def read_texts(path: str | os.PathLike) -> Mapping[str, str]:
    """The text chunks of a picture's file. Raises `UserError`."""
    with open_regular(path) as file:
        try:
            with Image.open(file, formats=("PNG",)) as image:
                image.load()  # text may stand behind the pixels
                return dict(getattr(image, "text", {}))
        except DECODE_ERRORS as error:
            raise UserError(f"{path}: is no picture in PNG ({error}); remove it") from None


def _plain(path: Path) -> str:
    """The name of a LoRA as other programs look for it, without what has a meaning in the text."""
    return re.sub(r"[<>:,\"\n]", "_", path.stem if path.suffix else path.name)


def _quoted(value: str) -> str:
    plain = value == value.strip() and not re.search(r'[,:\n"]', value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return str(parse_json(value, ""))
    except UserError:
        return value


def _number(value: str, kind: type, where: str):
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{where}: its parameters have {value[:20]!r} for a number") from None
