"""Rows laid out as files: pictures with a caption file of the same stem."""

import os
from dataclasses import dataclass
from pathlib import Path

from dopsd_jax.data.records import listing, not_utf8

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
UNREADABLE_SUFFIXES = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".raw", ".dng", ".svg")
# Masks and conditions that other trainers keep beside the pictures.
COMPANION_STEMS = ("-masklabel", "-condlabel")
MAX_CAPTION_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CaptionedFile:
    """A picture, its caption file, and the captions in it."""

    image: Path
    caption_file: Path
    captions: tuple[str, ...]


def read_folder(
    folder: Path, caption_extension: str = ".txt", caption_lines: bool = False
) -> tuple[list[CaptionedFile], list[str], list[str]]:
    """All pictures of a folder and its subfolders, in sorted order; faults; notes.

    The whole caption file is one caption; with `caption_lines` each line that is not blank is an
    alternative. Files and folders whose name starts with a dot, and folders whose name starts
    with an underscore (caches of other trainers), are passed over.
    """
    files = _walk(folder)
    images, problems, notes = [], [], []
    companions = []
    for path in files:
        suffix = path.suffix.lower()
        if suffix in UNREADABLE_SUFFIXES:
            problems.append(f"{path}: {suffix[1:]} cannot be read; convert it to PNG or JPEG")
        elif suffix in IMAGE_SUFFIXES:
            (companions if path.stem.endswith(COMPANION_STEMS) else images).append(path)
    if companions:
        notes.append(
            f"{folder}: masks and condition pictures are not used: "
            f"{listing(p.name for p in companions)}"
        )

    by_stem: dict[Path, list[Path]] = {}
    for path in images:
        by_stem.setdefault(path.with_suffix(""), []).append(path)
    rows = []
    for stem, same in by_stem.items():
        caption_file = stem.with_name(stem.name + caption_extension)
        if len(same) > 1:
            problems.append(
                f"{listing(same)} would share the caption {caption_file.name}; rename or remove "
                "all but one"
            )
            continue
        captions, fault = _captions(caption_file, caption_lines)
        if fault:
            problems.append(f"{same[0] if not caption_file.exists() else caption_file}: {fault}")
        else:
            rows.append(CaptionedFile(same[0], caption_file, captions))

    lonely = [
        path.name
        for path in files
        if path.name.endswith(caption_extension)
        and path.with_name(path.name.removesuffix(caption_extension)) not in by_stem
    ]
    if images and lonely:
        notes.append(f"{folder}: captions without a picture are not used: {listing(lonely)}")
    return rows, problems, notes


def _walk(folder: Path) -> list[Path]:
    """Every file below `folder`, links followed, no folder twice."""
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        here = os.path.realpath(where)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        found += [Path(where, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _refuse(error: OSError) -> None:
    raise error


def _captions(path: Path, lines: bool) -> tuple[tuple[str, ...], str | None]:
    """The captions of one file, or what is wrong."""
    try:
        if path.stat().st_size > MAX_CAPTION_BYTES:
            return (), "is larger than 1 MiB; this is not a caption"
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return (), f"has no caption; write {path.name} beside it or set data.caption_extension"
    except OSError as error:
        return (), f"cannot be read ({error.strerror}); check the file and its permissions"
    except UnicodeDecodeError as error:
        return (), not_utf8(error)
    if "\0" in text:
        return (), "holds NUL characters; save it as UTF-8 text"
    captions = [line.strip() for line in text.splitlines()] if lines else [text.strip()]
    captions = tuple(caption for caption in captions if caption)
    return captions, None if captions else "is empty; write a caption"
