"""A compiled program as text: what its lines do, and how often they run."""

import math
import re
from collections import Counter
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?\W+n"?\W+(\d+)')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# What passes an array on and reads none of it.
_PASSED = ("tuple", "while", "call", "conditional", "bitcast", "get-tuple-element", "parameter")


class Line(NamedTuple):
    """An operation. result: its type. rest: from the opening parenthesis on."""

    name: str
    result: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])


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


def runs(program: Program) -> Counter[str]:
    """How often each computation runs; a loop of unknown length counts once."""
    found: Counter[str] = Counter()

    def add(name: str, times: int) -> None:
        found[name] += times
        for line in program.bodies[name]:
            for callee, trips in callees(line, program):
                add(callee, times * (trips or 1))

    add(program.entry, 1)
    return found


def product_flops(program: Program) -> int:
    """FLOP of all matrix products that run."""
    total, often = 0, runs(program)
    for name, lines in program.bodies.items():
        results = {line.name: line.result for line in lines}
        for line in lines:
            if line.operation == "dot":
                axes = filter(None, _CONTRACTED.search(line.rest)[1].split(","))
                left = arrays(results[line.operands[0]])[0][1]
                depth = math.prod(left[int(axis)] for axis in axes)
                total += 2 * depth * math.prod(arrays(line.result)[0][1]) * often[name]
    return total


def reads(program: Program, shape: tuple[int, ...]) -> float:
    """How often an array of this shape, a stack of layers, is read as a whole.

    A slice of one layer counts for that layer's share. All arrays of the shape count.
    """
    often, total = runs(program), 0.0

    def read_by(line: Line, results: dict[str, str]) -> float:
        found = 0.0
        for place, operand in enumerate(line.operands):
            if line.operation in _PASSED or not _is(results.get(operand, ""), shape):
                continue
            if line.operation == "fusion":
                inner = program.bodies[callees(line, program)[0][0]]
                found += _parameter_reads(inner, place, shape)
            else:
                found += _share(line, shape)
        return found

    fused = {
        name
        for lines in program.bodies.values()
        for line in lines
        if line.operation == "fusion"
        for name, _ in callees(line, program)
    }
    for name, lines in program.bodies.items():
        if name not in fused:
            results = {line.name: line.result for line in lines}
            total += often[name] * sum(read_by(line, results) for line in lines)
    return total


def _parameter_reads(lines: list[Line], place: int, shape: tuple[int, ...]) -> float:
    """What a fused computation reads of its parameter number `place`."""
    own = [x.name for x in lines if x.operation == "parameter" and x.rest.startswith(f"{place})")]
    return sum(_share(line, shape) for line in lines if own[0] in line.operands)


def _share(line: Line, shape: tuple[int, ...]) -> float:
    size = math.prod(arrays(line.result)[0][1])
    return size / math.prod(shape) if line.operation == "dynamic-slice" else 1.0


def _is(result: str, shape: tuple[int, ...]) -> bool:
    return not result.startswith("(") and arrays(result)[0][1] == shape
