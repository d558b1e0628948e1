"""The data set as a whole: every row checked, measured and put into a bucket."""

import hashlib
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dopsd_jax.data.buckets import Bucket, nearest
from dopsd_jax.data.images import ImageInfo, ImageLimits, enlargement, inspect_image
from dopsd_jax.data.records import listing
from dopsd_jax.data.rows import MAX_PROBLEMS, Row, Rows
from dopsd_jax.errors import UserError, raise_if


@dataclass(frozen=True)
class Dataset:
    """Rows with the measured facts of their pictures; `buckets[i]` is the bucket of `rows[i]`."""

    rows: tuple[Row, ...]
    infos: tuple[ImageInfo, ...]
    buckets: tuple[Bucket, ...]
    prompt_keys: tuple[str, ...]
    notes: tuple[str, ...]

    def rows_by_bucket(self) -> dict[Bucket, np.ndarray]:
        """Row numbers of each bucket that has any."""
        found: dict[Bucket, list[int]] = {}
        for row, bucket in enumerate(self.buckets):
            found.setdefault(bucket, []).append(row)
        return {bucket: np.array(found[bucket], np.int64) for bucket in sorted(found)}

    def digest(self) -> str:
        """sha256 over what training sees: picture contents, buckets and captions, in order."""
        total = hashlib.sha256()
        for row, info, bucket in zip(self.rows, self.infos, self.buckets, strict=True):
            total.update(json.dumps([info.digest, bucket, row.captions]).encode())
        return total.hexdigest()


def measure(
    rows: Rows,
    buckets: Sequence[Bucket],
    limits: ImageLimits | None = None,
    *,
    verify: bool = True,
    workers: int = 4,
) -> Dataset:
    """Opens every picture once and chooses its bucket; raises the faults of all rows together.

    With `verify` every picture is decoded, so that nothing fails hours later.
    """
    limits = limits or ImageLimits()

    def look(row: Row) -> ImageInfo | UserError:
        try:
            return inspect_image(row.image, limits, verify=verify)
        except UserError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        infos = list(pool.map(look, rows.rows))
    problems = [
        problem if row.where == str(row.image) else f"{row.where}: {problem}"
        for row, info in zip(rows.rows, infos, strict=True)
        if isinstance(info, UserError)
        for problem in info.problems
    ]
    raise_if(problems, MAX_PROBLEMS)
    chosen = tuple(nearest(info.width, info.height, buckets) for info in infos)
    notes = (*rows.notes, *_notes(rows.rows, infos, chosen))
    return Dataset(rows.rows, tuple(infos), chosen, rows.prompt_keys, notes)


def _notes(
    rows: Sequence[Row], infos: Sequence[ImageInfo], buckets: Sequence[Bucket]
) -> Iterable[str]:
    """One line for each kind of remark, with the rows it concerns."""
    by_remark: dict[str, list[str]] = {}
    enlarged, wrong_size = [], []
    for row, info, bucket in zip(rows, infos, buckets, strict=True):
        for remark in info.notes:
            by_remark.setdefault(remark, []).append(row.where)
        times = enlargement(info.width, info.height, *bucket)
        if times > 1:
            enlarged.append((times, row.where))
        if row.declared_size not in (None, (info.width, info.height)):
            declared = "x".join(map(str, row.declared_size))
            wrong_size.append(f"{row.where} ({declared}, is {info.width}x{info.height})")
    for remark, where in by_remark.items():
        yield f"{len(where)} of {len(rows)} pictures: {remark}: {listing(where)}"
    if enlarged:
        yield (
            f"{len(enlarged)} of {len(rows)} pictures are smaller than their bucket and are "
            f"enlarged, up to {max(enlarged)[0]:.2f} times: {listing(w for _, w in enlarged)}"
        )
    if wrong_size:
        yield (
            f"'h*w' or 'w*h' (not used) disagrees with the file in {len(wrong_size)} of "
            f"{len(rows)} rows: {listing(wrong_size)}"
        )
    same = Counter(info.digest for info in infos)
    repeated = [row.where for row, info in zip(rows, infos, strict=True) if same[info.digest] > 1]
    if repeated:
        yield f"{len(repeated)} rows share a picture with another row: {listing(repeated)}"


def describe(dataset: Dataset, batch_size: int) -> list[str]:
    """The data set in a few lines, for a report."""
    by_bucket = dataset.rows_by_bucket()
    batches = sum(-(-len(rows) // batch_size) for rows in by_bucket.values())
    repeated = batches * batch_size - len(dataset.rows)
    pictures = len({info.digest for info in dataset.infos})
    lines = [f"data: {len(dataset.rows)} rows, {pictures} pictures, {dataset.digest()[:12]}"]
    for bucket, rows in by_bucket.items():
        sizes = ((dataset.infos[row].width, dataset.infos[row].height) for row in rows)
        enlarged = sum(enlargement(*size, *bucket) > 1 for size in sizes)
        lines.append(f"bucket {bucket}: {len(rows)} rows, {enlarged} enlarged")
    captions = itertools.chain.from_iterable(row.captions for row in dataset.rows)
    lengths: dict[str, list[int]] = {key: [] for key in dataset.prompt_keys}
    for key, text in captions:
        lengths[key].append(len(text))
    for key, found in lengths.items():
        lines.append(
            f"captions {key}: {len(found)}, {min(found)} to {max(found)} characters, "
            f"median {statistics.median(found):g}"
        )
    lines.append(
        f"batches of {batch_size}: {batches} an epoch"
        + (f", {repeated} places filled by repeating rows" if repeated else "")
    )
    return lines + [f"note: {note}" for note in dataset.notes]
