"""Many rows in little memory: columns of numbers and packed text instead of an object each.

A million rows as objects take more than a gigabyte; here a row costs its text and about 60 bytes,
and becomes a `DataRow` when it is asked for.
"""

import abc
import copy
import itertools
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from dopsd_jax.data.blobs import Blob
from dopsd_jax.data.strings import Strings

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
_IN_NONE = (-1, 0, 0)  # of a picture that is in no archive


@dataclass(frozen=True, slots=True)
class DataRow:
    """One picture with its captions as (key, text); several captions may share a key.

    `where` names the row in messages. `references`: pictures that are edited to this one.
    `concept`: what the table says that it shows; empty: nothing. `mask`: a file that says which
    places count.
    """

    image: Image
    captions: Captions
    where: str
    references: tuple[Path, ...] = ()
    view: View = WHOLE
    concept: str = ""
    mask: Path | None = None

    def having(self, key: str) -> tuple[int, ...]:
        """Indices into `captions` of those under `key`."""
        return tuple(i for i, (name, _) in enumerate(self.captions) if name == key)


def in_parts(count: int, most: int = 1024) -> list[range]:
    """The numbers from 0 to before `count`, at most so many at a time."""
    return [range(first, min(first + most, count)) for first in range(0, count, most)]


class RowList(Sequence[DataRow]):
    """Many rows, each made when it is asked for.

    What a start looks at in every row comes without the rows, which cost several times as much, and
    of many rows at once, in the order of their numbers.
    """

    @abc.abstractmethod
    def where(self, i: int) -> str:
        """What messages call row i; rows that differ only in their view have one name."""

    @abc.abstractmethod
    def captions(self, numbers: Sequence[int]) -> list[Captions]:
        """The captions of rows."""

    @abc.abstractmethod
    def pictures(self, numbers: Sequence[int]) -> list[tuple[str | Blob, ...]]:
        """Of each row its picture, then its references; of files the paths."""

    @abc.abstractmethod
    def views(self, numbers: Sequence[int]) -> list[View]:
        """How rows show their pictures."""

    @abc.abstractmethod
    def declared_sizes(self, numbers: Sequence[int]) -> Int32[np.ndarray, "n 2"]:
        """The widths and heights that a record claims for the pictures; 0 for none."""


class Derived(RowList):
    """Rows of other lists; a class of this kind changes something of them."""

    @abc.abstractmethod
    def origins(self, numbers: Sequence[int]) -> list[tuple[RowList, Sequence[int]]]:
        """What rows are made from: lists with numbers of their rows, in order."""

    def where(self, i: int) -> str:
        ((rows, (number,)),) = self.origins((i,))
        return rows.where(number)

    def captions(self, numbers: Sequence[int]) -> list[Captions]:
        return [own for rows, some in self.origins(numbers) for own in rows.captions(some)]

    def pictures(self, numbers: Sequence[int]) -> list[tuple[str | Blob, ...]]:
        return [own for rows, some in self.origins(numbers) for own in rows.pictures(some)]

    def views(self, numbers: Sequence[int]) -> list[View]:
        return [own for rows, some in self.origins(numbers) for own in rows.views(some)]

    def declared_sizes(self, numbers: Sequence[int]) -> Int32[np.ndarray, "n 2"]:
        found = [rows.declared_sizes(some) for rows, some in self.origins(numbers)]
        return np.concatenate([np.zeros((0, 2), np.int32), *found])


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
        self._concepts: list[str] = []  # equal ones are kept once
        self._archives: list[tuple[Path, type[Blob]]] = []
        self._places = array("q")  # of each row three numbers: archive, place, size

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
            self._places.extend(_IN_NONE)
        else:
            if self._archives[-1:] != [archive := (image.archive, type(image))]:
                self._archives.append(archive)
            self._names.append(image.name)
            self._places.extend((len(self._archives) - 1, image.place, image.size))
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
        self._concepts.append(sys.intern(concept))

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> DataRow:
        i = range(len(self))[i]
        own = (i,)
        ((image, *references),) = self.pictures(own)
        return DataRow(
            Path(image) if isinstance(image, str) else image,
            *self.captions(own),
            self.where(i),
            tuple(map(Path, references)),
            *self.views(own),
            self._concepts[i],
        )

    def __iter__(self) -> Iterator[DataRow]:
        return (self[i] for i in range(len(self)))

    def where(self, i: int) -> str:
        line = self._lines[i]
        return f"{self.prefix}:{line}" if line >= 0 else str(self.pictures((i,))[0][0])

    def captions(self, numbers: Sequence[int]) -> list[Captions]:
        own = _ranges(self._ends, numbers)
        every = list(itertools.chain.from_iterable(own))
        keys = map(self.keys.__getitem__, map(self._text_keys.__getitem__, every))
        pairs = zip(keys, self._texts.many(every), strict=True)
        return [tuple(itertools.islice(pairs, len(some))) for some in own]

    def pictures(self, numbers: Sequence[int]) -> list[tuple[str | Blob, ...]]:
        found: list[str | Blob] = self._names.many(numbers)
        if self._archives:
            found = [self._in_archive(i, name) for i, name in zip(numbers, found, strict=True)]
        if not self._references:
            return [(picture,) for picture in found]
        references = map(self._references.many, _ranges(self._reference_ends, numbers))
        return [(picture, *own) for picture, own in zip(found, references, strict=True)]

    def _in_archive(self, i: int, name: str) -> str | Blob:
        archive, place, size = self._places[3 * i : 3 * i + 3]
        if archive < 0:
            return name
        path, kind = self._archives[archive]
        return kind(path, name, place, size)

    def views(self, numbers: Sequence[int]) -> list[View]:
        return [self._views.get(i, WHOLE) for i in numbers]

    def declared_sizes(self, numbers: Sequence[int]) -> Int32[np.ndarray, "n 2"]:
        return np.asarray(self._sizes).reshape(-1, 2)[np.asarray(numbers, np.int64)]

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


def _ranges(ends: array, numbers: Sequence[int]) -> list[range]:
    """What belongs to each of the rows of these numbers, if row i ends before `ends[i + 1]`."""
    return [range(ends[i], ends[i + 1]) for i in numbers]


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

    def origins(self, numbers: Sequence[int]) -> list[tuple[RowList, Sequence[int]]]:
        return [(self.rows, [int(self.numbers[i]) for i in numbers])]
