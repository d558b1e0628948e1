"""What a compiled program sends between devices, read from its text."""

import math
import re
from collections.abc import Collection
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
# A TPU's reduce-scatter: a fusion of an all-reduce, which is never done whole, and a slice of it.
_SCATTER = re.compile(r"calls=%?all-reduce-scatter")
# A TPU's collective that runs beside other work: it is named once for every step of that work.
_CHAINED = re.compile(r'channel_id=(\d+),.*chain_id="(\d+)"')
_LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?\W+n"?\W+(\d+)')


class Traffic(NamedTuple):
    """How often a kind of collective runs in one execution, and the bytes of its results."""

    count: int
    bytes: int


class Carried(NamedTuple):
    """An array that a kind of collective results in."""

    kind: str
    dtype: str
    shape: tuple[int, ...]


class Collectives(NamedTuple):
    """By kind, with a loop's body counted as often as it runs.

    unknown_loops: loops around collectives whose length the text does not tell, counted once.
    arrays: the same traffic by what it consists of; a collective of two arrays counts for each.
    """

    traffic: dict[str, Traffic]
    unknown_loops: int
    arrays: dict[Carried, Traffic]


def collectives(text: str) -> Collectives:
    """The collectives of one device, from `compiled.as_text()`."""
    entry, bodies = _computations(text)
    totals: dict[str, tuple[dict, int]] = {}

    def total(name: str) -> tuple[dict, int]:
        if name in totals:
            return totals[name]
        found: dict[str | Carried, Traffic] = {}
        unknown = 0
        for result, operation, rest in bodies[name]:
            kind = operation.removesuffix("-start")
            if operation == "fusion" and _SCATTER.search(rest):
                kind = "reduce-scatter"
            if kind in KINDS:
                arrays = _arrays(result, operation)
                _count(found, {kind: Traffic(1, sum(map(_bytes, arrays)))}, 1)
                for array in arrays:
                    _count(found, {Carried(kind, *array): Traffic(1, _bytes(array))}, 1)
                continue
            for callee, trips in _callees(operation, rest, bodies):
                inner, inner_unknown = total(callee)
                unknown += inner_unknown + (trips is None and bool(inner))
                _count(found, inner, trips or 1)
        totals[name] = found, unknown
        return totals[name]

    found, unknown = total(entry)
    traffic = {key: value for key, value in found.items() if isinstance(key, str)}
    arrays = {key: value for key, value in found.items() if isinstance(key, Carried)}
    return Collectives(traffic, unknown, arrays)


def activations(
    sent: Collectives, tokens: Collection[int], parameters: Collection[int]
) -> dict[str, Traffic]:
    """The traffic, by kind, of arrays with an axis of tokens.

    `tokens`: lengths of rows of tokens, whole or as they are split. `parameters`: sizes of
    parameters, which are no activations even if such an axis is a width too.
    """
    found: dict[str, Traffic] = {}
    for array, traffic in sent.arrays.items():
        if set(tokens) & set(array.shape) and math.prod(array.shape) not in parameters:
            _count(found, {array.kind: traffic}, 1)
    return found


def _computations(text: str) -> tuple[str, dict[str, list[tuple[str, str, str]]]]:
    """The entry's name; by computation: result type, operation and the rest of each line."""
    entry, bodies, current, chained = "", {}, [], set()
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif operation := _OPERATION.match(line):
            if chain := _CHAINED.search(line):
                if chain.groups() in chained:
                    continue
                chained.add(chain.groups())
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


def _arrays(result: str, operation: str) -> list[tuple[str, tuple[int, ...]]]:
    """Types and shapes of what an operation results in, without its counters."""
    found = [a for a in _ARRAY.findall(result) if a not in (("u32", ""), ("s32", ""))]
    if operation.endswith("-start") and not operation.startswith("all-reduce"):
        found = found[len(found) // 2 :]  # operands stand before results
    return [(kind, tuple(map(int, filter(None, dims.split(","))))) for kind, dims in found]


def _bytes(array: tuple[str, tuple[int, ...]]) -> int:
    kind, shape = array
    width = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
    return max(width // 8, 1) * math.prod(shape)


def _count(total: dict, more: dict, times: int) -> None:
    for key, traffic in more.items():
        old = total.get(key, Traffic(0, 0))
        total[key] = Traffic(old.count + times * traffic.count, old.bytes + times * traffic.bytes)
