"""The files of a folder, and which of them are pictures."""

import os
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from dopsd_jax.data import heic
from dopsd_jax.data.images import FIRST_BYTES, format_of
from dopsd_jax.data.rgb import CONVERT
from dopsd_jax.data.sources.collector import Examples

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif",
    *heic.SUFFIXES,
)  # fmt: skip
UNREADABLE_SUFFIXES = (".jxl", ".jp2", ".psd", ".raw", ".dng", ".svg")
# Files of other programs, with the pictures inside.
FOREIGN = (".arrow", ".lance", ".zip", ".rar", ".7z", ".h5", ".lmdb")
UNPACK = "unpack it to pictures and a metadata.jsonl"
# Endings of files that are surely no pictures, so that they need not be opened.
_OTHER_SUFFIXES = (".txt", ".json", ".jsonl", ".caption", ".npz", ".safetensors")


def walk(folder: Path, passed: Examples | None = None) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `folder` down with its files, links followed, no folder twice.

    What begins with a dot, and folders that begin with an underscore (caches of other trainers),
    are added to `passed` instead. Files that operating systems leave behind are skipped silently.
    """
    passed, seen = Examples() if passed is None else passed, set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        here = os.path.realpath(where)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        for name in sorted(folders):
            if name.startswith((".", "_")) and name != "__MACOSX":
                passed.add(os.path.relpath(os.path.join(where, name), folder) + "/")
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        names = sorted(name for name in names if not is_rubbish(name))
        for name in (name for name in names if name.startswith(".")):
            passed.add(os.path.relpath(os.path.join(where, name), folder))
        yield where, [name for name in names if not name.startswith(".")]


def normal(name: str) -> str:
    """A file name in one form: Macs write é as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def is_rubbish(name: str) -> bool:
    """Whether a file is one that file managers write by themselves."""
    return name.startswith("._") or name in (".DS_Store", "Thumbs.db", "desktop.ini")


def stem_of(path: str) -> str | None:
    """The name of a picture without its ending; None if the file is no picture.

    A file without a known ending is a picture if its first bytes are those of one.
    """
    name = os.path.basename(path)
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in IMAGE_SUFFIXES:
        return stem
    if suffix.lower() in _OTHER_SUFFIXES or not is_regular(path):
        return None
    with open(path, "rb") as file:
        return name if format_of(file.read(FIRST_BYTES)) else None


def unreadable(suffix: str) -> str | None:
    """Why pictures with this ending cannot be read, and what to do; None where they can."""
    if suffix in heic.SUFFIXES:
        return None if heic.available() else heic.MISSING
    if suffix in UNREADABLE_SUFFIXES:
        return f"{suffix[1:]} cannot be read; {CONVERT}"
    return None


def is_regular(path: str) -> bool:
    """Whether a path is a file, after links, and no device or pipe: those may never end."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _refuse(error: OSError) -> None:
    raise error
