"""Reading the fields of a configuration file, gathering every fault before reporting."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from dopsd_jax.common.errors import raise_if

MOST = 2**31 - 1  # of any size
MAX_LAYERS = 1000  # each makes rows in a table of names, before any tensor is looked at
REQUIRED: Any = object()  # the default of a field that must be there


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
            self.problem(f"is {kind_of(json_dict)}, not a JSON object")

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

    def value(
        self, name: str, kind: str, good: Callable[[Any], bool], default: Any = REQUIRED
    ) -> Any:
        """The value if it is `good`; `kind` says in words what is.

        Without a `default` the field is required, and None is returned for a wrong one. With a
        default it may be missing or null, but not wrong.
        """
        found = self.json.get(name)
        if found is None and default is not REQUIRED:
            return default
        found = self.require(name, kind)
        if found is None:
            return None
        if not good(found):
            self.problem(f"field {name} is {in_json(found)}; it must be {kind}")
            return None if default is REQUIRED else default
        return found

    def text(self, name: str, default: Any = REQUIRED) -> str:
        """A string; "" where it is wrong."""
        return self.value(name, "a string", lambda v: isinstance(v, str), default) or ""

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """True or false; false where it is wrong."""
        return bool(self.value(name, "true or false", lambda v: isinstance(v, bool), default))

    def table(self, name: str, default: Any = REQUIRED) -> Mapping[str, Any]:
        """A JSON object; empty where it is wrong."""
        good = lambda v: isinstance(v, Mapping)
        return self.value(name, "a JSON object", good, default) or {}

    def count(self, name: str, most: int = MOST, default: Any = REQUIRED) -> int:
        """A whole number from 1 to `most`; 0 where it is wrong."""
        kind = "a positive whole number" + ("" if most == MOST else f" up to {most}")
        return self.value(name, kind, lambda v: _is_count(v, 1, most), default) or 0

    def counts(
        self, name: str, length: int | None = None, least: int = 1, most: int = MOST
    ) -> tuple[int, ...]:
        """A list of whole numbers, none below `least` or above `most`."""
        kind = f"a list of {'' if length is None else f'{length} '}whole numbers from {least}"
        kind += "" if most == MOST else f" to {most}"
        good = lambda v: (
            isinstance(v, list | tuple)
            and all(_is_count(x, least, most) for x in v)
            and length in (None, len(v))
        )
        return tuple(self.value(name, kind, good) or ())

    def positive(self, name: str, default: Any = REQUIRED) -> float:
        """A finite number above zero; 0 where it is wrong."""
        good = lambda v: is_number(v) and v > 0
        return float(self.value(name, "a positive number", good, default) or 0)

    def numbers(self, name: str, length: int, positive: bool = False) -> tuple[float, ...]:
        """A list of `length` finite numbers; `positive`: each above zero."""
        one = lambda v: is_number(v) and (v > 0 or not positive)
        good = lambda v: isinstance(v, list) and len(v) == length and all(map(one, v))
        kind = f"a list of {length} {'positive ' * positive}numbers"
        return tuple(map(float, self.value(name, kind, good) or ()))

    def only(self, name: str, *allowed: Any, required: bool = False) -> None:
        """Notes a problem unless the field has one of the supported values (or is absent)."""
        if name not in self.json and not required:
            return
        value = self.json.get(name)
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            wanted = " or ".join(map(in_json, allowed))
            self.problem(f"field {name} is {in_json(value)}; only {wanted} is supported")

    def part(self, name: str) -> "Fields":
        """An object inside this one; its problems are noted here."""
        inner = Fields(self.table(name), f"{self.where}: {name}")
        inner.problems = self.problems
        return inner


def in_json(value: Any) -> str:
    """A value of a JSON file in a message: as it stands there, but texts in Python's quotes.

    Examples:
      >>> in_json(None), in_json({"a": [True, "b"]}), in_json("b")
      ('null', '{"a": [true, "b"]}', "'b'")
    """
    if isinstance(value, str):
        return repr(value)
    return json.dumps(value, ensure_ascii=False, default=repr)


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; JSON's true and Python's NaN are not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e308  # also a whole number that no float holds


def _is_count(value: Any, least: int = 1, most: int = MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
