"""Pictures of a folder that have no caption yet, and the file where each one's belongs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import read_bytes
from dopsd_jax.data.sources.captions import MAX_CAPTION_BYTES
from dopsd_jax.data.sources.collector import Examples, listing
from dopsd_jax.data.sources.files import UNREADABLE_SUFFIXES, normal, stem_of, walk
from dopsd_jax.data.sources.folder import COMPANION_STEMS, MASK_FOLDERS, MASK_STEMS
from dopsd_jax.data.sources.sidecars import SUFFIXES, captions_beside


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
    found, masks = Uncaptioned([], 0, [], []), Examples()
    captioned = 0
    for where, names in walk(top):
        files = {normal(name): os.path.join(where, name) for name in names}
        pictures: dict[str, list[str]] = {}
        for path in files.values():
            suffix = os.path.splitext(path)[1].lower()
            if suffix in UNREADABLE_SUFFIXES:
                found.faults.append(
                    f"{path}: {suffix[1:]} cannot be read; convert it to PNG or JPEG"
                )
            elif not path.lower().endswith(extension.lower()):
                stem = stem_of(path)
                if stem is not None:
                    pictures.setdefault(normal(stem), []).append(path)
        in_masks = where != str(top) and os.path.basename(where).lower() in MASK_FOLDERS
        for stem, same in pictures.items():
            whole = normal(os.path.basename(same[0]))
            text, has, fault = _caption(files, (stem, whole), extension)
            if stem.endswith(COMPANION_STEMS) or not has and (in_masks or _is_mask(stem, pictures)):
                masks.add(os.path.relpath(same[0], top))
            elif len(same) > 1:
                found.faults.append(
                    f"{listing(same)} would share the caption {stem}{extension}; "
                    "rename or remove all but one"
                )
            elif fault and not overwrite:
                found.faults.append(fault)
            elif has and not overwrite:
                captioned += 1
            else:
                beside = os.path.splitext(same[0])[0] if stem != whole else same[0]
                found.wanted.append(Wanted(same[0], text or beside + extension))
    if not (found.wanted or found.faults or captioned):
        raise UserError(f"--images {top}: no pictures in this folder")
    if masks:
        found.notes.append(f"{top}: masks and condition pictures are passed over: {masks}")
    return found._replace(captioned=captioned)


def _caption(
    files: Mapping[str, str], stems: Sequence[str], extension: str
) -> tuple[str | None, bool, str | None]:
    """The caption file of a picture if there is one, whether there is a caption, what is wrong.

    `stems`: some programs write a.txt, some a.png.txt.
    """
    lower = {name.lower(): path for name, path in files.items()}
    for stem in stems:
        path = files.get(stem + extension) or lower.get((stem + extension).lower())
        if path:
            try:
                content = read_bytes(path, MAX_CAPTION_BYTES)
            except UserError as error:
                return path, True, str(error)
            return path, bool(content.removeprefix(b"\xef\xbb\xbf").strip()), None
    for stem in stems:
        paths = [files[stem + suffix] for suffix in SUFFIXES if stem + suffix in files]
        captions, fault = captions_beside(paths, lines=False)
        if captions or fault:
            return None, True, fault
    return None, False, None


def _is_mask(stem: str, pictures: Mapping[str, object]) -> bool:
    return any(stem.endswith(end) and stem.removesuffix(end) in pictures for end in MASK_STEMS)
