"""Reading the fields of a configuration file, gathering every fault before reporting."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dopsd_jax.common.errors import raise_if


class Fields:
    """The fields of one JSON object.

    Every reader returns the value, or zero or nothing after noting a problem; `finish` raises one
    `UserError` with all problems noted. `where` names the file (and the object in it).
    """

    def __init__(self, json_dict: Any, where: str):
        self.where = where
        self.problems: list[str] = []
        self.json = json_dict if isinstance(json_dict, Mapping) else {}
        if not isinstance(json_dict, Mapping):
            self.problem(f"holds {type(json_dict).__name__}, not a JSON object")

    def problem(self, text: str) -> None:
        """Notes a fault of this file."""
        self.problems.append(f"{self.where}: {text}")

    def finish(self) -> None:
        """Raises `UserError` if anything was wrong."""
        raise_if(self.problems)

    def require(self, name: str, kind: str) -> Any:
        """The value as it is, or None after noting that it is missing."""
        if self.json.get(name) is None:
            self.problem(f"field {name} is missing; it must be {kind}")
            return None
        return self.json[name]

    def count(self, name: str) -> int:
        """A positive whole number."""
        value = self.require(name, "a positive whole number")
        if value is not None and not _is_count(value):
            self.problem(f"field {name} is {value!r}; it must be a positive whole number")
        return value if _is_count(value) else 0

    def counts(self, name: str, length: int | None = None, least: int = 1) -> tuple[int, ...]:
        """A list of whole numbers, none below `least`."""
        kind = f"a list of {'' if length is None else f'{length} '}whole numbers from {least}"
        value = self.require(name, kind)
        good = (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and all(_is_count(v, least) for v in value)
            and length in (None, len(value))
        )
        if value is not None and not good:
            self.problem(f"field {name} is {value!r}; it must be {kind}")
        return tuple(value) if good else ()

    def positive(self, name: str) -> float:
        """A number above zero."""
        value = self.require(name, "a positive number")
        good = _is_number(value) and value > 0
        if value is not None and not good:
            self.problem(f"field {name} is {value!r}; it must be a positive number")
        return float(value) if good else 0.0

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers."""
        kind = f"a list of {length} numbers"
        value = self.require(name, kind)
        good = isinstance(value, list) and len(value) == length and all(map(_is_number, value))
        if value is not None and not good:
            self.problem(f"field {name} is {value!r}; it must be {kind}")
        return tuple(map(float, value)) if good else ()

    def only(self, name: str, *allowed: Any, required: bool = False) -> None:
        """Notes a problem unless the field has one of the supported values (or is absent)."""
        if name not in self.json and not required:
            return
        value = self.json.get(name)
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            wanted = " or ".join(repr(a) for a in allowed)
            self.problem(f"field {name} is {value!r}; only {wanted} is supported")

    def part(self, name: str) -> "Fields":
        """An object inside this one; its problems are noted here."""
        value = self.require(name, "a JSON object")
        if value is not None and not isinstance(value, Mapping):
            self.problem(f"field {name} is {value!r}; it must be a JSON object")
        inner = Fields(value if isinstance(value, Mapping) else {}, f"{self.where}: {name}")
        inner.problems = self.problems
        return inner


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
