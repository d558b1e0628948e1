"""What a compiled program sends between devices, read from its text."""

import math
import re
from collections.abc import Collection
from typing import NamedTuple

from dopsd_jax.estimation import program_text

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # the others end in their width
# A TPU's reduce-scatter: a fusion of an all-reduce, which is never done whole, and a slice of it.
_SCATTER = re.compile(r"calls=%?all-reduce-scatter")
# A TPU's collective that runs beside other work: it is named once for every step of that work.
_CHAINED = re.compile(r'channel_id=(\d+),.*chain_id="(\d+)"')


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
    program = _chains_once(program_text.read(text))
    totals: dict[str, tuple[dict, int]] = {}

    def total(name: str) -> tuple[dict, int]:
        if name in totals:
            return totals[name]
        found: dict[str | Carried, Traffic] = {}
        unknown = 0
        for line in program.bodies[name]:
            kind = line.operation.removesuffix("-start")
            if line.operation == "fusion" and _SCATTER.search(line.rest):
                kind = "reduce-scatter"
            if kind in KINDS:
                arrays = _arrays(line.result, line.operation)
                _count(found, {kind: Traffic(1, sum(map(_bytes, arrays)))}, 1)
                for array in arrays:
                    _count(found, {Carried(kind, *array): Traffic(1, _bytes(array))}, 1)
                continue
            for callee, trips in program_text.callees(line, program):
                inner, inner_unknown = total(callee)
                unknown += inner_unknown + (trips is None and bool(inner))
                _count(found, inner, trips or 1)
        totals[name] = found, unknown
        return totals[name]

    found, unknown = total(program.entry)
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


def _chains_once(program: program_text.Program) -> program_text.Program:
    """The program with the first line only of each collective that is named several times."""
    seen = set()

    def first(line: program_text.Line) -> bool:
        chain = _CHAINED.search(line.rest)
        known = chain is not None and chain.groups() in seen
        seen.update([chain.groups()] if chain else [])
        return not known

    return program._replace(bodies={k: list(filter(first, v)) for k, v in program.bodies.items()})


def _arrays(result: str, operation: str) -> list[tuple[str, tuple[int, ...]]]:
    """Types and shapes of what an operation results in, without its counters."""
    found = [a for a in program_text.arrays(result) if a not in (("u32", ()), ("s32", ()))]
    if operation.endswith("-start") and not operation.startswith("all-reduce"):
        return found[len(found) // 2 :]  # operands stand before results
    return found


def _bytes(array: tuple[str, tuple[int, ...]]) -> int:
    kind, shape = array
    width = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
    return max(width // 8, 1) * math.prod(shape)


def _count(total: dict, more: dict, times: int) -> None:
    for key, traffic in more.items():
        old = total.get(key, Traffic(0, 0))
        total[key] = Traffic(old.count + times * traffic.count, old.bytes + times * traffic.bytes)
