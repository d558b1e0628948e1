"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # the others end in their width
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?\W+n"?\W+(\d+)')


class Traffic(NamedTuple):
    """How often a kind of collective runs in one execution, and the bytes of its results."""

    count: int
    bytes: int


class Collectives(NamedTuple):
    """By kind, with a loop's body counted as often as it runs.

    unknown_loops: loops around collectives whose length the text does not tell, counted once.
    """

    traffic: dict[str, Traffic]
    unknown_loops: int


def collectives(text: str) -> Collectives:
    """The collectives of one device, from `compiled.as_text()`."""
    entry, bodies = _computations(text)
    totals: dict[str, tuple[dict[str, Traffic], int]] = {}

    def total(name: str) -> tuple[dict[str, Traffic], int]:
        if name in totals:
            return totals[name]
        found: dict[str, Traffic] = {}
        unknown = 0
        for result, operation, rest in bodies[name]:
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                _count(found, {kind: Traffic(1, _bytes(result, operation))}, 1)
            for callee, trips in _callees(operation, rest, bodies):
                inner, inner_unknown = total(callee)
                unknown += inner_unknown + (trips is None and bool(inner))
                _count(found, inner, trips or 1)
        totals[name] = found, unknown
        return totals[name]

    return Collectives(*total(entry))


def _computations(text: str) -> tuple[str, dict[str, list[tuple[str, str, str]]]]:
    """The entry's name; by computation: result type, operation and the rest of each line."""
    entry, bodies, current = "", {}, []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif operation := _OPERATION.match(line):
            current.append(operation.groups())
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no entry")
    return entry, bodies


def _callees(operation: str, rest: str, bodies) -> list[tuple[str, int | None]]:
    """What a line runs, and how often; None: not told."""
    if operation.endswith(("-done", "-update")):
        return []
    if operation == "while":
        condition, body = _LOOP.search(rest).groups()
        known = _TRIPS.search(rest)
        return [(body, int(known[1]) if known else _limit(condition, bodies))]
    branches = _BRANCHES.search(rest)
    names = _CALLED.findall(rest) + (re.findall(r"[\w.-]+", branches[1]) if branches else [])
    return [(name, 1) for name in names if name in bodies]


def _limit(condition: str, bodies) -> int | None:
    """The constant that a scan's counter, from 0, is compared with."""
    limits = [
        int(rest.partition(")")[0])
        for result, operation, rest in bodies[condition]
        if operation == "constant" and result.startswith("s32[]")
    ]
    less = any("direction=LT" in rest for _, _, rest in bodies[condition])
    return limits[0] if less and len(limits) == 1 else None


def _bytes(result: str, operation: str) -> int:
    arrays = [a for a in _ARRAY.findall(result) if a not in (("u32", ""), ("s32", ""))]
    if operation.endswith("-start") and not operation.startswith("all-reduce"):
        arrays = arrays[len(arrays) // 2 :]  # operands stand before results
    return sum(_size(kind) * math.prod(map(int, filter(None, d.split(",")))) for kind, d in arrays)


def _size(kind: str) -> int:
    width = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
    return max(width // 8, 1)


def _count(total: dict[str, Traffic], more: dict[str, Traffic], times: int) -> None:
    for kind, traffic in more.items():
        old = total.get(kind, Traffic(0, 0))
        total[kind] = Traffic(old.count + times * traffic.count, old.bytes + times * traffic.bytes)
