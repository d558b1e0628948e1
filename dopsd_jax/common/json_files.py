"""Reads JSON of other programs: strictly, with limits; every fault is one line.

Python's own reader accepts more than JSON: NaN, repeated names, numbers that overflow, nesting up
to the limit of the stack. All of these are refused here.
"""

import functools
import itertools
import json
import math
import os
from typing import Any

from dopsd_jax.common.errors import UserError, is_utf8
from dopsd_jax.common.file_kinds import kind_of
from dopsd_jax.common.files import MAX_TEXT, read_bytes

MAX_DEPTH = 64
MAX_DIGITS = 40  # of a whole number
DOWNLOAD = "download it again"


def read_json(
    path: str | os.PathLike,
    *,
    limit: int = MAX_TEXT,
    again: str = DOWNLOAD,
    missing: str = "download the whole model folder",
    finite: bool = True,
) -> tuple[Any, str]:
    """Content and text of a JSON file of at most `limit` bytes. Raises `UserError`.

    `again` says how to get a good file, `missing` what to do when it is not there. `finite` False:
    NaN and infinity are left to the caller, which checks every number.
    """
    content = read_bytes(path, limit, missing)
    return parse_json(content, str(path), again, finite), content.decode("utf-8-sig")


def parse_json(content: str | bytes, where: str, again: str = DOWNLOAD, finite: bool = True) -> Any:
    """The value of JSON text. Raises `UserError`, which begins with `where` and ends with `again`.

    Bytes are UTF-8, with or without a byte order mark. With `finite` False a whole number of too
    many digits is infinity.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        found = _decoder(finite).decode(text)
        _check(found, finite)
        return found
    except _Refused as error:
        raise UserError(f"{where}: {error}; {again}") from None
    except (ValueError, RecursionError) as error:
        kind = kind_of(content) if isinstance(content, bytes) else None
        raise UserError(f"{where}: {kind or f'not valid JSON ({error}); {again}'}") from None


class _Refused(ValueError):
    """JSON by the grammar, but nothing that can be meant."""


@functools.cache
def _decoder(finite: bool) -> json.JSONDecoder:
    """Made once: to make one takes as long as to read the line of a table."""
    number = functools.partial(_whole_number, finite=finite)
    return json.JSONDecoder(object_pairs_hook=_unique_pairs, parse_int=number)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = {name for name, _ in pairs if name in seen or seen.add(name)}
        raise _Refused(f"names {', '.join(map(repr, sorted(twice)[:3]))} twice")
    return table


def _whole_number(text: str, finite: bool) -> int | float:
    if len(text) > MAX_DIGITS:
        if not finite:
            return math.inf
        raise _Refused(f"holds a number of {len(text)} digits")
    return int(text)


def _check(content: Any, finite: bool) -> None:
    """Raises `_Refused` for what is too deep, not finite or not writable as text."""
    # One iterator a level: a list of all that is inside would take more memory than the content.
    levels = [iter([("the top", content)])]
    while levels:
        for name, value in levels[-1]:
            if isinstance(value, str):
                if not (value.isascii() or is_utf8(value)):
                    raise _Refused(f"{value[:60]!a} holds half a character")
            elif isinstance(value, dict | list):
                if not value:
                    continue
                if len(levels) > MAX_DEPTH:
                    raise _Refused("not valid JSON (nested too deeply)")
                if isinstance(value, dict):
                    if not ((names := "".join(value)).isascii() or is_utf8(names)):
                        raise _Refused(f"{names[:60]!a} holds half a character")
                    levels.append(iter(value.items()))
                else:
                    levels.append(zip(itertools.repeat(name), value, strict=False))
                break
            elif finite and isinstance(value, float) and not math.isfinite(value):
                raise _Refused(f"field {name} is {value}, not a finite number")
        else:
            levels.pop()
