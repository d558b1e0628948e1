"""Caption files that other programs write beside a picture: `a.caption` and `a.json`.

They are read where a picture has no file of `data.caption_extension`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import read_bytes
from dopsd_jax.common.json_files import parse_json
from dopsd_jax.data.sources.captions import (
    CAPTION_KEY,
    MAX_CAPTION_BYTES,
    TOO_LARGE,
    captions_in,
    kind_of,
)
from dopsd_jax.data.sources.collector import listing

CAPTION, JSON = ".caption", ".json"
SUFFIXES = (CAPTION, JSON)  # the first one with a caption is used
KEYS = (CAPTION_KEY, "captions", "text", "prompt")  # of a .json file
TAGS = "tags"  # of kohya's programs: follow the caption, or stand for it
_BOTH = "keep one, or set data.caption_extension"


class Sidecar(NamedTuple):
    """What a file beside a picture says: `captions` are alternatives; `fault`: what is wrong."""

    captions: tuple[str, ...]
    fault: str | None = None


def captions_beside(paths: Sequence[str], lines: bool) -> Sidecar:
    """The captions of a picture from the files beside it, in the order of `SUFFIXES`.

    `lines`: each line of a .caption file is an alternative. Files with different captions are a
    fault, and so is one that cannot be read.
    """
    found = {path: _read(path, lines) for path in paths}
    for path, (_, fault) in found.items():
        if fault:
            return Sidecar((), f"{path}: {fault}")
    telling = {path: own.captions for path, own in found.items() if own.captions}
    if len(set(telling.values())) > 1:
        return Sidecar((), f"{listing(telling)} hold different captions; {_BOTH}")
    return Sidecar(next(iter(telling.values()), ()))


def several_texts(paths: Sequence[str]) -> str:
    """What is wrong with caption files of one picture, such as a.txt and a.TXT."""
    return f"{listing(paths)} are captions of one picture; keep one"


def _read(path: str, lines: bool) -> Sidecar:
    try:
        content = read_bytes(path, MAX_CAPTION_BYTES)
    except UserError as error:
        return Sidecar((), str(error).removeprefix(f"{path}: "))
    if path.lower().endswith(JSON):
        return json_sidecar(content)
    return Sidecar(*captions_in(content, lines))


def json_sidecar(content: bytes) -> Sidecar:
    """The captions of one picture in a JSON object, under any of `KEYS`; none if it has no key.

    Examples:
      >>> json_sidecar(b'{"caption": "a [V] dog", "tags": ["grass", "sun"]}').captions
      ('a [V] dog, grass, sun',)
    """
    if len(content) > MAX_CAPTION_BYTES:
        return Sidecar((), TOO_LARGE)
    try:
        record = parse_json(content, "is not JSON", "correct it")
    except UserError as error:
        return Sidecar((), str(error))
    if not isinstance(record, dict):
        return Sidecar((), f"is {kind_of(record)}; it must be one JSON object")
    found: dict[str, tuple[str, ...]] = {}
    for key in (*KEYS, TAGS):
        texts = _texts(record, key)
        if texts is None:
            return Sidecar((), f"{key!r} must be text, or a list of texts")
        if texts:
            found[key] = texts
    tags = ", ".join(found.pop(TAGS, ()))
    if len(set(found.values())) > 1:
        return Sidecar((), f"{listing(map(repr, found))} hold different captions; {_BOTH}")
    captions = next(iter(found.values()), ())
    if tags:  # as kohya's programs join them
        captions = tuple(f"{caption}, {tags}" for caption in captions) or (tags,)
    if any("\0" in caption for caption in captions):
        return Sidecar((), "holds NUL characters; correct the text")
    return Sidecar(captions)


def _texts(record: Mapping, key: str) -> tuple[str, ...] | None:
    """The texts under a key that are not blank; None if there is something else."""
    value = record.get(key)
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        return None
    return tuple(text.strip() for text in texts if text.strip())
