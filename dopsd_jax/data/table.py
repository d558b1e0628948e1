"""Many rows in little memory: columns of numbers and packed text instead of an object each.

A million rows as objects take more than a gigabyte; here a row costs its text and about 60 bytes,
and becomes a `DataRow` when it is asked for.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from dopsd_jax.data.blobs import ARCHIVES, Blob

Image = Path | Blob  # a file, or a picture inside an archive


class View(NamedTuple):
    """How a row shows its picture.

    crop: 0 is the whole, cut at its edges; others lie inside. level: at which of the resolutions,
    from the lowest, as far as the picture has the pixels.
    """

    crop: int = 0
    mirrored: bool = False
    level: int = 0


WHOLE = View()


@dataclass(frozen=True, slots=True)
class DataRow:
    """One picture with its captions as (key, text); several captions may share a key.

    `where` names the row in messages. `declared_size` is the (width, height) that a record claims;
    it is only compared with the file. `references`: pictures that are edited to this one.
    `concept`: what the table says that it shows; empty: nothing. `mask`: a file that says which
    places count.
    """

    image: Image
    captions: tuple[tuple[str, str], ...]
    where: str
    declared_size: tuple[int, int] | None = None
    references: tuple[Path, ...] = ()
    view: View = WHOLE
    concept: str = ""
    mask: Path | None = None

    def having(self, key: str) -> tuple[int, ...]:
        """Indices into `captions` of those under `key`."""
        return tuple(i for i, (name, _) in enumerate(self.captions) if name == key)


class Strings(Sequence[str]):
    """Strings in one buffer of UTF-8."""

    def __init__(self, strings: Iterable[str] = ()):
        self._text, self._ends = bytearray(), array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        # File names may hold bytes that are no UTF-8; they come back as they were.
        self._text += string.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        return self._text[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogateescape")


class Table(Sequence[DataRow]):
    """Rows, appended one by one.

    `prefix`: rows that name a `line` are called `<prefix>:<line>` in messages, others by their
    picture.
    """

    def __init__(self, keys: Sequence[str], prefix: str = ""):
        self.keys, self.prefix = tuple(keys), prefix
        self._codes = {key: code for code, key in enumerate(self.keys)}
        self._names, self._texts = Strings(), Strings()
        self._text_keys, self._ends = array("B"), array("q", [0])
        self._lines, self._sizes = array("q"), array("i")
        self._references, self._reference_ends = Strings(), array("q", [0])
        self._views: dict[int, View] = {}  # of the rows that do not show the whole picture
        self._concepts = Strings()
        self._archives: list[Path] = []
        self._archive, self._place, self._bytes = array("i"), array("q"), array("q")

    def append(
        self,
        image: str | Blob,
        captions: Iterable[tuple[str, str]],
        *,
        line: int = -1,
        size: tuple[int, int] | None = None,
        references: Iterable[str] = (),
        view: View = WHOLE,
        concept: str = "",
    ) -> None:
        """Adds a row; `image` is the path of a file, or a picture inside an archive."""
        if isinstance(image, str):
            self._names.append(image)
            place = (-1, 0, 0)
        else:
            if not self._archives or self._archives[-1] != image.archive:
                self._archives.append(image.archive)
            self._names.append(image.name)
            place = (len(self._archives) - 1, image.place, image.size)
        for column, value in zip((self._archive, self._place, self._bytes), place, strict=True):
            column.append(value)
        for key, text in captions:
            self._text_keys.append(self._codes[key])
            self._texts.append(text)
        self._ends.append(len(self._text_keys))
        if view != WHOLE:
            self._views[len(self)] = view
        self._lines.append(line)
        self._sizes.extend(size or (0, 0))
        for reference in references:
            self._references.append(reference)
        self._reference_ends.append(len(self._references))
        self._concepts.append(concept)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> DataRow:
        i = range(len(self))[i]
        image = self._image(i)
        where = f"{self.prefix}:{self._lines[i]}" if self._lines[i] >= 0 else str(image)
        captions = tuple(
            (self.keys[self._text_keys[c]], self._texts[c])
            for c in range(self._ends[i], self._ends[i + 1])
        )
        size = (self._sizes[2 * i], self._sizes[2 * i + 1])
        references = range(self._reference_ends[i], self._reference_ends[i + 1])
        paths = tuple(Path(self._references[r]) for r in references)
        size = size if all(size) else None
        view = self._views.get(i, WHOLE)
        return DataRow(image, captions, where, size, paths, view, self._concepts[i])

    def __iter__(self) -> Iterator[DataRow]:
        return (self[i] for i in range(len(self)))

    def _image(self, i: int) -> Path | Blob:
        name, archive = self._names[i], self._archive[i]
        if archive < 0:
            return Path(name)
        path = self._archives[archive]
        return ARCHIVES[path.suffix.lower()](path, name, self._place[i], self._bytes[i])

    def caption_ends(self) -> array:
        """Captions of rows 0..i in number, for each i, behind a zero."""
        return self._ends

    def under(self, keys: Sequence[str] | None) -> Bool[np.ndarray, " k"]:
        """Whether each caption of all rows has one of `keys`; None: any."""
        codes = [self._codes[key] for key in (self.keys if keys is None else keys)]
        return np.isin(np.frombuffer(self._text_keys, np.uint8), codes)

    def only(self, keys: Sequence[str]) -> "Table":
        """The same rows with the captions under `keys` alone."""
        if tuple(keys) == self.keys:
            return self
        table = Table(keys, self.prefix)
        for i in range(len(self)):
            archive = self._archive[i]
            row = self[i]
            table.append(
                self._names[i] if archive < 0 else row.image,
                (caption for caption in row.captions if caption[0] in keys),
                line=self._lines[i],
                size=row.declared_size,
                references=map(str, row.references),
                view=row.view,
                concept=row.concept,
            )
        return table


class Chosen(Sequence[DataRow]):
    """Some rows of others, by number."""

    def __init__(self, rows: Sequence[DataRow], numbers: Sequence[int]):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> DataRow:
        return self.rows[self.numbers[i]]
