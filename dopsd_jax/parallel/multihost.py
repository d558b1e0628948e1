"""Many processes that run one program: how they agree, begin and end together."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dopsd_jax.common.config_fields import shown
from dopsd_jax.common.errors import UserError

T = TypeVar("T")


class SharedError(UserError):
    """A `UserError` that every process raises at the same place."""


def is_first() -> bool:
    """Whether this process writes what the run writes once."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def gather(value: Any) -> list[Any]:
    """The `value`, anything that JSON can hold, of every process, in order. All call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array([len(text)], np.int32)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = np.reshape(multihost_utils.process_allgather(padded), (len(sizes), -1))
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all processes run: a `UserError` in one of them is raised in every one.

    At its end they wait for each other, so all see the files that one wrote inside.
    """
    problems: list[str] = []
    try:
        yield
    except SharedError:
        raise
    except UserError as error:
        if jax.process_count() == 1:
            raise
        problems = list(error.problems)
    found = gather(problems)
    if any(found):
        # The same fault everywhere, such as a wrong field, is printed once.
        raise SharedError(*dict.fromkeys(problem for each in found for problem in each))


def need_same(values: Mapping[str, Any]) -> None:
    """Raises a `SharedError` with a line for each of `values` that is not the same everywhere."""
    first, *others = found = gather(dict(values))
    problems = []
    for name in dict.fromkeys(name for each in found for name in each):
        for index, other in enumerate(others, 1):
            if other.get(name) != first.get(name):
                own, theirs = shown(first.get(name)), shown(other.get(name))
                problems.append(
                    f"{name}: is {own} in process 0 and {theirs} in process {index}; start all "
                    "with the same command, on the same files"
                )
                break
    if problems:
        raise SharedError(*problems)


def first_alone(action: Callable[[], T]) -> T:
    """Runs `action()` in process 0 while the others wait, then in the others.

    For results that process 0 leaves for all, such as a cache in a shared folder.
    """
    with together():
        if is_first():
            result = action()
    with together():
        if not is_first():
            result = action()
    return result


def begin_together(jitted: Callable) -> Callable:
    """`jitted`, a function over the devices of all processes: all compile it before any starts it.

    A process that finishes compiling first would wait in its first collective operation, which ends
    with an error after 30 seconds (gloo) or 10 minutes (NCCL); compiling may take longer, and only
    some processes may find the program in a shared cache. All call it, with arrays of the same
    shapes; static arguments go by name.
    """
    compiled = set()

    def call(*args, **static):
        if jax.process_count() == 1:
            return jitted(*args, **static)
        leaves, tree = jax.tree.flatten(args)
        key = tree, tuple(map(jax.typeof, leaves)), tuple(sorted(static.items()))
        if key not in compiled:
            with together():
                jitted.lower(*args, **static).compile()  # the call below finds it
            compiled.add(key)
        # Not what was compiled itself: that refuses 4-bit arrays that lie on a mesh (jax 0.10.2).
        return jitted(*args, **static)

    return call


def to_host(array: jax.Array) -> np.ndarray:
    """A whole array, which may be split over the devices of several processes. All call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def leave(status: int, line: str = "") -> None:
    """Exits at once: a normal exit waits for the other processes, which may never end."""
    if line:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
