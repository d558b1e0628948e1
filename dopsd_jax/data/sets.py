"""Several data sets as one, whose rows are drawn in given proportions."""

import bisect
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dopsd_jax.common.errors import raise_if
from dopsd_jax.data.table import Captions, DataRow, Derived, RowList
from dopsd_jax.data.varied import EMPTY

CLOSE = 0.01  # a share that is so near to the wanted one is that


class PartOfRows(NamedTuple):
    """The rows of one data set among all. `times`: how often each is used in an epoch, 1 or more.

    `share`: of all draws; None where no weights were given.
    """

    path: str
    rows: range
    times: Fraction
    share: Fraction | None

    def of(self, ids: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " k"]:
        """Those row numbers that are this set's."""
        return ids[(ids >= self.rows.start) & (ids < self.rows.stop)]

    def draws(self, counts: Sequence[int]) -> list[int]:
        """How often its rows are used in an epoch; `counts`: how many there are of each shape.

        Rounded together: were each shape rounded alone, sets of many shapes would miss their share.
        """
        exact = [self.times * count for count in counts]
        whole = [int(one) for one in exact]
        left = round(sum(exact)) - sum(whole)
        most = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
        return [n + (i in most[:left]) for i, n in enumerate(whole)]


def draws_per_epoch(
    ids: Sequence[Int64[np.ndarray, " _"]], sets: Sequence[PartOfRows]
) -> list[list[int]]:
    """How often the rows of each shape, `ids`, are used in an epoch: by set, then by shape."""
    if not sets:
        return [[len(own) for own in ids]]
    return [one.draws([len(one.of(own)) for own in ids]) for one in sets]


def real_shares(draws: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """The share of each set in all batches, of which the last of a shape is filled up with more.

    draws: see `draws_per_epoch`.
    """
    of_shape = np.sum(draws, axis=0)
    filled = -(-of_shape // batch_size) * batch_size
    return (np.asarray(draws) / of_shape @ filled / filled.sum()).tolist()


def describe(
    sets: Sequence[PartOfRows], ids: Sequence[Int64[np.ndarray, " _"]] = (), batch_size: int = 0
) -> list[str]:
    """A line for each of several data sets; `ids`: the rows of each shape, if batches are known."""
    real = real_shares(draws_per_epoch(ids, sets), batch_size) if sets and ids else ()
    lines = []
    for number, one in enumerate(sets):
        share = "" if one.share is None else f", {float(one.share):.3g} of all draws"
        if share and real and abs(real[number] - one.share) > CLOSE:
            share += f" by data.weights, {real[number]:.3g} in batches of one shape"
        times = f"each used {float(one.times):.3g} times an epoch"
        lines.append(f"set {one.path}: {len(one.rows)} rows, {times}{share}")
    return lines


class Joined(Derived):
    """The rows of several data sets, one set behind the other, with captions under `keys` alone."""

    def __init__(self, parts: Sequence[RowList], keys: Sequence[str]):
        self.parts, self.keys = parts, (*keys, EMPTY)
        self._ends = np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> DataRow:
        ((rows, (number,)),) = self.origins((range(len(self))[i],))
        row = rows[number]
        captions = self._known(row.captions)
        return row if captions == row.captions else replace(row, captions=captions)

    def origins(self, numbers: Sequence[int]) -> list[tuple[RowList, Sequence[int]]]:
        part_of = lambda i: bisect.bisect_right(self._ends, i) - 1
        return [
            (self.parts[part], [i - self._ends[part] for i in own])
            for part, own in itertools.groupby(numbers, part_of)
        ]

    def captions(self, numbers: Sequence[int]) -> list[Captions]:
        return list(map(self._known, super().captions(numbers)))

    def _known(self, captions: Captions) -> Captions:
        return tuple(caption for caption in captions if caption[0] in self.keys)


def parts_of(
    paths: Sequence[str], sizes: Sequence[int], shares: Sequence[Fraction]
) -> tuple[PartOfRows, ...]:
    """The sets at `paths` with so many rows each, one behind the other.

    The rows that are drawn least are used once an epoch. Without `shares` all are.
    """
    ends = np.cumsum([0, *sizes]).tolist()
    rows = [range(first, last) for first, last in itertools.pairwise(ends)]
    if not shares:
        return tuple(PartOfRows(*own, Fraction(1), None) for own in zip(paths, rows, strict=True))
    return tuple(map(PartOfRows, paths, rows, _times(sizes, shares), shares))


def among(parts: Sequence[PartOfRows], ids: Int64[np.ndarray, " n"]) -> tuple[PartOfRows, ...]:
    """The sets with their shares in the draws of the rows `ids`, which are trained on.

    Raises `UserError` for sets with a share of which no row is among them.
    """
    if not all(one.share for one in parts):
        return tuple(parts)
    counts = [len(one.of(ids)) for one in parts]
    raise_if(
        f"data.weights: gives {one.path} a share, and config.data.holdout leaves no row of it to "
        "train on; hold out fewer pictures"
        for one, count in zip(parts, counts, strict=True)
        if not count
    )
    times = _times(counts, [one.share for one in parts])
    return tuple(one._replace(times=own) for one, own in zip(parts, times, strict=True))


def _times(sizes: Sequence[int], shares: Sequence[Fraction]) -> list[Fraction]:
    """How often a row of each set is used in an epoch: 1 where it is least."""
    per_row = [share / size for share, size in zip(shares, sizes, strict=True)]
    return [one / min(per_row) for one in per_row]


def shares_of(weights: Sequence[object], count: int) -> tuple[Fraction, ...]:
    """The shares of `count` data sets in all draws, 1 together; none without weights.

    Raises `UserError` for other than one number above 0 for each set.
    """
    faults, numbers = [], []
    for weight in weights:
        text = str(weight).strip()
        known = re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text)
        number = Fraction(text) if known else Fraction(0)  # exact: the same on every machine
        if not number:
            faults.append(f"data.weights: {text[:40]!r} is not a number above 0, such as 2 or 0.25")
        numbers.append(number)
    if weights and len(weights) != count:
        faults.append(
            f"data.weights: has {len(weights)} numbers for the {count} data sets of data.path; "
            "give each set one"
        )
    raise_if(faults)
    return tuple(number / sum(numbers) for number in numbers)
