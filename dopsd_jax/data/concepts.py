"""Which picture a teacher is shown in the place of a row's own: another one of the same concept.

The concept of a row is what the column `concept` of its table says; without such a column it is the
folder that the picture lies in.
"""

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dopsd_jax.common.errors import raise_if
from dopsd_jax.data.images import ImageInfo
from dopsd_jax.data.sources.collector import Examples
from dopsd_jax.data.table import DataRow, Image

NAMED = 3  # rows of a message; the others are counted


class Shown(NamedTuple):
    """A picture and the sha256 of its file."""

    image: Image
    digest: str


class Others(Sequence[Shown]):
    """For each row the picture that its teacher is shown; see `other_pictures`."""

    def __init__(
        self,
        rows: Sequence[DataRow],
        infos: Sequence[ImageInfo],
        numbers: Int[np.ndarray, " n"],
    ):
        self.rows, self.infos, self.numbers = rows, infos, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Shown:
        number = int(self.numbers[i])
        return Shown(self.rows[number].image, self.infos[number].digest)

    def digest(self) -> str:
        """sha256 over all of them, in order."""
        shown = [self.infos[number].digest for number in self.numbers.tolist()]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def other_pictures(
    rows: Sequence[DataRow],
    infos: Sequence[ImageInfo],
    seed: int,
    where: str,
    held: Collection[str] = (),
) -> Others:
    """For each row the next picture of its concept, in a circle whose order the seed decides.

    The order of a concept depends on its pictures and the seed alone. held: digests of pictures
    that are not trained on: no teacher is shown one, but where the concept has no others. Raises
    `UserError` with the rows that have no concept, or whose concept has no second picture; `where`:
    the data set.
    """
    columns = any(row.concept for row in rows)
    circles: dict[str, dict[str, int]] = {}
    for i, (row, info) in enumerate(zip(rows, infos, strict=True)):
        circles.setdefault(_concept(row, columns), {}).setdefault(info.digest, i)
    following = {concept: _following(own, seed, held) for concept, own in circles.items()}
    unnamed, alone, numbers = Examples(NAMED), Examples(NAMED), np.zeros(len(rows), np.int64)
    for i, (row, info) in enumerate(zip(rows, infos, strict=True)):
        concept = _concept(row, columns)
        numbers[i] = following[concept][info.digest]
        if not concept:
            unnamed.add(row.where)
        elif infos[numbers[i]].digest == info.digest:
            alone.add(row.where)
    faults = []
    if unnamed:
        faults.append(
            f"{where}: the column 'concept' is empty or missing in {unnamed.count} rows and set in "
            f"others: {unnamed}; fill it in all rows (config.teacher.context = other)"
        )
    if alone:
        trained, fewer = " that is trained on", "lower config.data.holdout, "
        faults.append(
            f"{where}: config.teacher.context = other shows the teacher another picture of a row's "
            f"concept, and {alone.count} rows have the only one of theirs{trained if held else ''}"
            f": {alone}; {fewer if held else ''}add pictures, "
            "put those of a concept into one folder or name it in a column 'concept', or choose "
            "another context"
        )
    raise_if(faults)
    return Others(rows, infos, numbers)


def _following(pictures: dict[str, int], seed: int, held: Collection[str]) -> dict[str, int]:
    """The row that has the picture after each one, of those that are not `held` if there are."""
    order = sorted(pictures, key=lambda own: hashlib.sha256(f"{seed} {own}".encode()).digest())
    shown = [own for own in order if own not in held]
    passed = held if shown else ()
    after, found = (shown or order)[0], {}
    for own in reversed(order):
        found[own] = pictures[after]
        if own not in passed:
            after = own
    return found


def _concept(row: DataRow, columns: bool) -> str:
    """`columns`: whether a column names the concepts."""
    if columns:
        return row.concept
    if isinstance(row.image, os.PathLike):
        return str(row.image.parent)
    # Archives that lie in one folder are the shards of one data set.
    return os.path.join(row.image.archive.parent, os.path.dirname(row.image.name))
