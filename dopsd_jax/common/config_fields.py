"""A field of a configuration, declared once: its values, and the settings that it belongs to."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from dopsd_jax.common.atomic import path_fault
from dopsd_jax.common.errors import is_utf8

# Whether a field may differ when a run is continued: always, if --allow_changes names it, or never.
ALWAYS, ON_REQUEST, NEVER = "always", "on request", "never"
MAX_NUMBER = 1e9  # the largest magnitude of a number in a list


NUMBERS = ("int", "float", "int or list")  # kinds of fields with bounds


class _Positive(tuple):
    """As the values in `Field.when`: every number above 0."""

    def __contains__(self, value: object) -> bool:
        return type(value) in (int, float) and value > 0


POSITIVE = _Positive(("above 0",))


class _True(tuple):
    """As the values in `Field.when`: only true."""

    def __contains__(self, value: object) -> bool:
        return value is True


TRUE = _True(("true",))


class _Given(tuple):
    """As the values in `Field.when`: every text and list that is not empty."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str | list | tuple) and bool(as_list(value))


GIVEN = _Given(("not empty",))


class _Unset(tuple):
    """As the values in `Field.when`: only an empty text or list."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str | list | tuple) and not as_list(value)


UNSET = _Unset(("empty",))


class Naming(tuple):
    """As the values in `Field.when`: a list that has one of these."""

    def __contains__(self, value: object) -> bool:
        listed = as_list(value) if isinstance(value, str | list | tuple) else ()
        return any(item in listed for item in self)


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field.

    name: dotted, such as `lora.rank`. kind: int, float, bool, str, list, `name or list`, `int or
    list`, `path`, or `paths or store` (several, gs://); if not given, the type of the default. low,
    high: bounds of a number, included; above: excluded. unit: of a number. choices: what a name may
    be. listed: what the items of a list may be. when: values that other fields must have so that
    this one has an effect. change: whether it may differ when a run is continued. asked_with:
    values of other fields with which that is on request, although `change` is always.
    """

    name: str
    default: Any
    help: str
    kind: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    unit: str = ""
    choices: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    when: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    change: str = ON_REQUEST
    asked_with: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.kind:
            object.__setattr__(self, "kind", type(self.default).__name__)
        low = self.low if self.above is None else self.above
        if self.kind in NUMBERS and (low is None or self.high is None):
            raise TypeError(f"{self.name}: a number needs a lower and an upper bound")

    def change_in(self, given: Mapping[str, Any]) -> str:
        """`change` of a run with these values of the fields."""
        asked = any(given.get(name) in values for name, values in self.asked_with.items())
        return ON_REQUEST if asked and self.change == ALWAYS else self.change

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, as a message goes on after it; None: nothing."""
        kinds = {
            "int": type(value) is int,
            "float": type(value) in (int, float),
            "int or list": type(value) is int
            or (
                isinstance(value, list | tuple)
                and len(value) > 0
                and all(type(one) is int for one in value)
            ),
            "bool": type(value) is bool,
            "str": isinstance(value, str),
            "path": isinstance(value, str),
            "paths or store": isinstance(value, str)
            or (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)),
            "list": isinstance(value, str | list | tuple),
            "name or list": isinstance(value, str | list | tuple) and len(value) > 0,
        }
        if not kinds[self.kind]:
            return f"must be of kind {self.kind}"
        if self.kind in ("int", "float"):
            return self._number_fault(value)
        if self.kind == "int or list":
            numbers = as_numbers(value)
            twice = "names a number twice" if len({*numbers}) < len(numbers) else None
            return next(filter(None, map(self._number_fault, numbers)), twice)
        if isinstance(value, str) and "\0" in value:
            return "must not contain a null character"
        if self.kind in ("path", "paths or store"):
            stores = self.kind != "path"
            faults = (path_fault(path, stores=stores) for path in as_paths(value))
            return next(filter(None, faults), None)
        texts = value if isinstance(value, list | tuple) else [value]
        if not all(is_utf8(text) for text in texts if isinstance(text, str)):
            return "is not text in UTF-8; write it again"
        if self.choices and value not in self.choices:
            return f"is not one of {', '.join(self.choices)}"
        return None if self.kind in ("bool", "str") else self._list_fault(value)

    def _number_fault(self, value: float) -> str | None:
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if self.low is not None and value < self.low:
            return f"must be at least {self.low}"
        if self.above is not None and not value > self.above:
            return f"must be above {self.above}"
        return f"must be at most {self.high}" if value > self.high else None

    def _list_fault(self, value: str | list | tuple) -> str | None:
        for item in name_or_list(value) if self.kind == "name or list" else as_list(value):
            number = type(item) in (int, float)
            if number and not abs(item) <= MAX_NUMBER:  # NaN is not either
                return f"must have numbers from -{MAX_NUMBER:g} to {MAX_NUMBER:g} only"
            sizes = item if isinstance(item, list | tuple) else ()
            pair = len(sizes) == 2 and all(type(x) is int and abs(x) <= MAX_NUMBER for x in sizes)
            if not (number or isinstance(item, str) or pair):
                return f"must be a list of names or numbers, and {shown(item)} is neither"
        return None

    def parse(self, text: str) -> Any:
        """The value that a command line gives. Raises `ValueError` with what it must be."""
        if self.kind == "bool":
            if text.lower() not in _TRUTH:
                raise ValueError("must be true or false")
            return _TRUTH[text.lower()]
        if self.kind in ("int", "float"):
            try:
                return int(text) if self.kind == "int" else float(text)
            except ValueError:
                what = "a whole number" if self.kind == "int" else "a number"
                raise ValueError(f"must be {what}") from None
        if self.kind == "int or list":
            try:
                numbers = tuple(int(item) for item in as_list(text))
            except ValueError:
                raise ValueError("must be a whole number, or several with commas") from None
            return numbers[0] if len(numbers) == 1 else numbers
        return text


def as_option(value: Any) -> str:
    """A value as a command line gives it.

    Examples:
      >>> as_option(False), as_option((512, 768)), as_option([[832, 1248], "1024x1024"])
      ('false', '512,768', '832x1248,1024x1024')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, list | tuple):
        return str(value)
    return ",".join("x".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in value)


def shown(value: Any) -> str:
    """A value in a message: as a command line gives it, texts in quotes; else as Python writes it.

    Examples:
      >>> shown("nodes4"), shown((1, 0.5)), shown([]), shown([None])
      ("'nodes4'", '1,0.5', "''", '[None]')
    """
    try:
        return as_option(value) if _is_option(value) else repr("" if value in ([], ()) else value)
    except ValueError:  # whole numbers of thousands of digits have no text in Python
        return "a value with a number of thousands of digits"


def _is_option(value: Any) -> bool:
    """Whether it is true, false, or a list that is not empty, of texts, numbers and sizes."""
    if not isinstance(value, list | tuple):
        return isinstance(value, bool)
    is_size = lambda one: isinstance(one, list | tuple) and [*map(type, one)] == [int, int]
    return bool(value) and all(type(one) in (str, int, float) or is_size(one) for one in value)


def name_or_list(value: str | list | tuple) -> str | tuple:
    """A field that is a name or a list: `1, 0.9` on the command line means the list.

    Examples:
      >>> name_or_list("nodes4"), name_or_list("1, 0.9")
      ('nodes4', (1, 0.9))
    """
    if not isinstance(value, str):
        return tuple(value)
    items = as_list(value)
    numbers = tuple(_number(item) for item in items)
    if items and None not in numbers:
        return numbers
    return items if "," in value else value


def as_list(value: str | list | tuple) -> tuple:
    """A field that is a list, or one string with commas between the items."""
    if not isinstance(value, str):
        return tuple(value)
    text = value.strip()
    if text[:1] + text[-1:] in ("()", "[]") and not any(c in "()[]" for c in text[1:-1]):
        text = text[1:-1]  # as Python writes a list; the brackets of "[V] dog, (red)" are its own
    return tuple(item.strip() for item in text.split(",") if item.strip())


def as_numbers(value: int | list | tuple) -> tuple[int, ...]:
    """A field that is a whole number, or a list of them."""
    return (value,) if isinstance(value, int) else tuple(value)


def highest(value: int | list | tuple) -> int:
    """The largest number of such a field."""
    return max(as_numbers(value))


def as_paths(value: str | list | tuple) -> tuple[str, ...]:
    """A field of one path or several; a string with commas is a list unless it is a path itself."""
    if isinstance(value, str) and ("," not in value or os.path.exists(os.path.expanduser(value))):
        return (value,)
    items = value.split(",") if isinstance(value, str) else value
    return tuple(item.strip() for item in items if item.strip())


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None
