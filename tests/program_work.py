"""What a compiled program does: how often its parts run, their products, and what they read."""

import math
import re
from collections import Counter

from dopsd_jax.estimation import program_text
from dopsd_jax.estimation.program_text import Line, Program

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# What passes an array on and reads none of it.
_PASSED = ("tuple", "while", "call", "conditional", "bitcast", "get-tuple-element", "parameter")


def runs(program: Program) -> Counter[str]:
    """How often each computation runs; a loop of unknown length counts once."""
    found: Counter[str] = Counter()

    def add(name: str, times: int) -> None:
        found[name] += times
        for line in program.bodies[name]:
            for callee, trips in program_text.callees(line, program):
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
                left = program_text.arrays(results[_operands(line)[0]])[0][1]
                depth = math.prod(left[int(axis)] for axis in axes)
                total += 2 * depth * math.prod(program_text.arrays(line.result)[0][1]) * often[name]
    return total


def reads(program: Program, shape: tuple[int, ...]) -> float:
    """How often an array of this shape, a stack of layers, is read as a whole.

    A slice of one layer counts for that layer's share. All arrays of the shape count.
    """
    often, total = runs(program), 0.0

    def read_by(line: Line, results: dict[str, str]) -> float:
        found = 0.0
        for place, operand in enumerate(_operands(line)):
            if line.operation in _PASSED or not _is(results.get(operand, ""), shape):
                continue
            if line.operation == "fusion":
                inner = program.bodies[program_text.callees(line, program)[0][0]]
                found += _parameter_reads(inner, place, shape)
            else:
                found += _share(line, shape)
        return found

    fused = {
        name
        for lines in program.bodies.values()
        for line in lines
        if line.operation == "fusion"
        for name, _ in program_text.callees(line, program)
    }
    for name, lines in program.bodies.items():
        if name not in fused:
            results = {line.name: line.result for line in lines}
            total += often[name] * sum(read_by(line, results) for line in lines)
    return total


def _operands(line: Line) -> list[str]:
    """The names of its operands."""
    return re.findall(r"%([\w.-]+)", line.rest.partition(")")[0])


def _parameter_reads(lines: list[Line], place: int, shape: tuple[int, ...]) -> float:
    """What a fused computation reads of its parameter number `place`."""
    own = [x.name for x in lines if x.operation == "parameter" and x.rest.startswith(f"{place})")]
    return sum(_share(line, shape) for line in lines if own[0] in _operands(line))


def _share(line: Line, shape: tuple[int, ...]) -> float:
    size = math.prod(program_text.arrays(line.result)[0][1])
    return size / math.prod(shape) if line.operation == "dynamic-slice" else 1.0


def _is(result: str, shape: tuple[int, ...]) -> bool:
    return not result.startswith("(") and program_text.arrays(result)[0][1] == shape
