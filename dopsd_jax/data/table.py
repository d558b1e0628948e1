"""Many rows in little memory: columns of numbers and packed text instead of an object each.

A million rows as objects take more than a gigabyte; here a row costs its text and about 60 bytes,
and becomes a `DataRow` when it is asked for.
"""

import abc
import copy
import itertools
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from dopsd_jax.data.blobs import ARCHIVES, Blob

Image = Path | Blob  # a file, or a picture inside an archive
Captions = tuple[tuple[str, str], ...]  # key and text


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
    captions: Captions
    where: str
    declared_size: tuple[int, int] | None = None
    references: tuple[Path, ...] = ()
    view: View = WHOLE
    concept: str = ""
    mask: Path | None = None

    def having(self, key: str) -> tuple[int, ...]:
        """Indices into `captions` of those under `key`."""
        return tuple(i for i, (name, _) in enumerate(self.captions) if name == key)


class RowList(Sequence[DataRow]):
    """Many rows, each made when it is asked for.

    What a start looks at in every row comes without the row, which costs several times as much.
    """

    @abc.abstractmethod
    def where(self, i: int) -> str:
        """What messages call row i; rows that differ only in their view have one name."""

    @abc.abstractmethod
    def captions(self, i: int) -> Captions:
        """The captions of row i."""

    @abc.abstractmethod
    def pictures(self, i: int) -> tuple[str | Blob, ...]:
        """The picture of row i, then its references; of files the paths."""

    @abc.abstractmethod
    def view(self, i: int) -> View:
        """How row i shows its picture."""

    @abc.abstractmethod
    def declared_size(self, i: int) -> tuple[int, int] | None:
        """The (width, height) that a record claims for the picture of row i."""


class Derived(RowList):
    """Rows of other lists; a class of this kind changes something of them."""

    @abc.abstractmethod
    def origin(self, i: int) -> tuple[RowList, int]:
        """The list and the number of the row that row i is made from."""

    def where(self, i: int) -> str:
        rows, number = self.origin(i)
        return rows.where(number)

    def captions(self, i: int) -> Captions:
        rows, number = self.origin(i)
        return rows.captions(number)

    def pictures(self, i: int) -> tuple[str | Blob, ...]:
        rows, number = self.origin(i)
        return rows.pictures(number)

    def view(self, i: int) -> View:
        rows, number = self.origin(i)
        return rows.view(number)

    def declared_size(self, i: int) -> tuple[int, int] | None:
        rows, number = self.origin(i)
        return rows.declared_size(number)


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
        return self.part(i, i + 1)[0]

    def part(self, first: int, end: int) -> list[str]:
        """Those of the numbers from `first` to before `end`."""
        return [
            self._text[start:stop].decode("utf-8", "surrogateescape")
            for start, stop in itertools.pairwise(self._ends[first : end + 1])
        ]


class Table(RowList):
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
            self._names.append(_plain(image))
            place = (-1, 0, 0)
        else:
            if not self._archives or self._archives[-1] != image.archive:
                self._archives.append(image.archive)
            self._names.append(image.name)
            place = (len(self._archives) - 1, image.place, image.size)
        self._archive.append(place[0])
        self._place.append(place[1])
        self._bytes.append(place[2])
        for key, text in captions:
            self._text_keys.append(self._codes[key])
            self._texts.append(text)
        self._ends.append(len(self._text_keys))
        if view != WHOLE:
            self._views[len(self)] = view
        self._lines.append(line)
        self._sizes.extend(size or (0, 0))
        for reference in references:
            self._references.append(_plain(reference))
        self._reference_ends.append(len(self._references))
        self._concepts.append(concept)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> DataRow:
        i = range(len(self))[i]
        image, *references = self.pictures(i)
        return DataRow(
            Path(image) if isinstance(image, str) else image,
            self.captions(i),
            self.where(i),
            self.declared_size(i),
            tuple(map(Path, references)),
            self.view(i),
            self._concepts[i],
        )

    def __iter__(self) -> Iterator[DataRow]:
        return (self[i] for i in range(len(self)))

    def where(self, i: int) -> str:
        line = self._lines[i]
        return f"{self.prefix}:{line}" if line >= 0 else str(self._picture(i))

    def captions(self, i: int) -> Captions:
        first, end = self._ends[i], self._ends[i + 1]
        keys = map(self.keys.__getitem__, self._text_keys[first:end])
        return tuple(zip(keys, self._texts.part(first, end), strict=True))

    def pictures(self, i: int) -> tuple[str | Blob, ...]:
        first, end = self._reference_ends[i], self._reference_ends[i + 1]
        return (self._picture(i), *self._references.part(first, end))

    def _picture(self, i: int) -> str | Blob:
        (name,), archive = self._names.part(i, i + 1), self._archive[i]
        if archive < 0:
            return name
        path = self._archives[archive]
        return ARCHIVES[path.suffix.lower()](path, name, self._place[i], self._bytes[i])

    def view(self, i: int) -> View:
        return self._views.get(i, WHOLE)

    def declared_size(self, i: int) -> tuple[int, int] | None:
        size = (self._sizes[2 * i], self._sizes[2 * i + 1])
        return size if all(size) else None

    def caption_ends(self) -> array:
        """Captions of rows 0..i in number, for each i, behind a zero."""
        return self._ends

    def under(self, keys: Sequence[str] | None) -> Bool[np.ndarray, " k"]:
        """Whether each caption of all rows has one of `keys`; None: any."""
        codes = [self._codes[key] for key in (self.keys if keys is None else keys)]
        return np.isin(np.array(self._text_keys, np.uint8), codes)

    def only(self, keys: Sequence[str]) -> "Table":
        """The same rows with the captions under `keys` alone; both share what they have alike."""
        if tuple(keys) == self.keys:
            return self
        kept, table = self.under(keys), copy.copy(self)
        table.keys = tuple(keys)
        table._codes = {key: code for code, key in enumerate(table.keys)}
        codes = np.array([table._codes.get(key, 0) for key in self.keys], np.uint8)
        table._text_keys = array("B", codes[np.array(self._text_keys)[kept]].tobytes())
        if not kept.all():
            table._texts = Strings(itertools.compress(self._texts, kept))
        before = np.concatenate([[0], np.cumsum(kept)])
        table._ends = array("q", before[np.array(self._ends)].tobytes())
        return table


def _plain(path: str) -> str:
    """A path as pathlib writes it."""
    return path if path == os.path.normpath(path) else str(Path(path))


class Chosen(Derived):
    """Some rows of others, by number."""

    def __init__(self, rows: RowList, numbers: Sequence[int]):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> DataRow:
        return self.rows[self.numbers[i]]

    def origin(self, i: int) -> tuple[RowList, int]:
        return self.rows, int(self.numbers[i])
