"""Captions: under which names they are known, and what may stand in them."""

import re
from collections.abc import Iterable, Mapping

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import BOM, decode
from dopsd_jax.common.json_fields import kind_of
from dopsd_jax.common.json_files import parse_json

UPSTREAM_KEYS = tuple(
    f"{length}_{language}"
    for language in ("en", "zh")
    for length in ("short", "medium", "detailed", "user_prompt")
)
CONCEPT = "concept"  # the column that says which rows show the same
CAPTION_KEY = "caption"  # of a caption that has no name of its own
KNOWN_KEYS = (*UPSTREAM_KEYS, CAPTION_KEY, "prompt", "text")
MAX_CAPTION_BYTES = 1 << 20
_LINE_END = re.compile(r"\r\n?|\n")  # str.splitlines() also cuts at characters within a line
NUL = "holds NUL characters; save it as UTF-8 text"
TOO_LARGE = "is larger than 1 MiB; this is not a caption"


def captions_in(content: bytes, lines: bool) -> tuple[tuple[str, ...], str | None]:
    """The captions in the content of a caption file, or what is wrong.

    `lines`: each line that is not blank is an alternative.

    Examples:
      >>> captions_in(b"a [V] dog\\na [V] dog on a sofa\\n", lines=True)
      (('a [V] dog', 'a [V] dog on a sofa'), None)
      >>> captions_in(b"  ", lines=False)
      ((), 'is empty; write a caption')
    """
    if len(content) > MAX_CAPTION_BYTES:
        return (), TOO_LARGE
    try:
        text = content.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        return (), not_utf8(error)
    if "\0" in text:
        return (), NUL
    whole = [text.strip()] if text.strip() else []
    captions = tuple([line for _, line in lines_in(text)] if lines else whole)
    return captions, None if captions else "is empty; write a caption"


def lines_in(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    lines = enumerate(_LINE_END.split(text), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def prompts_in(content: bytes, where: str) -> list[tuple[int, str]]:
    """The lines of a file of prompts, as `lines_in`. Raises `UserError` naming `where`."""
    text = decode(content, where)
    if "\0" in text:
        raise UserError(f"{where}: {NUL}")
    lines = lines_in(text)
    if not lines:
        raise UserError(f"{where}: is empty; write a prompt in each line")
    return lines


def captions_of(record: Mapping, keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The captions of a record under `keys`, empty ones included, and what is wrong with them."""
    texts, faults = {}, []
    for key in filter(record.__contains__, keys):
        text = record[key]
        if text is None:
            continue
        if not isinstance(text, str):
            faults.append(f"{key!r} is {kind_of(text)}; a caption must be a string")
            continue
        texts[key] = text
        if len(text) > MAX_CAPTION_BYTES:
            faults.append(f"{key!r} {TOO_LARGE}")
        elif "\0" in text:
            faults.append(f"{key!r} holds NUL characters; correct the text")
    return texts, faults


def concept_of(record: Mapping) -> tuple[dict[str, str], str | None]:
    """The row's concept under its key, nothing if there is none, and what is wrong with it."""
    value = record.get(CONCEPT)
    if type(value) is float and value.is_integer():  # as pandas writes a whole number beside gaps
        value = int(value)
    if value is None or type(value) in (str, int):
        return ({} if value is None else {CONCEPT: str(value)}), None
    return {}, (
        f"{CONCEPT!r} is {kind_of(value)}; it says which rows show the same, as text or a whole "
        "number: rename a field that means something else"
    )


def json_captions(content: bytes) -> tuple[dict[str, str], str | None]:
    """Every field of a JSON record that is text, or what is wrong.

    The caller, which knows the requested keys, decides which of them are captions.
    """
    try:
        record = parse_json(content, "is not JSON", "correct it")
    except UserError as error:
        return {}, str(error)
    if not isinstance(record, dict):
        return {}, f"is {kind_of(record)}; it must be one JSON object"
    keys = [k for k, v in record.items() if isinstance(v, str) or k in KNOWN_KEYS]
    texts, faults = captions_of(record, [key for key in keys if key != CONCEPT])
    concept, fault = concept_of(record)
    return texts | concept, "; ".join([*faults, *[fault] * bool(fault)]) or None


def not_utf8(error: UnicodeDecodeError) -> str:
    """What to tell about bytes that are not UTF-8."""
    wide = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
    what = "looks like UTF-16" if wide else f"byte 0x{error.object[error.start]:02x}"
    return f"not UTF-8 text ({what}); save it as UTF-8"
