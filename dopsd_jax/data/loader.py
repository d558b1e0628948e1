"""Batch order: batch n is a function of (seed, n) and of nothing else.

There is no state to save: a run that resumes at step n reads the same batches. Upstream drops
incomplete batches and repeats the same order every epoch; this loader does not.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import grain
import numpy as np
from jaxtyping import Int64

from dopsd_jax.data.buckets import Shape
from dopsd_jax.data.draws import permutation, random_numbers, shares
from dopsd_jax.data.sets import PartOfRows, draws_per_epoch
from dopsd_jax.data.table import DataRow

T = TypeVar("T")

# Names of independent random streams.
_ROWS, _BATCHES, _KEYS, _CAPTIONS, _TURNS, _DROPPED, _SETS = range(7)


@dataclass(frozen=True)
class BatchIndex:
    """What batch `n` holds: rows of one shape, and for each its prompt key and caption.

    `captions[i]` is an index into the captions of row `rows[i]`. `dropped[i]`: whether its student
    gets the row's empty caption instead; empty: none does. `weights[i]`: how much the row counts, 1
    on average over the whole batch; empty: each counts 1.
    """

    n: int
    shape: Shape
    rows: Int64[np.ndarray, " b"]
    prompt_keys: tuple[str, ...]
    captions: Int64[np.ndarray, " b"]
    dropped: tuple[bool, ...] = ()
    weights: tuple[float, ...] = ()

    def part(self, places: Int64[np.ndarray, " p"], accumulate: int) -> "BatchIndex":
        """What one process loads: `places` of each of the batch's `accumulate` micro-batches."""
        size, rest = divmod(len(self.rows), accumulate)
        if rest or len(places) == 0 or min(places) < 0 or max(places) >= size:
            raise ValueError(f"{places=} of {accumulate} parts of a batch of {len(self.rows)}")
        own = (np.arange(accumulate)[:, None] * size + places).ravel()
        return replace(
            self,
            rows=self.rows[own],
            prompt_keys=tuple(self.prompt_keys[i] for i in own),
            captions=self.captions[own],
            dropped=tuple(self.dropped[i] for i in own) if self.dropped else (),
            weights=tuple(self.weights[i] for i in own) if self.weights else (),
        )


class Batches:
    """The endless sequence of batches.

    In each epoch the rows of each shape are shuffled and cut into batches; the last batch of a
    shape is filled up with rows from the start of the same shuffle. The batches of all shapes are
    then shuffled. So every row is seen at least once an epoch, and at most once more, or as often
    as a shape with fewer rows than a batch must repeat them. With `sets` a row is first used as
    often as its set says: whole passes, then some rows of one more, others in every epoch.

    `draw` says whether one prompt key is drawn for the whole batch (as upstream) or for each row.
    `dropout`: the share of draws in which the student's caption is dropped.
    """

    def __init__(
        self,
        rows_by_shape: Mapping[Shape, np.ndarray],
        rows: Sequence[DataRow],
        prompt_keys: Sequence[str],
        *,
        batch_size: int,
        seed: int,
        draw: Literal["batch", "row"] = "batch",
        dropout: float = 0.0,
        sets: Sequence[PartOfRows] = (),
    ):
        if batch_size < 1 or seed < 0 or not prompt_keys or draw not in ("batch", "row"):
            raise ValueError(f"{batch_size=} {seed=} {prompt_keys=} {draw=}")
        if not rows_by_shape or any(len(ids) == 0 for ids in rows_by_shape.values()):
            raise ValueError("a shape without rows")
        self.rows_by_shape = {
            shape: np.sort(np.asarray(rows_by_shape[shape], np.int64))
            for shape in sorted(rows_by_shape)
        }
        self.shapes = tuple(self.rows_by_shape)
        self.rows = rows
        self.prompt_keys = tuple(prompt_keys)
        self.batch_size = batch_size
        self.seed = seed
        self.draw, self.dropout = draw, dropout
        self.sets = sets if any(one.times != 1 for one in sets) else ()
        self.draws = draws_per_epoch(list(self.rows_by_shape.values()), self.sets)
        self.per_epoch = sum(-(-sum(own) // batch_size) for own in zip(*self.draws, strict=True))
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of shapes [n] and rows [n, b] of the batches of one epoch, in order."""
        shapes, rows = [], []
        for number, (shape, ids) in enumerate(self.rows_by_shape.items()):
            sides = (*shape.bucket, *itertools.chain(*shape.references))
            ids = self._repeated(ids, number, epoch, *sides)
            shuffled = ids[permutation(len(ids), self.seed, epoch, _ROWS, *sides)]
            count = -(-len(ids) // self.batch_size)
            rows.append(np.resize(shuffled, (count, self.batch_size)))  # repeats from the start
            shapes.append(np.full(count, number))
        order = permutation(self.per_epoch, self.seed, epoch, _BATCHES)
        return np.concatenate(shapes)[order], np.concatenate(rows)[order]

    def _repeated(self, ids: np.ndarray, shape: int, epoch: int, *sides: int) -> np.ndarray:
        """Rows of a shape, each as often as it is used in an epoch."""
        found = []
        for number, one in enumerate(self.sets):
            own = one.of(ids)
            own = own[permutation(len(own), self.seed, epoch, _SETS, number, *sides)]
            found.append(np.resize(own, self.draws[number][shape]))
        return np.concatenate(found) if found else ids

    def shapes_between(self, first: int, stop: int) -> list[Shape]:
        """The shapes of the batches first <= n < stop of one epoch, in the order of first use."""
        epoch, place = divmod(first, self.per_epoch)
        numbers = self._plan(epoch)[0][place : place + max(0, stop - first)]
        return [self.shapes[number] for number in dict.fromkeys(numbers.tolist())]

    def batch(self, n: int) -> BatchIndex:
        """The n-th batch, counted from 0 over all epochs."""
        epoch, place = divmod(n, self.per_epoch)
        numbers, all_rows = self._plan(epoch)
        shape, rows = self.shapes[numbers[place]], all_rows[place]
        size = len(rows)
        draws = random_numbers(size, self.seed, n, _KEYS)
        if self.draw == "batch":
            draws = np.repeat(draws[:1], size)
        keys = tuple(self.prompt_keys[draw % len(self.prompt_keys)] for draw in draws.tolist())
        captions = np.empty(size, np.int64)
        for i, draw in enumerate(random_numbers(size, self.seed, n, _CAPTIONS).tolist()):
            having = self.rows[rows[i]].having(keys[i])
            captions[i] = having[draw % len(having)]
        dropped = ()
        if self.dropout:
            dropped = tuple((shares(size, self.seed, n, _DROPPED) < self.dropout).tolist())
        return BatchIndex(n, shape, rows, keys, captions, dropped)


def prefetch(
    batches: Batches,
    load: Callable[[BatchIndex], T],
    start: int,
    stop: int,
    *,
    threads: int = 2,
    ahead: int = 2,
) -> Iterator[tuple[int, T]]:
    """Yields (n, load(batch n)) for start <= n < stop, loaded by threads a few batches ahead.

    What `load` raises is raised here.
    """

    def fetch(n: int) -> tuple[int, T]:
        return n, load(batches.batch(n))

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    yield from grain.MapDataset.source(range(start, stop)).map(fetch).to_iter_dataset(options)


def turn(place: int, count: int, seed: int, stream: int) -> int:
    """Which of `count` items has its turn at `place` (from 0) of an endless sequence.

    All have had theirs before one has it again; every round has an order of its own, and so has
    every stream.
    """
    number, place = divmod(place, count)
    return int(_round(count, seed, number, _TURNS, stream)[place])


@functools.lru_cache(maxsize=16)
def _round(count: int, *key: int) -> np.ndarray:
    return permutation(count, *key)
