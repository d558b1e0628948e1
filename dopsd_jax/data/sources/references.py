"""The pictures that an editing row starts from: in a table's columns, or in folders beside."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import expand
from dopsd_jax.common.json_fields import kind_of
from dopsd_jax.data.sources.collector import listing
from dopsd_jax.data.sources.files import normal, stem_of, walk

AUTO = "auto"  # data.references: a column of a known name, or all but the last of a list of paths
COLUMNS = ("source_images", "control_path", "edit_image", "reference_images", "references")
MAX_REFERENCES = 10  # of a row
# `stem_0`, `stem_1`: several references of the picture `stem`; columns `control_path_0` likewise.
_NUMBERED = re.compile(r"(.+)_(\d{1,2})", re.DOTALL)

Find = Callable[[str], tuple[str | None, str | None]]  # a name -> its path, or what is wrong


def columns_of(record: Mapping, names: Sequence[str]) -> list[str]:
    """The columns with references, in their order: as they are named, or by their numbers."""
    if tuple(names) != (AUTO,):
        return list(names)
    found = []
    for name in record:
        match = _NUMBERED.fullmatch(name) if isinstance(name, str) and record[name] else None
        stem, number = (match[1], int(match[2])) if match else (name, -1)
        if stem in COLUMNS and record[name]:
            found.append((COLUMNS.index(stem), number, name))
    return [name for _, _, name in sorted(found)]


def of_record(
    record: Mapping, names: Sequence[str], before: Sequence[object], find: Find
) -> tuple[list[str], list[str]]:
    """The references of a table's row, and what is wrong with them.

    `before`: the entries of its list of paths that stand before the picture itself.
    """
    values: list[object] = []
    without = []
    for name in (columns := columns_of(record, names)):
        value = record.get(name)
        own = value if isinstance(value, list) else [] if value in (None, "") else [value]
        without += [] if own else [name]
        values += own
    if without and len(without) < len(columns):
        # What another column has must not take its place: their order is what they mean.
        return [], [
            f"names no picture to edit in {listing(map(repr, without))}; give one, or leave the "
            "column out of data.references"
        ]
    if not columns:
        values = list(before)
    if not values:
        where, way = f"in {listing(map(repr, columns))}", "give one"
        if not columns:
            where = f"before its picture, nor in a column that auto knows ({', '.join(COLUMNS)})"
            way = "name its column in data.references"
        return [], [
            f"names no picture to edit {where}; {way}, or unset data.references for rows that "
            "edit none"
        ]
    if len(values) > MAX_REFERENCES:
        return [], [f"names {len(values)} pictures to edit; give {MAX_REFERENCES} at most"]
    found, faults = [], []
    for value in values:
        if not isinstance(value, str) or not value:
            faults.append(f"names {kind_of(value)} as a picture to edit; it must be a path")
            continue
        path, fault = find(value)
        found += [path] if path else []
        faults += [fault] if fault else []
    return found, faults


class Folders:
    """Folders with pictures of the same names as the data set's: `a.png`, or `a_0.png`, `a_1.png`.

    The first folder's come first. Raises `UserError` for one that is not there.
    """

    def __init__(self, names: Sequence[str]):
        self.paths = [expand(name) for name in names]
        self._found: list[dict[str, list[tuple[int, str]]]] = []
        self._taken: dict[str, str] = {}  # by the first picture that has them
        for path in self.paths:
            if not path.is_dir():
                raise UserError(
                    f"data.references {path}: no such folder; pictures with caption files have "
                    "their references in another folder, under the same names"
                )
            found: dict[str, list[tuple[int, str]]] = {}
            for where, files in walk(path):
                for file in files:
                    name = os.path.join(where, file)
                    stem = stem_of(name)
                    if stem is None:
                        continue
                    stem = normal(os.path.join(os.path.relpath(where, path), stem))
                    found.setdefault(stem, []).append((-1, name))
                    if match := _NUMBERED.fullmatch(stem):
                        found.setdefault(match[1], []).append((int(match[2]), name))
            self._found.append(found)

    def hold(self, where: str) -> bool:
        """Whether a folder is one of these or inside one."""
        inside = Path(os.path.realpath(where))
        return any(inside.is_relative_to(os.path.realpath(path)) for path in self.paths)

    def of_picture(self, folder: str, stem: str) -> tuple[list[str], list[str]]:
        """The references of a picture `stem` in `folder`, relative to the data set; faults."""
        key, paths, without = normal(os.path.join(folder, stem)), [], []
        for path, found in zip(self.paths, self._found, strict=True):
            own = sorted(found.get(key, []))
            whole = [name for number, name in own if number < 0]
            if len(whole) > 1:
                return [], [f"{listing(whole)} have one name; keep one"]
            paths += whole or [name for _, name in own]
            without += [] if own else [path]
        if without:
            # What another folder has must not take its place: their order is what they mean.
            return [], [
                f"has no picture to edit in {listing(without)}; put one of the same name there, or "
                "unset data.references for rows that edit none"
            ]
        for path in paths:
            if (first := self._taken.setdefault(path, key)) != key:
                # a_1.png is what a_1.png edits, or one of those of a.png: not both.
                return [], [
                    f"has {path} to edit, which {os.path.normpath(first)} has too; put "
                    "one of this very name there"
                ]
        if len(paths) > MAX_REFERENCES:
            return [], [f"has {len(paths)} pictures to edit; keep {MAX_REFERENCES} at most"]
        return paths, []
