"""Pictures of a folder that have no caption yet, and the file where each one's belongs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dopsd_jax.common.atomic import NOT_UTF8
from dopsd_jax.common.errors import UserError, is_utf8
from dopsd_jax.common.files import BOM, read_bytes, readable
from dopsd_jax.data.sources.captions import MAX_CAPTION_BYTES
from dopsd_jax.data.sources.collector import Examples, listing
from dopsd_jax.data.sources.files import normal, stem_of, unreadable, walk
from dopsd_jax.data.sources.folder import COMPANION_STEMS, is_companion
from dopsd_jax.data.sources.sidecars import SUFFIXES, captions_beside, several_texts


class Wanted(NamedTuple):
    """A picture, and the caption file that belongs beside it."""

    picture: str
    text: str


class Uncaptioned(NamedTuple):
    """What is to be captioned, in order of names; `captioned`: how many pictures have one.

    notes: pictures that are passed over; faults: files that are no usable picture or caption.
    """

    wanted: list[Wanted]
    captioned: int
    notes: list[str]
    faults: list[str]


def find(top: Path, extension: str, *, overwrite: bool = False) -> Uncaptioned:
    """Looks through a folder and its subfolders as training does, for pictures without a caption.

    A caption is what training takes for one: the file of the same stem that ends with `extension`
    and holds more than blanks, or a file of `sidecars`. `overwrite`: they are all wanted. Raises
    `UserError` where there is no picture.
    """
    with readable(top):
        return _find(top, extension, overwrite)


def _find(top: Path, extension: str, overwrite: bool) -> Uncaptioned:
    found, masks, captioned = Uncaptioned([], 0, [], []), Examples(), 0
    for where, names in walk(top):
        pictures: dict[str, list[str]] = {}
        texts: dict[str, list[str]] = {}
        beside: dict[str, list[str]] = {}
        for name in names:
            path = os.path.join(where, name)
            stem, suffix = os.path.splitext(name)
            if fault := unreadable(suffix.lower()):
                found.faults.append(f"{path}: {fault}")
            elif name.lower().endswith(extension.lower()):
                texts.setdefault(normal(name[: -len(extension)]), []).append(path)
            elif suffix.lower() in SUFFIXES:
                beside.setdefault(normal(stem), []).append(path)
            elif (stem := stem_of(path)) is not None:
                pictures.setdefault(normal(stem), []).append(path)
        for stem, same in pictures.items():
            # Some programs write a.txt, some a.png.txt.
            stems = (stem, normal(os.path.basename(same[0])))
            text, *others = next((texts[name] for name in stems if name in texts), [None])
            has, fault = _has_caption(
                text, [path for name in stems for path in beside.get(name, ())]
            )
            if stem.endswith(COMPANION_STEMS) or (
                not has and is_companion(where, str(top), stem, pictures)
            ):
                masks.add(os.path.relpath(same[0], top))
            elif not is_utf8(same[0]):
                found.faults.append(f"{same[0]}: {NOT_UTF8}")
            elif len(same) > 1:
                found.faults.append(
                    f"{listing(same)} would share the caption {stem}{extension}; "
                    "rename or remove all but one"
                )
            elif others:
                found.faults.append(several_texts([text, *others]))
            elif fault and not overwrite:
                found.faults.append(fault)
            elif has and not overwrite:
                captioned += 1
            else:
                own = os.path.join(where, stem_of(same[0]) or stem) + extension
                found.wanted.append(Wanted(same[0], text or own))
    if not (found.wanted or found.faults or captioned):
        raise UserError(f"--images {top}: no pictures in this folder")
    if masks:
        found.notes.append(f"{top}: masks and condition pictures are passed over: {masks}")
    return found._replace(captioned=captioned)


def _has_caption(text: str | None, beside: Sequence[str]) -> tuple[bool, str | None]:
    """Whether a picture has a caption in its caption file or in those beside it; what is wrong."""
    if text:
        try:
            content = read_bytes(text, MAX_CAPTION_BYTES)
        except UserError as error:
            return True, str(error)
        if content.removeprefix(BOM).strip():
            return True, None
    captions, fault = captions_beside(beside, lines=False)
    return bool(captions or fault), fault
