"""A compiled program as text: what its lines do, and how often they run."""

import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?\W+n"?\W+(\d+)')


class Line(NamedTuple):
    """An operation. result: its type. rest: from the opening parenthesis on."""

    name: str
    result: str
    operation: str
    rest: str


class Program(NamedTuple):
    """entry: name of the computation that runs; bodies: of each computation its lines."""

    entry: str
    bodies: dict[str, list[Line]]


def read(text: str) -> Program:
    """The program of `compiled.as_text()`. Raises `ValueError` for another text."""
    entry, bodies, current = "", {}, []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif operation := _OPERATION.match(line):
            current.append(Line(*operation.groups()))
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no entry")
    return Program(entry, bodies)


def callees(line: Line, program: Program) -> list[tuple[str, int | None]]:
    """What a line runs, and how often; None: not told."""
    if line.operation.endswith(("-done", "-update")):
        return []
    if line.operation == "while":
        condition, body = _LOOP.search(line.rest).groups()
        known = _TRIPS.search(line.rest)
        return [(body, int(known[1]) if known else _limit(program.bodies[condition]))]
    branches = _BRANCHES.search(line.rest)
    names = _CALLED.findall(line.rest)
    names += re.findall(r"[\w.-]+", branches[1]) if branches else []
    return [(name, 1) for name in names if name in program.bodies]


def _limit(condition: list[Line]) -> int | None:
    """The constant that a scan's counter, from 0, is compared with."""
    limits = [
        int(line.rest.partition(")")[0])
        for line in condition
        if line.operation == "constant" and line.result.startswith("s32[]")
    ]
    less = any("direction=LT" in line.rest for line in condition)
    return limits[0] if less and len(limits) == 1 else None


def arrays(result: str) -> list[tuple[str, tuple[int, ...]]]:
    """Types and shapes of the arrays of a result."""
    found = _ARRAY.findall(result)
    return [(kind, tuple(map(int, filter(None, dims.split(","))))) for kind, dims in found]
