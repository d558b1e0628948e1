"""Layout: pictures with a caption file of the same stem, in a folder and its subfolders."""

import os
import re
from collections.abc import Container
from pathlib import Path

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import read_bytes
from dopsd_jax.data import masks
from dopsd_jax.data.sources.captions import (
    CAPTION_KEY,
    MAX_CAPTION_BYTES,
    captions_in,
    json_captions,
)
from dopsd_jax.data.sources.collector import Collector, Examples, listing
from dopsd_jax.data.sources.files import (
    FOREIGN,
    UNPACK,
    normal,
    stem_of,
    unreadable,
    walk,
)
from dopsd_jax.data.sources.layout import Layout, Options
from dopsd_jax.data.sources.references import Folders
from dopsd_jax.data.sources.sidecars import SUFFIXES, captions_beside, several_texts

# Masks and conditions that other trainers keep beside the pictures. Those of the second kind, and
# pictures in a folder of such a name, are taken for them only where they have no caption.
COMPANION_STEMS = ("-masklabel", "-condlabel")
_ENDINGS = ("_mask", "-mask", ".mask")
_FOLDERS = ("mask", "masks", "control", "conditioning", "conditioning_images")
TEXT_SUFFIXES = (".txt", ".caption", ".json", ".cap", ".tags", ".text")
TABLE_SUFFIXES = (".jsonl", ".csv")
JSON = ".json"
# A folder of kohya's trainers, `10_name`: its pictures count ten times.
_NUMBERED = re.compile(r"(\d{1,4})_(.*\S.*)", re.DOTALL)


def matches(path: Path) -> bool:
    return path.is_dir()


def is_companion(where: str, top: str, stem: str, pictures: Container[str]) -> bool:
    """Whether a picture without a caption is a mask or a condition; see `masks.is_mask`."""
    return masks.is_mask(where, top, stem, pictures, _FOLDERS, _ENDINGS)


def read(path: Path, options: Options) -> Collector:
    """All pictures in order, each with its caption file.

    The caption file is one caption, or with `caption_lines` one in each line that is not blank;
    where `caption_extension` is .json, a JSON object with captions under known keys. A picture
    without one takes what `sidecars` finds beside it.
    """
    json = options.caption_extension.lower() == JSON
    into = options.collector(path, "pictures", None if json else (CAPTION_KEY,))
    if not json:
        _check_keys(options)
    reader = _Reader(path, options, into)
    for where, names in walk(path, reader.passed):
        if not reader.references.hold(where):
            reader.read(where, names)
    reader.remark()
    return into


def _check_keys(options: Options) -> None:
    """A caption file has one key."""
    keys = options.prompt_keys
    if keys is not None and tuple(keys) != (CAPTION_KEY,):
        raise UserError(
            f"{options.keys_field} {listing(keys)}: a folder with caption files has only the key "
            f"{CAPTION_KEY!r}; unset it"
        )
    if options.teacher_key not in (None, CAPTION_KEY):
        raise UserError(
            f"teacher.prompt_key {options.teacher_key!r}: a folder with caption files has only the "
            f"key {CAPTION_KEY!r}; write metadata.jsonl with both captions"
        )


class _Reader:
    """Reads folder after folder, and remembers what was left out."""

    def __init__(self, top: Path, options: Options, into: Collector):
        self.top, self.options, self.into = top, options, into
        self.prefix = os.path.join(top, "")  # of every path below, as `walk` names them
        self.extension = options.caption_extension.lower()
        self.references = Folders(options.references)
        self.masks, self.lonely, self.others = Examples(), Examples(), Examples()
        self.masks_would_do = False
        self.passed, self.numbered = Examples(), Examples()
        self.tables, self.foreign = Examples(), Examples()
        self.beside = Examples()

    def read(self, where: str, names: list[str]) -> None:
        """Adds the pictures of one folder."""
        pictures: dict[str, list[str]] = {}
        texts: dict[str, list[str]] = {}
        beside: dict[str, list[str]] = {}
        companions: dict[str, str] = {}
        folder = os.path.join(where, "")
        for name in names:
            path = folder + name
            stem, suffix = os.path.splitext(name)
            suffix = suffix.lower()
            if fault := unreadable(suffix):
                self.into.problem(f"{path}: {fault}")
            elif name.lower().endswith(self.extension):
                texts.setdefault(normal(name[: -len(self.extension)]), []).append(path)
            elif suffix in SUFFIXES:
                beside.setdefault(normal(stem), []).append(path)
            elif (stem := stem_of(path)) is None:
                self.others.add(self._short(path))
                if suffix in TABLE_SUFFIXES:
                    self.tables.add(self._short(path))
                elif suffix in FOREIGN:
                    self.foreign.add(self._short(path))
            elif stem.endswith(COMPANION_STEMS):
                companions[path] = normal(stem)
            else:
                pictures.setdefault(normal(stem), []).append(name)
        all_stems = {*pictures}
        times, own_name = self._numbers(where) if pictures else (1, "")
        is_mask = lambda stem: masks.is_mask(where, str(self.top), stem, all_stems)
        for path, stem in companions.items():
            self._set_aside(path, is_mask(stem))
        for stem in [*pictures] if self.options.masks else ():
            if is_mask(stem):
                pictures.pop(stem)
        for stem, same in pictures.items():
            images = [folder + name for name in same]
            captions, fault = self._text_of((stem, normal(same[0])), texts, beside)
            if not captions and not fault and is_companion(where, str(self.top), stem, pictures):
                self._set_aside(images[0], is_mask(stem))
            elif len(same) > 1:
                self.into.problem(
                    f"{listing(images)} would share the caption {stem + self.extension}; "
                    "rename or remove all but one"
                )
            elif fault:
                self.into.problem(fault)
            elif captions:
                self._add(images[0], captions, times)
            elif self.options.folder_captions and where != str(self.top):
                self._add(images[0], [(CAPTION_KEY, own_name)], times)
            else:
                advice = self._advice(stem, names, own_name if where != str(self.top) else "")
                self.into.problem(f"{images[0]}: has no caption; {advice}")
        for path in (path for paths in texts.values() for path in paths):
            self.lonely.add(self._short(path))
        for path in (path for paths in beside.values() for path in paths):
            self.others.add(self._short(path))

    def _set_aside(self, path: str, is_mask: bool) -> None:
        """Notes a mask or condition picture that is not used."""
        if not (is_mask and self.options.masks):
            self.masks.add(self._short(path))
            self.masks_would_do |= is_mask

    def _text_of(
        self,
        stems: tuple[str, ...],
        texts: dict[str, list[str]],
        beside: dict[str, list[str]],
    ) -> tuple[list[tuple[str, str]], str | None]:
        """The captions of a picture, or what is wrong; takes its files out of those given.

        `stems`: some programs write a.txt, some a.png.txt.
        """
        for stem in stems:
            if stem in texts:
                path, *others = texts.pop(stem)
                if others:
                    return [], several_texts([path, *others])
                captions, fault = self._captions(path)
                return captions, fault and f"{path}: {fault}"
        for stem in stems:
            own, fault = captions_beside(beside.get(stem, ()), self.options.caption_lines)
            if own or fault:
                self.beside.add(self._short(beside.pop(stem)[0]))
                return [(CAPTION_KEY, text) for text in own], fault
        return [], None

    def _add(self, image: str, captions: list[tuple[str, str]], times: int) -> None:
        references = []
        if self.references.paths:
            folder, name = os.path.split(self._short(image))
            references, faults = self.references.of_picture(folder or ".", stem_of(image) or name)
            for fault in faults:
                self.into.problem(f"{image}: {fault}")
        name = self._short(image)
        for _ in range(times):
            self.into.add(image, captions, name, references=references)

    def _captions(self, path: str) -> tuple[list[tuple[str, str]], str | None]:
        """The captions of one file as (key, text), or what is wrong."""
        try:
            content = read_bytes(path, MAX_CAPTION_BYTES)
        except UserError as error:
            return [], str(error).removeprefix(f"{path}: ")
        if self.extension == JSON:
            texts, fault = json_captions(content)
            return list(texts.items()), fault
        texts, fault = captions_in(content, self.options.caption_lines)
        return [(CAPTION_KEY, text) for text in texts], fault

    def _numbers(self, where: str) -> tuple[int, str]:
        """How often a folder's pictures count, and its name without that number."""
        name = os.path.basename(where)
        match = _NUMBERED.fullmatch(name)
        if not match:
            return 1, name
        self.numbered.add(name)
        return (int(match[1]) or 1) if self.options.folder_repeats else 1, match[2].strip()

    def _advice(self, stem: str, names: list[str], folder: str) -> str:
        """What to do about a picture without a caption, by what else is there."""
        beside = [n for n in names if n.lower().endswith(TEXT_SUFFIXES)]
        beside = [n for n in beside if normal(os.path.splitext(n)[0]) == stem]
        if beside:
            suffix = os.path.splitext(beside[0])[1]
            return f"{beside[0]} is beside it: set data.caption_extension to '{suffix}'"
        advice = (
            f"write {stem}{self.extension} beside it (`dopsd-jax caption` can) or set "
            "data.caption_extension"
        )
        if folder:
            advice += f", or data.folder_captions=True to take its folder's name, {folder!r}"
        return advice

    def _short(self, path: str) -> str:
        return path.removeprefix(self.prefix)  # `os.path.relpath` is slow, a million times

    def remark(self) -> None:
        """Tells what was left out, and whether there are pictures at all."""
        into, top = self.into, self.top
        if not into.table and not into.problems:
            hint = f"; it holds {self.tables}, give that file" if self.tables else ""
            hint += (
                f"; it holds {self.foreign}, which is not read: {UNPACK}" if self.foreign else ""
            )
            raise UserError(f"data.path {top}: no pictures in this folder{hint}")
        advice = " (with data.masks=files masks say what counts)" * self.masks_would_do
        for found, what in (
            (
                self.beside,
                f"captions of pictures without {self.extension} come from other files beside them",
            ),
            (self.masks, f"masks and condition pictures are not used{advice}"),
            (self.lonely, "captions without a picture are not used"),
            (self.others, "files that are neither pictures nor captions are not used"),
            (self.passed, "names that begin with a dot or an underscore are passed over"),
        ):
            if found:
                into.notes.append(f"{top}: {what}: {found}")
        if self.numbered and self.options.folder_repeats:
            into.notes.append(
                f"{top}: pictures count as often as their folder says: {self.numbered}"
            )
        elif self.numbered:
            into.notes.append(
                f"{top}: the number in front of a folder's name is not used ({self.numbered}); "
                "with data.folder_repeats=True its pictures count that often"
            )


LAYOUT = Layout("a folder of pictures with caption files", matches, read)
