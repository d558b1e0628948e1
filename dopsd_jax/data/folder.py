"""Rows laid out as files: pictures with a caption file of the same stem."""

import os
from collections.abc import Iterator
from pathlib import Path

from dopsd_jax.data.records import Examples, listing, not_utf8
from dopsd_jax.data.table import Table

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
UNREADABLE_SUFFIXES = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".raw", ".dng", ".svg")
# Masks and conditions that other trainers keep beside the pictures.
COMPANION_STEMS = ("-masklabel", "-condlabel")
MAX_CAPTION_BYTES = 1 << 20


def read_folder(
    folder: Path, table: Table, caption_extension: str = ".txt", caption_lines: bool = False
) -> tuple[list[str], list[str]]:
    """Adds all pictures of a folder and its subfolders to `table`, in order; faults; notes.

    The whole caption file is one caption; with `caption_lines` each line that is not blank is an
    alternative. Files and folders whose name starts with a dot, and folders whose name starts
    with an underscore (caches of other trainers), are passed over.
    """
    (key,) = table.keys
    problems, companions, lonely, any_image = [], Examples(), Examples(), False
    for where, names in _walk(folder):
        by_stem: dict[str, list[str]] = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in UNREADABLE_SUFFIXES:
                problems.append(
                    f"{os.path.join(where, name)}: {suffix[1:].lower()} cannot be read; convert "
                    "it to PNG or JPEG"
                )
            elif suffix.lower() in IMAGE_SUFFIXES:
                if stem.endswith(COMPANION_STEMS):
                    companions.add(name)
                else:
                    by_stem.setdefault(stem, []).append(name)
        any_image |= bool(by_stem)
        for stem, same in by_stem.items():
            images = [os.path.join(where, name) for name in same]
            caption_file = os.path.join(where, stem + caption_extension)
            if len(same) > 1:
                problems.append(
                    f"{listing(images)} would share the caption {stem + caption_extension}; "
                    "rename or remove all but one"
                )
                continue
            captions, fault = _captions(caption_file, caption_lines)
            if fault:
                there = caption_file if os.path.exists(caption_file) else images[0]
                problems.append(f"{there}: {fault}")
            else:
                table.append(images[0], ((key, text) for text in captions))
        for name in names:
            stem = name.removesuffix(caption_extension)
            if stem != name and stem not in by_stem:
                lonely.add(name)
    notes = []
    if companions:
        notes.append(f"{folder}: masks and condition pictures are not used: {companions}")
    if any_image and lonely:
        notes.append(f"{folder}: captions without a picture are not used: {lonely}")
    return problems, notes


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `folder` down with its files, links followed, no folder twice."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        here = os.path.realpath(where)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        yield where, sorted(name for name in names if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise error


def _captions(path: str, lines: bool) -> tuple[tuple[str, ...], str | None]:
    """The captions of one file, or what is wrong."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CAPTION_BYTES + 1)
    except FileNotFoundError:
        name = os.path.basename(path)
        return (), f"has no caption; write {name} beside it or set data.caption_extension"
    except OSError as error:
        return (), f"cannot be read ({error.strerror}); check the file and its permissions"
    return captions_in(content, lines)


def captions_in(content: bytes, lines: bool) -> tuple[tuple[str, ...], str | None]:
    """The captions in the content of a caption file, or what is wrong."""
    if len(content) > MAX_CAPTION_BYTES:
        return (), "is larger than 1 MiB; this is not a caption"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return (), not_utf8(error)
    if "\0" in text:
        return (), "holds NUL characters; save it as UTF-8 text"
    captions = [line.strip() for line in text.splitlines()] if lines else [text.strip()]
    captions = tuple(caption for caption in captions if caption)
    return captions, None if captions else "is empty; write a caption"
