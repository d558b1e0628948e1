"""What layouts of archives share: which files they are, and an index of each that is kept.

An archive is read once from start to end; its index (where each picture's bytes are, and the
captions) is cached under the archive's path, size and time. Nothing is unpacked: names inside an
archive are labels and never become paths.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import open_regular
from dopsd_jax.data.blobs import ARCHIVES
from dopsd_jax.data.sources.collector import NOT_READ, Collector, listing
from dopsd_jax.data.sources.files import IMAGE_SUFFIXES, walk
from dopsd_jax.data.sources.layout import Options
from dopsd_jax.data.sources.records import METADATA

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
VERSION = 2  # of the index
AGAIN = "make the archive again"


class Entry(NamedTuple):
    """A picture of an archive with its captions: a list of (key, text)."""

    name: str
    place: int
    size: int
    captions: list


class Index(NamedTuple):
    """What an archive holds, and what is wrong with it."""

    entries: list[Entry]
    problems: list[str]


def given_up(path: Path, problems: list[str]) -> Index:
    """The index of an archive with `MAX_PROBLEMS` faults, which is not read to the end."""
    return Index([], [f"{path}: is no data set; {NOT_READ}", *problems])


def matches(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether `path` means files with one of these endings."""
    # Searched as one text, since a folder may hold millions of pictures.
    text = "\0".join([*_names(path), ""]).lower()
    return any(f"{suffix}\0" in text for suffix in suffixes)


def _names(path: Path) -> list[str]:
    """The files that a path means: itself, those in it (by their names), or those it matches."""
    if path.is_dir():
        return [name for name in os.listdir(path) if name[0] not in "._"]
    if has_wildcard(path):
        return glob.glob(str(path), recursive=True)
    return [str(path)] if path.exists() else []


def has_wildcard(path: Path) -> bool:
    return not path.exists() and any(letter in str(path) for letter in "*?[")


def archives_at(path: Path, suffix: str) -> list[Path]:
    """The archives of one kind that `path` means, in order. Raises `UserError` for a mixture."""
    files = [path / name if path.is_dir() else Path(name) for name in sorted(_names(path))]
    compressed = [file for file in files if file.name.lower().endswith(COMPRESSED)]
    found = [file for file in files if file.suffix.lower() == suffix]
    others = [file for file in files if file.suffix.lower() in ARCHIVES and file not in found]
    if has_wildcard(path) and len(found) + len(compressed) + len(others) < len(files):
        known = (*found, *compressed, *others)
        rest = listing(file.name for file in files if file not in known)
        raise UserError(
            f"data.path {path}: also matches {rest}; a pattern must match "
            f"{' or '.join(ARCHIVES)} files only"
        )
    if compressed:
        raise UserError(
            f"data.path {path}: {listing(f.name for f in compressed)}: a compressed archive has no "
            "random access; unpack it to .tar"
        )
    if others:
        raise UserError(f"data.path {path}: holds both {' and '.join(ARCHIVES)}; keep one kind")
    loose = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES or f.name in METADATA]
    if path.is_dir() and loose:
        raise UserError(
            f"data.path {path}: holds archives and also {listing(f.name for f in loose)}; keep "
            "them in different folders"
        )
    return found


def read_archives(
    path: Path, options: Options, suffix: str, read: Callable[[Path, Options], Index]
) -> Collector:
    """The rows of all archives that `path` means; `read` makes the index of one."""
    paths = archives_at(path, suffix)
    into = options.collector(path, "samples")
    archive = ARCHIVES[suffix]
    if path.is_dir() and (inside := _inside(path)):
        into.notes.append(
            f"{path}: {len(inside)} archives and pictures in folders below are not used: "
            f"{listing(inside)}; a pattern such as {path}/**/*{suffix} takes archives there"
        )
    for number, file in enumerate(paths, 1):
        index = _indexed(file, options, read)
        for problem in index.problems:
            into.problem(problem)
        for entry in index.entries:
            blob = archive(file, entry.name, entry.place, entry.size)
            into.add(blob, map(tuple, entry.captions), f"{file.name}:{entry.name}")
        if len(paths) > 1 and (number % 50 == 0 or number == len(paths)):
            print(f"archives: {number}/{len(paths)} indexed, {len(into.table)} rows")
    return into


def _inside(path: Path) -> list[str]:
    """Archives and pictures in the folders of a folder."""
    kinds = {*ARCHIVES, *IMAGE_SUFFIXES}
    found = [Path(where) / file for where, files in walk(path) for file in files]
    below = [file for file in found if file.parent != path and file.suffix.lower() in kinds]
    return [str(file.relative_to(path)) for file in below]


def _indexed(path: Path, options: Options, read: Callable[[Path, Options], Index]) -> Index:
    """The index of one archive, from the cache where the archive is as it was."""
    open_regular(path).close()
    status, cache = path.stat(), options.cache
    stamp = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    stamp += [options.caption_extension, options.caption_lines, options.image_key]
    key = hashlib.sha256(json.dumps(["archive", VERSION, *stamp]).encode()).hexdigest()
    stored = cache.get(key) if cache is not None else None
    if stored is not None:
        lines = stored["samples"].tobytes().splitlines()
        return Index([Entry(*json.loads(line)) for line in lines], [])
    index = read(path, options)
    if not index.entries and not index.problems:
        index.problems.append(f"{path}: holds no pictures; {AGAIN}, or leave it out")
    if cache is not None and not index.problems:
        text = b"\n".join(json.dumps(entry).encode() for entry in index.entries)
        cache.put(key, {"samples": np.frombuffer(text, np.uint8)})
    return index
