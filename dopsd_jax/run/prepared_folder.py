"""The folder of a prepared data set: what it was begun with, and which of its parts are done."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from dopsd_jax.common import errors
from dopsd_jax.common.config_fields import as_list
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import expand
from dopsd_jax.conditioning import anchors
from dopsd_jax.conditioning.cached import DIGESTS
from dopsd_jax.conditioning.features import prepared_settings
from dopsd_jax.data import prepared_parts as parts
from dopsd_jax.data.blobs import Blob
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.prepared import short
from dopsd_jax.data.rows import Rows
from dopsd_jax.data.table import DataRow
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.run import data_set


def describe_source(
    config: ConfigDict,
    workdir: epath.Path,
    pipe: Pipeline,
    rows: Rows,
    roots: Sequence[Path],
    rows_per_part: int,
) -> parts.Manifest:
    """What all parts have in common."""
    memo = data_set.cache_folder(config, workdir) / DIGESTS
    made_from = data_set.data_settings(config, pipe) | prepared_settings(config, pipe, memo)
    made_from[data_set.READING] = data_set.reading(config)
    source = source_digest(rows.rows, roots)
    several = tuple((Path(one.path).name, len(one.rows)) for one in rows.sets)
    weights = tuple(map(str, as_list(config.data.weights))) if several else ()
    return parts.Manifest(
        len(rows.rows), rows_per_part, rows.prompt_keys, source, made_from, several, weights
    )


def anchors_beside(
    config: ConfigDict,
    workdir: epath.Path,
    pipe: Pipeline,
    rows: Rows,
    keys: Sequence[str],
    out: epath.Path,
    new: bool,
    rows_per_part: int,
) -> tuple[Dataset, parts.Manifest, epath.Path]:
    """The prompts of config.anchor as a data set, and the folder for their features."""
    prompts = anchors.prompt_set(anchors.choose(config, rows.rows, keys))
    made_from = anchors.settings(config, pipe, data_set.cache_folder(config, workdir))
    source = source_digest(prompts.rows, ())
    manifest = parts.Manifest(len(prompts.rows), rows_per_part, (anchors.KEY,), source, made_from)
    return prompts, manifest, open_folder(out / anchors.FOLDER, manifest, new)


def open_folder(folder: epath.Path, manifest: parts.Manifest, new: bool = False) -> epath.Path:
    """Makes the folder, or checks that what it holds was made from the same.

    new: it holds nothing yet: what was begun there had faults, which are mended now.
    """
    if not parts.is_prepared(folder):
        parts.make_folder(folder)
        parts.write_manifest(folder, manifest)
        return folder
    old = parts.read_manifest(folder)
    faults = [
        f"{folder}: was begun with {what} {was}, now {now}; give another --out, or set it back"
        for what, was, now in (
            ("--rows_per_part", old.rows_per_part, manifest.rows_per_part),
            ("prompt keys", old.prompt_keys, manifest.prompt_keys),
            ("rows", old.rows, manifest.rows),
            ("data sets", old.sets, manifest.sets),
            ("config.data.weights", old.weights, manifest.weights),
        )
        if was != now
    ]
    if not faults and old.source != manifest.source:
        faults.append(
            f"{folder}: was begun with other captions or names of pictures; give another --out"
        )
    faults += [
        f"{folder}: was begun with {name} {short(old.settings.get(name))}, now "
        f"{short(manifest.settings.get(name))}; give another --out, or set it back"
        for name in old.settings | manifest.settings
        if old.settings.get(name) != manifest.settings.get(name)
    ]
    if faults and new:
        parts.write_manifest(folder, manifest)
        return folder
    errors.raise_if(faults)
    return folder


def is_done(folder: epath.Path, part: int, manifest: parts.Manifest) -> bool:
    """Whether a part is there and whole; one that is not is made again."""
    path = folder / parts.part_name(part)
    with parts.reading(path):
        if not path.exists():
            return False
    try:
        parts.read_part(path, manifest.identity)
    except UserError as error:
        print(f"{error.problems[0]} (it is made again now)", flush=True)
        return False
    return True


def outdated(
    folder: epath.Path, manifest: parts.Manifest, done: Sequence[int], dataset: Dataset
) -> list[int]:
    """The parts that were made of other pictures; `dataset`: the rows of `done` as they are now."""
    found, row, facts = [], 0, functools.partial(_facts, dataset)
    beside = " or what its teacher is shown" if dataset.others else ""
    for part in done:
        path = folder / parts.part_name(part)
        told = parts.read_part(path, manifest.identity).rows
        changed = [
            old["picture"]
            for old, now in zip(told, map(facts, range(row, row + len(told))), strict=True)
            if now != [
                old["digest"], old["references"], old.get(parts.MASK, [""])[0],
                old.get(parts.OTHER, now[-1]),  # older parts do not say
            ]
        ]  # fmt: skip
        if changed:
            print(
                f"{path}: {changed[0]}{beside} was changed since (it is made again now)", flush=True
            )
            found.append(part)
        row += len(told)
    return found


def _facts(dataset: Dataset, row: int) -> list:
    """The digests of a row's pictures, as JSON has them.

    Its own, its references', its mask's, and that of another one that its teacher is shown.
    """
    edited = dataset.references[row] if dataset.references else ()
    references = [[one.digest, list(one.size)] for one in edited]
    mask = dataset.masks[row] if dataset.masks else ""
    other = dataset.others[row].digest if dataset.others else ""
    return [dataset.infos.digest(row), references, mask, other]


def name_roots(paths: Sequence[str | Path]) -> tuple[Path, ...]:
    """The folders below which pictures are named; of several data sets the names say which."""
    roots = [expand(path) for path in paths]
    roots = [root if os.path.isdir(root) else root.parent for root in roots]
    return tuple(roots if len(roots) == 1 else (root.parent for root in roots))


def source_digest(rows: Sequence[DataRow], roots: Sequence[Path]) -> str:
    """sha256 over the rows as they are named and captioned, wherever the folders lie."""
    total = hashlib.sha256()
    for row in rows:
        names = [picture_name(picture, roots) for picture in (row.image, *row.references)]
        mask = [picture_name(row.mask, roots)] if row.mask else []
        total.update(json.dumps([*names, row.captions, *mask]).encode())
    return total.hexdigest()


def picture_name(picture: Path | Blob, roots: Sequence[Path]) -> str:
    """Its name below the data set's folder."""
    name = str(picture)
    starts = (f"{root}{os.sep}" for root in roots)
    return name.removeprefix(next((start for start in starts if name.startswith(start)), ""))
