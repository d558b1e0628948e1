"""Opens every picture of a data set once: its size, its bucket, and what is wrong with it."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple

import numpy as np

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.progress import Progress
from dopsd_jax.data import masks
from dopsd_jax.data.blobs import Blob
from dopsd_jax.data.buckets import Bucket, Reference, nearest_at
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import ImageInfo, ImageLimits, enlargement, inspect_image
from dopsd_jax.data.picture_index import Infos, PictureIndex, Seen
from dopsd_jax.data.rows import Rows
from dopsd_jax.data.sources.collector import Examples
from dopsd_jax.data.table import RowList, in_parts

_AT_ONCE = 1024  # rows given to the threads at a time
_SIZES = 1 << 16  # of pictures, whose buckets are remembered
# Bucket of a row, height and width of a reference, what messages call it -> the size that the model
# is given. Raises `UserError` for a size that it cannot be given.
ReferenceSize = Callable[[Bucket, int, int, str], Bucket]


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
    index, own = index or PictureIndex(None), rows.rows
    infos, references, chosen, regions = Infos(), [], [], []
    wrong: dict[int, list[str]] = {}  # of each row that is
    count, terms = len(own), (*astuple(limits), verify)
    progress = Progress("looking at pictures", count, quiet=count <= _AT_ONCE)
    inspect = lambda picture: inspect_image(picture, limits, verify=verify)

    @functools.lru_cache(_SIZES)
    def bucket_of(width: int, height: int, level: int) -> Bucket:
        return nearest_at(width, height, levels, level)

    def edited(i: int, bucket: Bucket, names: Sequence[str | Blob]) -> Iterator[Reference]:
        for name in names:
            info = seen.of(name)
            try:
                where = f"{own.where(i)}: {name}"
                yield Reference(info.digest, reference_size(bucket, info.height, info.width, where))
            except UserError as error:
                wrong.setdefault(i, []).extend(error.problems)

    # The pool queues all items at once, so it gets a few at a time.
    with ThreadPoolExecutor(workers) as pool, index:
        look_at_mask = functools.partial(index.look, terms=(*terms, f"mask {masked}"), pool=pool)
        for some in in_parts(count, _AT_ONCE):
            # Rows may share pictures, as those do that count several times.
            pictures = dict(zip(some, own.pictures(some), strict=True))
            seen = index.look(itertools.chain(*pictures.values()), inspect, terms, pool)
            seen_masks = _look_at_masks(own, some, masked, limits, look_at_mask)
            for i in some if seen.faults or seen_masks else ():
                if faults := _faults(own, i, pictures[i], seen, seen_masks.get(i)):
                    wrong[i] = faults
                    del pictures[i]
            found = seen.infos.take([seen.numbers[names[0]] for names in pictures.values()])
            infos.extend(found)
            shown = [view.level for view in own.views(list(pictures))]
            buckets = list(map(bucket_of, *found.sizes().T.tolist(), shown))
            chosen += buckets
            for (i, names), bucket in zip(pictures.items(), buckets, strict=True):
                references.append(tuple(edited(i, bucket, names[1:])) if names[1:] else ())
            if masked != masks.OFF:
                own_masks = map(seen_masks.get, pictures)
                regions += ["" if one is None or one.notes else one.digest for one in own_masks]
            progress.advance(len(some))
            index.save_sometimes()
    raise_if(dict.fromkeys(fault for i in sorted(wrong) for fault in wrong[i]))
    chosen = tuple(chosen)
    notes = (*rows.notes, *_notes(own, infos, chosen))
    return Dataset(
        own,
        infos,
        chosen,
        rows.prompt_keys,
        notes,
        references=references if any(references) else (),
        sets=rows.sets,
        masks=() if masked == masks.OFF else tuple(regions),
    )


def _look_at_masks(
    rows: RowList, some: Iterable[int], masked: str, limits: ImageLimits, look: Callable
) -> dict[int, ImageInfo | UserError]:
    """What is found of the masks of those rows that have one; `look`: of a `PictureIndex`."""
    if masked == masks.OFF:
        return {}
    made = {i: rows[i] for i in some}
    files = {
        i: row.mask or row.image for i, row in made.items() if row.mask or masked == masks.ALPHA
    }
    row_of = {file: made[i] for i, file in files.items()}
    found = look(row_of, lambda file: masks.inspect_mask(row_of[file], limits))
    return {i: found.of(file) for i, file in files.items()}


def _faults(
    rows: RowList,
    i: int,
    names: Sequence[str | Blob],
    seen: Seen,
    mask: ImageInfo | UserError | None,
) -> list[str]:
    """What is wrong with a row's pictures, or else with its mask."""
    problems = []
    for name in (name for name in names if name in seen.faults):
        own = rows.where(i) == str(name)
        faults = seen.faults[name].problems
        problems += [fault if own else f"{rows.where(i)}: {fault}" for fault in faults]
    return problems if problems or mask is None else masks.faults(rows[i], seen.of(names[0]), mask)


def _notes(rows: RowList, infos: Infos, buckets: Sequence[Bucket]) -> Iterable[str]:
    """One line for each kind of remark, with the rows it concerns."""
    count, sizes = len(rows), infos.sizes()
    for remark, numbers in infos.remarks().items():
        where = Examples.of(numbers, rows.where)
        yield f"{where.count} of {count} pictures: {remark}: {where}"
    wanted = np.fromiter(itertools.chain(*buckets), np.int64).reshape(-1, 2)
    times = enlargement(*sizes.T, *wanted.T)
    if enlarged := Examples.of(np.flatnonzero(times > 1), rows.where):
        yield (
            f"{enlarged.count} of {count} pictures are smaller than their bucket and are "
            f"enlarged, up to {times.max():.2f} times: {enlarged}"
        )
    claimed = rows.declared_sizes(range(count))
    wrong = np.flatnonzero(claimed.all(axis=1) & (claimed != sizes).any(axis=1))
    if len(wrong):
        sides = lambda i: "{}x{}, is {}x{}".format(*claimed[i], *infos.size(i))
        told = lambda i: f"{rows.where(i)} ({sides(i)})"
        yield (
            f"'h*w' or 'w*h' (not used) disagrees with the file in {len(wrong)} of {count} rows: "
            f"{Examples.of(wrong, told)}"
        )
    # A row that counts several times (data.folder_repeats, data.flip) stands there as often, under
    # one name.
    new = np.ones(count, bool)
    for i in np.flatnonzero(infos.follow_same()).tolist():
        new[i] = rows.where(i) != rows.where(i - 1)
    if repeated := Examples.of(np.flatnonzero(infos.repeated(new)), rows.where):
        yield f"{repeated.count} rows share a picture with another row: {repeated}"
