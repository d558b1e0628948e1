"""The rows of a data set: a picture and its captions, from any of the layouts in `sources`.

A folder written by `dopsd_jax.prepare` is read by `prepared.py`. Nothing is repaired: all faults of
all rows are raised together, before any work is done.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dopsd_jax.common.atomic import is_remote
from dopsd_jax.common.errors import Attempts, UserError, raise_if
from dopsd_jax.common.files import expand, readable
from dopsd_jax.data import masks
from dopsd_jax.data.blobs import ARCHIVES
from dopsd_jax.data.sets import Joined, PartOfRows, parts_of, shares_of
from dopsd_jax.data.sources import array_record, folder, parquet, records, tar
from dopsd_jax.data.sources.archives import has_wildcard
from dopsd_jax.data.sources.collector import Examples, listing
from dopsd_jax.data.sources.files import FOREIGN, IMAGE_SUFFIXES, UNPACK
from dopsd_jax.data.sources.layout import Layout, Options
from dopsd_jax.data.table import WHOLE, RowList, View, in_parts
from dopsd_jax.data.varied import CaptionVariants, Varied
from dopsd_jax.data.views import Viewed

# The first layout that matches reads the data set.
LAYOUTS: list[Layout] = [
    tar.LAYOUT,
    array_record.LAYOUT,
    parquet.LAYOUT,
    records.LAYOUT,
    folder.LAYOUT,
]
# Options that only some layouts use.
ONLY_FOR = {
    "data_root": (records.LAYOUT,),
    "image_key": (records.LAYOUT, parquet.LAYOUT),
    "caption_extension": (folder.LAYOUT, tar.LAYOUT),
    "caption_lines": (folder.LAYOUT, tar.LAYOUT),
    "folder_captions": (folder.LAYOUT,),
    "folder_repeats": (folder.LAYOUT,),
    "references": (records.LAYOUT, folder.LAYOUT),
    "masks": (records.LAYOUT, folder.LAYOUT),
}
# Of these every one of several data sets must make use; of the others, one of them.
BY_ALL = ("references", "masks")
_USUAL = Options()

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Rows:
    """All rows, the prompt keys that every row has, and notes for the user.

    `sets`: which rows are those of which data set, if there are several. `masked`: whether a row
    has a mask file.
    """

    rows: RowList
    prompt_keys: tuple[str, ...]
    notes: tuple[str, ...]
    sets: tuple[PartOfRows, ...] = ()
    masked: bool = False


def load_rows(
    path: str | Path,
    prompt_keys: Sequence[str] | None = None,
    variants: CaptionVariants | None = None,
    views: Sequence[View] = (WHOLE,),
    **options: object,
) -> Rows:
    """Reads the rows at `path`; pictures are only looked for, not opened.

    Without `prompt_keys`, all known keys that every row has are taken, and a note says which. A row
    without a requested caption is an error. `variants`: of the captions. `views`: in which each
    picture is a row. `options`: see `Options`; with masks some row must have one.
    """
    chosen = Options(prompt_keys, **options)
    chosen.check()
    layout = _layout(path)
    raise_if(_unused({str(path): layout}, chosen))
    found = _read(path, layout, chosen, variants, views)
    if chosen.masks and not found.masked:
        raise masks.none_found(str(path))
    return found


def _layout(path: str | Path) -> Layout:
    """How a data set is laid out. Raises `UserError` for what is none."""
    if is_remote(path):
        raise UserError(
            f"data.path {path}: pictures are read from local folders only; mount or download it, "
            "or give a folder made by dopsd_jax.prepare"
        )
    path = expand(path)
    with readable(path):
        layout = next((layout for layout in LAYOUTS if layout.matches(path)), None)
        if layout is None:
            raise UserError(f"data.path {path}: {_what_it_is(path)}")
    return layout


def _unused(layouts: Mapping[str, Layout], chosen: Options) -> list[str]:
    """The lines about options that the data sets make no use of; `layouts`: by path."""
    faults = []
    for name, of in ONLY_FOR.items():
        others = {path: layout for path, layout in layouts.items() if layout not in of}
        used = len(others) < len(layouts) and name not in BY_ALL
        if getattr(chosen, name) == getattr(_USUAL, name) or used or not others:
            continue
        field = name.removeprefix("data_")
        found = " and ".join(f"{path} is read as {one.name}" for path, one in others.items())
        names = " or ".join(one.name for one in of)
        faults.append(f"data.{field} is for {names}, and {found}; unset it")
    return faults


def _read(
    path: str | Path,
    layout: Layout,
    chosen: Options,
    variants: CaptionVariants | None = None,
    views: Sequence[View] = (WHOLE,),
) -> Rows:
    """See `load_rows`; there may be no masks."""
    path = expand(path)
    with readable(path):
        collector = layout.read(path, chosen)
    table, problems, notes = collector.finish()
    if not table and not problems:
        raise UserError(f"{collector.where}: holds no rows")
    raise_if(problems)
    rows: RowList = Varied(table, variants) if variants else table
    masked = False
    if chosen.masks:
        masks.forget()
        with readable(path):
            rows = masks.with_masks(rows)
        masked = rows.any()
    if len(views) > 1:
        rows = Viewed(rows, views)
    notes += _names_sides(table) if any(view.mirrored for view in views) else []
    if variants and variants.orders > 1 and not _has_tags(table, variants):
        notes.append(
            f"{collector.where}: data.shuffle_tags changes nothing here: no caption has two tags "
            f"{f'behind the first {variants.keep}, ' * (variants.keep > 0)}with a comma between "
            "them"
        )
    return Rows(rows, table.keys, tuple(notes), masked=masked)


def _names_sides(table: RowList) -> list[str]:
    """A note about captions that a mirrored picture makes wrong."""
    found = Examples()
    for some in in_parts(len(table)):
        for row, captions in zip(some, table.captions(some), strict=True):
            if any(_SIDES.search(text) for _, text in captions):
                found.add(table.where(row))
    why = "name left or right, and data.flip shows their pictures mirrored too"
    return [f"captions of {found.count} rows {why}: {found}"] * bool(found)


def _has_tags(table: RowList, variants: CaptionVariants) -> bool:
    """Whether some caption has its tags in more than one order."""
    return any(
        len(variants.captions(captions)) > len(captions) + variants.empty
        for some in in_parts(len(table))
        for captions in table.captions(some)
    )


def load_sets(
    paths: Sequence[str],
    weights: Sequence[object],
    prompt_keys: Sequence[str] | None = None,
    variants: CaptionVariants | None = None,
    views: Sequence[View] = (WHOLE,),
    **options: object,
) -> Rows:
    """The rows of all data sets in order; without `weights` each is used once an epoch.

    `options`: of `load_rows`; with masks some row of some set must have one. The faults of all sets
    are raised together.
    """
    shares = shares_of(weights, len(paths))
    if len(paths) == 1:
        return load_rows(paths[0], prompt_keys, variants, views, **options)
    chosen = Options(prompt_keys, **options)
    chosen.check()
    attempt = Attempts()
    firsts: dict[str, str] = {}  # of the paths that mean one place
    for path in paths:
        place = os.path.realpath(os.path.expanduser(path))
        if place in firsts:
            twice = "twice" if path == firsts[place] else f"twice, also as {path}"
            attempt.problems.append(
                f"data.path: names {firsts[place]} {twice}; give it a weight instead"
            )
        firsts.setdefault(place, path)
    layouts = {path: attempt(lambda path=path: _layout(path)) for path in firsts.values()}
    known = {path: layout for path, layout in layouts.items() if layout}
    attempt(lambda: raise_if(_unused(known, chosen)))
    found: dict[str, Rows] = {}
    for path, layout in known.items():
        own = path, layout, chosen, variants, views
        found[path] = attempt(lambda own=own: _read(*own))
    attempt.end()
    masked = any(own.masked for own in found.values())
    if chosen.masks and not masked:
        raise masks.none_found(", ".join(paths))
    keys, notes = _common_keys(found)
    sizes = [len(own.rows) for own in found.values()]
    sets = parts_of(list(found), sizes, shares)
    notes += [note for own in found.values() for note in own.notes]
    rows = Joined([own.rows for own in found.values()], keys)
    return Rows(rows, keys, tuple(notes), sets, masked)


def _common_keys(found: Mapping[str, Rows]) -> tuple[tuple[str, ...], list[str]]:
    """The caption keys that every set has, and a note where others are left out."""
    first, *others = (own.prompt_keys for own in found.values())
    keys = tuple(key for key in first if all(key in other for other in others))
    have = "; ".join(f"{path} has {listing(own.prompt_keys)}" for path, own in found.items())
    if not keys:
        raise UserError(
            f"data.path: its data sets have no caption key in common ({have}); write the captions "
            "of all under one key"
        )
    if all(set(own.prompt_keys) == set(keys) for own in found.values()):
        return keys, []
    return keys, [f"data.path: prompt keys that all sets have: {listing(keys)} ({have})"]


def _what_it_is(path: Path) -> str:
    """Describes a path that no layout matches, and what to do about it."""
    suffix = path.suffix.lower()
    if has_wildcard(path):
        return f"matches no file; a pattern must match {' or '.join(ARCHIVES)} files only"
    if not os.path.exists(path):
        return "no such file or folder"
    if suffix in FOREIGN:
        return f"is not a data set: {suffix[1:]} is not read; {UNPACK}"
    if suffix in IMAGE_SUFFIXES:
        return "is one picture; give the folder it is in"
    return (
        "is not a data set; give a .jsonl, .csv or .json file, a folder of pictures, "
        f"or {' or '.join(ARCHIVES)} files"
    )
