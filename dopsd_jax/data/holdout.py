"""Rows that are not trained on: their gap tells whether a run still learns what it is asked to."""

import hashlib
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.buckets import Shape
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.loader import BatchIndex

RowsByShape = Mapping[Shape, np.ndarray]


def split(dataset: Dataset, count: int, seed: int) -> tuple[RowsByShape, RowsByShape]:
    """The rows that are trained on, and those of `count` pictures that are not, by shape.

    All rows of a picture go together. Raises `UserError`, see `pictures`.
    """
    rows, chosen = dataset.rows_by_shape(), pictures(dataset, count, seed)
    if not chosen:
        return rows, {}
    held = np.array([digest in chosen for digest in _digests(dataset)])
    part = lambda mask: {shape: ids[mask[ids]] for shape, ids in rows.items() if mask[ids].any()}
    return part(~held), part(held)


def pictures(dataset: Dataset, count: int, seed: int) -> set[str]:
    """The digests of `count` pictures that are not trained on: by the pictures and the seed alone.

    Raises `UserError` where nothing would be left to train on.
    """
    known = set(_digests(dataset)) if count else set()
    if count and count >= len(known):
        raise UserError(
            f"config.data.holdout: {count} pictures, and the data set has {len(known)}; name fewer"
        )
    order = lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest()
    return set(heapq.nsmallest(count, known, order))


def digest(dataset: Dataset, held: RowsByShape) -> str:
    """sha256 over the pictures of the rows of `held`."""
    found = {dataset.infos.digest(row) for ids in held.values() for row in ids.tolist()}
    return hashlib.sha256(" ".join(sorted(found)).encode()).hexdigest()


def _digests(dataset: Dataset) -> list[str]:
    return list(map(dataset.infos.digest, range(len(dataset.infos))))


def batches(dataset: Dataset, held: RowsByShape, size: int) -> list[BatchIndex]:
    """The rows of `held` with their first caption, in batches of `size` of one shape.

    The last batch of a shape is filled up with rows from its start, which do not count again.
    """
    found = []
    for shape, ids in held.items():
        count = -(-len(ids) // size)
        new = (np.arange(count * size) < len(ids)).reshape(count, size)
        weights = new / new.mean(1, keepdims=True)
        for rows, own in zip(np.resize(ids, (count, size)), weights.tolist(), strict=True):
            captions = [dataset.caption(row, dataset.prompt_keys)[1] for row in rows.tolist()]
            keys = tuple(
                dataset.rows[row].captions[caption][0]
                for row, caption in zip(rows.tolist(), captions, strict=True)
            )
            chosen = rows, keys, np.array(captions, np.int64)
            found.append(BatchIndex(len(found), shape, *chosen, weights=tuple(own)))
    return found


def counts(batches: Sequence[BatchIndex]) -> list[int]:
    """How many rows of each of these batches count."""
    return [int(np.count_nonzero(index.weights)) for index in batches]
