"""The data set as a whole: every row checked, measured and put into a bucket."""

import functools
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.progress import Progress
from dopsd_jax.data import masks, sets
from dopsd_jax.data.blobs import Blob
from dopsd_jax.data.buckets import Bucket, Reference, Shape, nearest_at
from dopsd_jax.data.concepts import Shown
from dopsd_jax.data.images import ImageInfo, ImageLimits, enlargement
from dopsd_jax.data.picture_index import Infos, PictureIndex
from dopsd_jax.data.prepared import Caption, Prepared
from dopsd_jax.data.rows import Rows
from dopsd_jax.data.sets import PartOfRows, draws_per_epoch
from dopsd_jax.data.sources.collector import Examples
from dopsd_jax.data.table import WHOLE, Chosen, DataRow
from dopsd_jax.data.varied import EMPTY

MOST_SHAPES = 24  # that are described
_AT_ONCE = 1024  # rows given to the threads at a time
# Bucket of a row, height and width of a reference, what messages call it -> the size that the model
# is given. Raises `UserError` for a size that it cannot be given.
ReferenceSize = Callable[[Bucket, int, int, str], Bucket]


@dataclass(frozen=True)
class Dataset:
    """Rows with the measured facts of their pictures; `buckets[i]` is the bucket of `rows[i]`.

    `prompt_keys`: keys of the trained captions; rows may have others, for their teacher.
    `features`: the encoders' outputs, if `dopsd_jax.prepare` has made them. `references[i]`: what
    row i edits; empty if no row edits anything. `sets`: the rows of each data set, if there are
    several. `others[i]`: the picture that its teacher is shown; empty: its own. `masks[i]`: sha256
    of its mask, "" where all of it counts; empty: there are no masks.
    """

    rows: Sequence[DataRow]
    infos: Sequence[ImageInfo]
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
        found: dict[Shape, array] = {}
        for row in range(len(self.buckets)):
            found.setdefault(self.shape(row), array("q")).append(row)
        return {shape: np.array(found[shape], np.int64) for shape in sorted(found)}

    def part(self, numbers: Sequence[int]) -> "Dataset":
        """The rows of these numbers, in their order; of one set that is not prepared."""
        pick = lambda found: tuple(found[i] for i in numbers)
        rows, references = Chosen(self.rows, numbers), self.references and pick(self.references)
        infos, buckets = pick(self.infos), pick(self.buckets)
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
            for row, own in enumerate(self.rows)
            for i, (key, _) in enumerate(own.captions)
            if keys is None or key in keys
        ]

    def caption(self, row: int, keys: Sequence[str]) -> Caption:
        """The first caption of a row under any of `keys`."""
        captions = self.rows[row].captions
        return row, next(i for i, (key, _) in enumerate(captions) if key in keys)

    def digest(self) -> str:
        """sha256 over what training sees: pictures' contents and views, buckets and captions.

        Not over the empty captions: all rows have one, or none.
        """
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        total = hashlib.sha256()
        for row, info, bucket in zip(self.rows, self.infos, self.buckets, strict=True):
            captions = [caption for caption in row.captions if caption[0] != EMPTY]
            view = [row.view] if row.view != WHOLE else []
            total.update(json.dumps([info.digest, bucket, captions, *view]).encode())
        if self.references:
            total.update(json.dumps(list(self.references)).encode())
        if self.masks:
            total.update(json.dumps(self.masks).encode())
        return total.hexdigest()


def measure(
    rows: Rows,
    buckets: Sequence[Bucket],
    limits: ImageLimits | None = None,
    *,
    verify: bool = True,
    workers: int = 4,
    index: PictureIndex | None = None,
    reference_size: ReferenceSize | None = None,
    levels: Sequence[Sequence[Bucket]] = (),
    masked: str = masks.OFF,
) -> Dataset:
    """Opens every picture once and chooses its bucket; raises the faults of all rows together.

    With `verify` every picture is decoded, so that nothing fails hours later. Pictures that `index`
    knows and that have not changed are not opened; it is updated, also after an error. `levels`:
    the buckets of each resolution, from the lowest, for rows that are shown at several. `masked`:
    config.data.masks.
    """
    limits, levels = limits or ImageLimits(), levels or (buckets,)
    index = index or PictureIndex(None)
    infos, problems, references, chosen, regions = Infos(), [], [], [], []
    count = len(rows.rows)
    progress = Progress("looking at pictures", count, quiet=count <= _AT_ONCE)

    def look(picture: Path | Blob) -> ImageInfo | UserError:
        try:
            return index.look(picture, limits, verify)
        except UserError as error:
            return error

    def look_at_mask(row: DataRow) -> ImageInfo | UserError:
        own = lambda _, limits, verify: masks.inspect_mask(row, limits)
        try:
            return index.look(row.mask or row.image, limits, verify, own, f"mask {masked}")
        except UserError as error:
            return error

    # The pool queues all items at once, so it gets a few at a time.
    with ThreadPoolExecutor(workers) as pool, index:
        for first in range(0, count, _AT_ONCE):
            some = [rows.rows[i] for i in range(first, min(first + _AT_ONCE, count))]
            # Rows may share pictures, as those do that count several times.
            pictures = dict.fromkeys(p for row in some for p in (row.image, *row.references))
            seen = dict(zip(pictures, pool.map(look, pictures), strict=True))
            with_mask = {row.mask or row.image: row for row in some if _has_mask(row, masked)}
            looked = pool.map(look_at_mask, with_mask.values())
            seen_masks = dict(zip(with_mask, looked, strict=True))
            for row in some:
                found = [seen[picture] for picture in (row.image, *row.references)]
                mask = seen_masks.get(row.mask or row.image) if _has_mask(row, masked) else None
                faults = list(_faults(row, found)) or masks.faults(row, found[0], mask)
                if faults:
                    problems += faults
                    continue
                infos.append(found[0])
                regions.append("" if mask is None or mask.notes else mask.digest)
                bucket = nearest_at(found[0].width, found[0].height, levels, row.view.level)
                chosen.append(bucket)
                own = []
                for path, info in zip(row.references, found[1:], strict=True):
                    try:
                        where = f"{row.where}: {path}"
                        size = reference_size(bucket, info.height, info.width, where)
                        own.append(Reference(info.digest, size))
                    except UserError as error:
                        problems += error.problems
                references.append(tuple(own))
            progress.advance(len(some))
            index.save_sometimes()
    raise_if(dict.fromkeys(problems))
    chosen = tuple(chosen)
    notes = (*rows.notes, *_notes(rows.rows, infos, chosen))
    regions = () if masked == masks.OFF else tuple(regions)
    references = references if any(references) else ()
    own = {"references": references, "sets": rows.sets, "masks": regions}
    return Dataset(rows.rows, infos, chosen, rows.prompt_keys, notes, **own)


def _has_mask(row: DataRow, masked: str) -> bool:
    return masked == masks.ALPHA or row.mask is not None


def _faults(row: DataRow, found: Sequence[ImageInfo | UserError]) -> Iterable[str]:
    """What is wrong with a row's picture and references, as they were `found`."""
    for picture, one in zip((row.image, *row.references), found, strict=True):
        if isinstance(one, UserError):
            own = row.where == str(picture)
            yield from (fault if own else f"{row.where}: {fault}" for fault in one.problems)


def _notes(rows: Sequence[DataRow], infos: Infos, buckets: Sequence[Bucket]) -> Iterable[str]:
    """One line for each kind of remark, with the rows it concerns."""
    by_remark: dict[str, Examples] = {}
    enlarged, wrong_size, repeated, most = Examples(), Examples(), Examples(), 0.0
    # A row that counts several times (data.folder_repeats, data.flip) stands there as often.
    new, before = np.ones(len(rows), bool), None
    for i, (row, info, bucket) in enumerate(zip(rows, infos, buckets, strict=True)):
        row = replace(row, view=WHOLE)
        new[i], before = row != before, row
        for remark in info.notes:
            by_remark.setdefault(remark, Examples()).add(row.where)
        times = enlargement(info.width, info.height, *bucket)
        if times > 1:
            enlarged.add(row.where)
            most = max(most, times)
        if row.declared_size not in (None, (info.width, info.height)):
            declared = "x".join(map(str, row.declared_size))
            wrong_size.add(f"{row.where} ({declared}, is {info.width}x{info.height})")
    for i in np.flatnonzero(infos.repeated(new)):
        repeated.add(rows[i].where)
    for remark, where in by_remark.items():
        yield f"{where.count} of {len(rows)} pictures: {remark}: {where}"
    if enlarged:
        yield (
            f"{enlarged.count} of {len(rows)} pictures are smaller than their bucket and are "
            f"enlarged, up to {most:.2f} times: {enlarged}"
        )
    if wrong_size:
        yield (
            f"'h*w' or 'w*h' (not used) disagrees with the file in {wrong_size.count} of "
            f"{len(rows)} rows: {wrong_size}"
        )
    if repeated:
        yield f"{repeated.count} rows share a picture with another row: {repeated}"


def describe(dataset: Dataset, batch_size: int) -> list[str]:
    """The data set in a few lines, for a report."""
    by_shape = dataset.rows_by_shape()
    draws = [draws_per_epoch(rows, dataset.sets) for rows in by_shape.values()]
    batches = sum(-(-drawn // batch_size) for drawn in draws)
    repeated = batches * batch_size - sum(draws)
    pictures = dataset.infos.distinct()
    lines = [
        f"data: {len(dataset.rows)} rows (a picture with its captions), {pictures} different "
        f"pictures, digest {dataset.digest()[:12]}"
    ]
    lines += sets.describe(dataset.sets)
    if dataset.masks:
        whole = Examples()
        for row, mask in zip(dataset.rows, dataset.masks, strict=True):
            if not mask:
                whole.add(row.where)
        count = len(dataset.masked())
        rest = f"; of {whole.count} without one all counts: {whole}" if whole else ""
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
    lengths: dict[str, array] = {}
    for row in dataset.rows:
        for key, text in row.captions:
            lengths.setdefault(key, array("i")).append(len(text))
    lengths.pop(EMPTY, None)
    for key, found in lengths.items():
        lines.append(
            f"captions under {key!r}: {len(found)}, of {min(found)} to {max(found)} characters "
            f"(median {np.median(found):g})"
        )
    lines.append(
        f"batches of {batch_size}: {batches} an epoch"
        + (f", {repeated} places filled by repeating rows" if repeated else "")
    )
    return lines + [f"note: {note}" for note in dataset.notes]


def spread(rows: int, count: int) -> list[int]:
    """At most `count` row numbers, evenly over all of them."""
    numbers = np.linspace(0, rows, count, endpoint=False).astype(int)
    return sorted(set(numbers.tolist()))
