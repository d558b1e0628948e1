"""The data set as a whole: rows with the facts of their pictures, as `measure` finds them."""

import functools
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dopsd_jax.common.errors import one_line
from dopsd_jax.data import sets
from dopsd_jax.data.buckets import Bucket, Reference, Shape
from dopsd_jax.data.concepts import Shown
from dopsd_jax.data.picture_index import Infos
from dopsd_jax.data.prepared import Caption, Prepared
from dopsd_jax.data.sets import PartOfRows
from dopsd_jax.data.sources.collector import Examples
from dopsd_jax.data.table import WHOLE, Chosen, RowList, in_parts
from dopsd_jax.data.varied import EMPTY

MOST_SHAPES = 24  # that are described
_quoted = json.JSONEncoder().encode


@dataclass(frozen=True)
class Dataset:
    """Rows with the measured facts of their pictures; `buckets[i]` is the bucket of `rows[i]`.

    `prompt_keys`: keys of the trained captions; rows may have others, for their teacher.
    `features`: the encoders' outputs, if `dopsd_jax.prepare` has made them. `references[i]`: what
    row i edits; empty if no row edits anything. `sets`: the rows of each data set, if there are
    several. `others[i]`: the picture that its teacher is shown; empty: its own. `masks[i]`: sha256
    of its mask, "" where all of it counts; empty: there are no masks.
    """

    rows: RowList
    infos: Infos
    buckets: tuple[Bucket, ...]
    prompt_keys: tuple[str, ...]
    notes: tuple[str, ...]
    features: Prepared | None = None
    references: Sequence[tuple[Reference, ...]] = ()
    sets: tuple[PartOfRows, ...] = ()
    others: Sequence[Shown] = ()
    masks: tuple[str, ...] = ()

    def shape(self, row: int) -> Shape:
        """What the row has in common with the others of its batches."""
        own = self.references[row] if self.references else ()
        return Shape(self.buckets[row], tuple(reference.size for reference in own))

    def rows_by_shape(self) -> dict[Shape, np.ndarray]:
        """Row numbers of each shape that has any."""
        rows = range(len(self.buckets))
        shapes = map(self.shape, rows) if self.references else map(Shape, self.buckets)
        known: dict[Shape, int] = {}
        numbers = np.array([known.setdefault(shape, len(known)) for shape in shapes], np.int64)
        parts = np.split(numbers.argsort(kind="stable"), np.bincount(numbers).cumsum()[:-1])
        return {shape: parts[known[shape]] for shape in sorted(known)}

    def part(self, numbers: Sequence[int]) -> "Dataset":
        """The rows of these numbers, in their order; of one set that is not prepared."""
        pick = lambda found: tuple(found[i] for i in numbers)
        rows, references = Chosen(self.rows, numbers), self.references and pick(self.references)
        infos, buckets = self.infos.take(numbers), pick(self.buckets)
        others, masks = self.others and pick(self.others), self.masks and pick(self.masks)
        own = {"references": references, "others": others, "masks": masks}
        return replace(self, rows=rows, infos=infos, buckets=buckets, **own)

    def masked(self) -> list[int]:
        """The rows of whose pictures not all counts."""
        return [row for row, mask in enumerate(self.masks) if mask]

    def captions(self, keys: Sequence[str] | None = None) -> list[Caption]:
        """Every caption under `keys`, in order; None: under any."""
        return [
            (row, i)
            for some in in_parts(len(self.rows))
            for row, captions in zip(some, self.rows.captions(some), strict=True)
            for i, (key, _) in enumerate(captions)
            if keys is None or key in keys
        ]

    def caption(self, row: int, keys: Sequence[str]) -> Caption:
        """The first caption of a row under any of `keys`."""
        (captions,) = self.rows.captions((row,))
        return row, next(i for i, (key, _) in enumerate(captions) if key in keys)

    def digest(self) -> str:
        """sha256 over what training sees: pictures' contents and views, buckets and captions.

        Not over the empty captions: all rows have one, or none.
        """
        return self._read[0]

    def lengths(self) -> dict[str, array]:
        """How many characters the captions under each key have; not of the empty ones."""
        return self._read[1]

    @functools.cached_property
    def _read(self) -> tuple[str, dict[str, array]]:
        """`digest` and `lengths`; the captions are read once."""
        total, lengths, in_json = hashlib.sha256(), {}, functools.cache(json.dumps)
        for some in in_parts(len(self.rows)):
            facts = zip(some, self.rows.captions(some), self.rows.views(some), strict=True)
            for row, captions, view in facts:
                captions = [own for own in captions if own[0] != EMPTY]
                for key, text in captions:
                    lengths.setdefault(key, array("i")).append(len(text))
                # As json.dumps writes a list of these, which takes twice as long.
                pairs = [f"[{_quoted(key)}, {_quoted(text)}]" for key, text in captions]
                shown = "" if view == WHOLE else f", {json.dumps(view)}"
                picture = f'"{self.infos.digest(row)}", {in_json(self.buckets[row])}'
                total.update(f"[{picture}, [{', '.join(pairs)}]{shown}]".encode())
        if self.references:
            total.update(json.dumps(list(self.references)).encode())
        if self.masks:
            total.update(json.dumps(self.masks).encode())
        return total.hexdigest(), lengths


def describe(
    dataset: Dataset, batch_size: int, trained: Mapping[Shape, np.ndarray] | None = None
) -> list[str]:
    """The data set in a few lines, for a report; `trained`: its rows that are used, None: all."""
    by_shape = dataset.rows_by_shape()
    used = by_shape if trained is None else trained
    draws = np.sum(sets.draws_per_epoch(list(used.values()), dataset.sets), axis=0)
    batches = int(np.sum(-(-draws // batch_size)))
    repeated = batches * batch_size - int(np.sum(draws))
    pictures, held = dataset.infos.distinct(), len(dataset.rows) - sum(map(len, used.values()))
    lines = [
        f"data: {len(dataset.rows)} rows (a picture with its captions), {pictures} different "
        f"pictures, digest {dataset.digest()[:12]}"
    ]
    lines += sets.describe(dataset.sets, list(used.values()), batch_size)
    if dataset.masks:
        whole = [row for row, mask in enumerate(dataset.masks) if not mask]
        named = Examples.of(whole, dataset.rows.where)
        count = len(dataset.masked())
        rest = f"; of {named.count} without one all counts: {named}" if named else ""
        lines.append(f"masks: {count} of {len(dataset.masks)} rows have one{rest}")
    for shape, rows in list(by_shape.items())[:MOST_SHAPES]:
        sizes = dataset.infos.sizes()[rows]
        enlarged = int(np.sum((sizes < np.array(shape.bucket)).any(axis=1)))
        lines.append(f"bucket {shape}: {len(rows)} rows, {enlarged} of them enlarged")
    if len(by_shape) > MOST_SHAPES:
        lines.append(
            f"... and {len(by_shape) - MOST_SHAPES} more, for each of which a step is compiled: "
            "give the references few sizes, or set data.reference_crop=bucket"
        )
    for key, found in dataset.lengths().items():
        lines.append(
            f"captions under {key!r}: {len(found)}, of {min(found)} to {max(found)} characters "
            f"(median {np.median(found):g})"
        )
    lines.append(
        f"batches of {batch_size}: {batches} an epoch"
        + (f", {held} rows are held out" if held else "")
        + (f", {repeated} places filled by repeating rows" if repeated else "")
    )
    return lines + [f"note: {one_line(note)}" for note in dataset.notes]


def spread(rows: int, count: int) -> list[int]:
    """At most `count` row numbers, evenly over all of them."""
    numbers = np.linspace(0, rows, count, endpoint=False).astype(int)
    return sorted(set(numbers.tolist()))
