"""Encodes a data set: python -m dopsd_jax.prepare --config FILE[:ARG] --out DIR

What it writes is a data set itself: `train --config.data.path=DIR` then needs neither pictures nor
encoders. Many processes (`--distributed`, as in training) divide it among themselves; so do single
ones with `--shard=i --shards=n`, which need not know of each other. The same command again goes on
where it was stopped. See docs/data.md.
"""

import contextlib
import dataclasses
import io
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dopsd_jax.common import program
from dopsd_jax.config.flags import CONFIG, WORKDIR, parse
from dopsd_jax.parallel import cluster

OPTIONS = program.options(__name__)
OUT = OPTIONS.path_or_store("out", None, "folder of the prepared data set; may be gs://")
SHARD = OPTIONS.integer("shard", None, "number of the share to make here, from 0", 0, 10**6)
SHARDS = OPTIONS.integer("shards", None, "number of shares of all parts", 1, 10**6)
BATCH = OPTIONS.integer("batch", 8, "captions per device and batch", 1, 65536)
ROWS = OPTIONS.integer("rows_per_part", 256, "rows per file; the same for all shards", 1, 10**6)

if __name__ == "__main__":
    parse("out", strict=False)  # wrong options end it here: the imports below take seconds

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from dopsd_jax.common.atomic import remove_leftovers
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.progress import Progress
from dopsd_jax.conditioning.cached import sees_picture
from dopsd_jax.conditioning.encoding import Encoder
from dopsd_jax.data import prepared_parts as parts
from dopsd_jax.data import sets
from dopsd_jax.data.dataset import Dataset, describe, spread
from dopsd_jax.data.measure import measure
from dopsd_jax.data.table import WHOLE, Chosen
from dopsd_jax.data.varied import EMPTY
from dopsd_jax.families.base import STUDENT, TEACHER
from dopsd_jax.methods import registry
from dopsd_jax.parallel import multihost
from dopsd_jax.parallel.preemption import leave_at_once
from dopsd_jax.run import build, data_set, prepared_folder
from dopsd_jax.run.lock import exclusive
from dopsd_jax.run.workdir import find_workdir

SHOWN = 64  # rows whose pictures are kept, for previews
ANCHORS = "anchors"  # in messages
THREADS = 16  # parts that are looked at together


def main() -> None:
    config = CONFIG.value
    leave_at_once("stopped; the same command goes on after the last part that is complete")

    # ---- What is to be made; an earlier preparation in the folder must be of the same data.
    with multihost.together():
        workdir = find_workdir(WORKDIR.value, config)
        shard, shards = own_share()
        if parts.names_prepared(config.data.path):
            raise UserError(f"config.data.path {config.data.path}: is a prepared data set already")
        needs = registry.needs(config)
        if needs.target or needs.prior:
            raise UserError(
                f"config.method: {config.method} learns from what a prepared data set does not "
                "hold; train with the pictures themselves"
            )

    out = parts.local(OUT.value)
    with contextlib.ExitStack() as stack:
        with multihost.together():
            # Other shards may be at work in the same folder: each has a lock of its own.
            file = f"{parts.LOCK}{shard}-of-{shards}.json"
            stack.enter_context(exclusive(out, "preparation", file=file))
            remove_leftovers(out)
        prepare(config, workdir, out, shard, shards)


def prepare(
    config: ConfigDict, workdir: epath.Path, out: epath.Path, shard: int, shards: int
) -> None:
    """Writes one shard's parts to `out`."""
    new = parts.holds_nothing(out)

    def open_source():
        pipe, _ = build.open_pipeline(config, workdir)
        rows = data_set.open_rows(config, workdir)
        roots = prepared_folder.name_roots(data_set.data_paths(config, workdir))
        manifest = prepared_folder.describe_source(config, workdir, pipe, rows, roots, ROWS.value)
        return pipe, rows, roots, manifest, prepared_folder.open_folder(out, manifest, new)

    pipe, rows, roots, manifest, folder = multihost.first_alone(open_source)
    if config.anchor.share:
        keys = data_set.trained_keys(config, rows.prompt_keys)
        open_anchors = lambda: prepared_folder.anchors_beside(
            config, workdir, pipe, rows, keys, out, new, ROWS.value
        )
        prompts, of_anchors, beside = multihost.first_alone(open_anchors)

    # ---- This shard's share of it, without what is done. Everything that can be wrong with its
    # rows is found before anything is encoded.
    name, work = f"shard {shard} of {shards}", []
    with multihost.together():
        todo = undone(folder, manifest, shard, shards, name)
        index = data_set.picture_index(config, workdir, name)
        numbers_of = lambda some: [row for part in some for row in manifest.rows_of(part)]
        share = lambda numbers: dataclasses.replace(rows, rows=Chosen(rows.rows, numbers), sets=())
        measured = lambda rows: measure(
            rows,
            data_set.data_buckets(config, pipe.size_multiple),
            data_set.limits(config),
            index=index,
            reference_size=data_set.reference_size(config, pipe),
            levels=data_set.data_levels(config, pipe.size_multiple),
            masked=config.data.masks,
        )
        own = range(shard, manifest.parts, shards)
        whole = None
        if own and data_set.shows_others(config, pipe.family):  # they may lie in another shard
            whole = data_set.with_others(config, measured(rows))

        def of_parts(some: Sequence[int]) -> Dataset:
            numbers = numbers_of(some)
            found = measured(share(numbers))
            others = found.others if whole is None else whole.part(numbers).others
            return dataclasses.replace(found, others=others)

        if done := [part for part in own if part not in todo]:
            changed = prepared_folder.outdated(folder, manifest, done, of_parts(done))
            todo = sorted([*todo, *changed])
        if todo:
            numbers, dataset = numbers_of(todo), of_parts(todo)
            if len(numbers) == manifest.rows:  # else other shards may have masks
                data_set.check_masks(config, dataset)
            data_set.check_references(config, pipe.family, dataset)
            lines = describe(dataset, config.batch_size * config.accumulate)
            print("\n".join([*sets.describe(rows.sets), *lines]), flush=True)
            keys = data_set.trained_keys(config, dataset.prompt_keys)
            encoder = Encoder(pipe, dataclasses.replace(dataset, prompt_keys=keys), config)
            kinds = (STUDENT, *[TEACHER] * sees_picture(config, pipe.family))
            shown = set(spread(manifest.rows, SHOWN))
            work.append(Work(folder, manifest, todo, encoder, kinds, roots, shown))
        if config.anchor.share and (todo := undone(beside, of_anchors, shard, shards, ANCHORS)):
            numbers = [row for part in todo for row in of_anchors.rows_of(part)]
            encoder = Encoder(pipe, prompts.part(numbers), config)
            work.append(Work(beside, of_anchors, todo, encoder, (STUDENT,), (), set()))
        made = [(one.layouts(), one.masks()) for one in work]

    # ---- Part by part. Processes that finish first wait for the others.
    with multihost.together():
        if work:
            devices = jax.local_devices()
            print(f"{name}: encoding on {len(devices)} devices", flush=True)
            if len(devices) > 1:
                pipe.spread_encoders(devices)
            batch = BATCH.value * len(devices)
            for one, own in zip(work, made, strict=True):
                write_parts(one, *own, batch)
    print(f"prepared: {folder}, {name}", flush=True)


class Work(NamedTuple):
    """The parts `todo` of a folder: the encoder has their rows, in order; `kinds`: of features.

    shown: rows whose pictures are kept.
    """

    folder: epath.Path
    manifest: parts.Manifest
    todo: list[int]
    encoder: Encoder
    kinds: tuple[int, ...]
    roots: Sequence[Path]
    shown: set[int]

    def layouts(self) -> list[tuple[parts.Layout, ...]]:
        """Of the features of all captions, by role; empty where none are kept.

        Raises `UserError` with every caption that is too long.
        """
        dataset = self.encoder.dataset
        wanted = dict.fromkeys(dataset.captions(), self.kinds)
        wanted |= dict.fromkeys(dataset.captions([EMPTY]), (STUDENT,))
        shapes = self.encoder.shapes(wanted)
        return [
            tuple(parts.layout_of(shapes.get((caption, role), {})) for role in range(parts.ROLES))
            for caption in wanted
        ]

    def masks(self) -> dict[int, bytes]:
        """PNG files by row. Raises `UserError` with every mask of which nothing is left."""
        encoder = self.encoder
        return {row: png(mask) for row, mask in encoder.masks(encoder.dataset.masked())}


def undone(
    folder: epath.Path, manifest: parts.Manifest, shard: int, shards: int, name: str
) -> list[int]:
    """The parts of this shard that are not there yet."""
    own = range(shard, manifest.parts, shards)
    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(lambda part: prepared_folder.is_done(folder, part, manifest), own)
        todo = [part for part, whole in zip(own, done, strict=True) if not whole]
    count = f"{len(own)} of {manifest.parts} parts, {len(own) - len(todo)} done"
    print(f"{name}: {count}", flush=True)
    return todo


def own_share() -> tuple[int, int]:
    """Which share of the parts is made here, and of how many."""
    shard, shards, count = SHARD.value, SHARDS.value, jax.process_count()
    if shard is None and shards is None:
        return jax.process_index(), count
    if count > 1:
        raise UserError(
            f"--shard, --shards: the {count} processes divide the parts themselves; leave them "
            "out, or give --distributed=off"
        )
    if shard is None or shards is None:
        raise UserError("--shard, --shards: belong together; give both, such as 0 and 4")
    if shard >= shards:
        raise UserError(f"--shard={shard}: must be below --shards={shards}")
    return shard, shards


def write_parts(
    work: Work,
    layouts: Sequence[tuple[parts.Layout, ...]],
    masks: Mapping[int, bytes],
    batch: int,
) -> None:
    """Encodes and writes the parts of `work`; `layouts`, `masks`: its own."""
    dataset, encoder = work.encoder.dataset, work.encoder
    captions = dataset.captions()
    progress = Progress("encoding", sum(bool(one) for pair in layouts for one in pair))
    row = caption = 0  # the first ones of the part, among the data set's
    for part in work.todo:
        pictures, records = io.BytesIO(), []
        for number in work.manifest.rows_of(part):
            shown = number in work.shown
            kept = [encoder.image(row), *encoder.edited(row)] if shown else []
            kept = [keep(png(image), pictures) for image in kept]
            mask = keep(masks[row], pictures) if row in masks else None
            records.append(record(dataset, row, work.roots, kept, mask))
            row += 1
        own = captions[caption : caption + sum(len(r["captions"]) for r in records)]
        sizes = layouts[caption : caption + len(own)]
        kinds = {
            name: [role for role, layout in enumerate(pair) if layout]
            for name, pair in zip(own, sizes, strict=True)
        }
        made = encoder.encode(kinds, batch)
        place = {name: i for i, name in enumerate(own)}
        parts.write_part(
            work.folder / parts.part_name(part),
            work.manifest.identity,
            sizes,
            ((place[name], role, features) for name, role, features in progress.over(made)),
            records,
            pictures.getvalue(),
        )
        caption += len(own)


def png(image: np.ndarray) -> bytes:
    """A picture or a mask as PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def keep(content: bytes, pictures: io.BytesIO) -> list[int]:
    """Appends a file; its place, size and checksum."""
    place = pictures.tell()
    pictures.write(content)
    return [place, len(content), zlib.crc32(content)]


def record(
    dataset: Dataset,
    row: int,
    roots: Sequence[Path],
    shown: list[list[int]],
    mask: list[int] | None,
) -> Mapping[str, Any]:
    """What a part says of a row."""
    info, view = dataset.infos[row], dataset.rows[row].view
    further = {parts.VIEW: list(map(int, view))} if view != WHOLE else {}
    further |= {parts.MASK: [dataset.masks[row], *mask]} if mask else {}
    further |= {parts.OTHER: dataset.others[row].digest} if dataset.others else {}
    return {
        "captions": [list(caption) for caption in dataset.rows[row].captions],
        "picture": prepared_folder.picture_name(dataset.rows[row].image, roots),
        "digest": info.digest,
        "notes": list(info.notes),
        "size": [info.width, info.height],
        "bucket": list(dataset.buckets[row]),
        "references": dataset.references[row] if dataset.references else [],
        "shown": shown,
    } | further


if __name__ == "__main__":
    cluster.run(main)
