"""What is known of each picture, in columns, and remembered from start to start."""

import hashlib
import itertools
import json
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.blobs import Blob
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.data.images import ImageInfo

VERSION = 2  # raise it when `inspect_image` finds something else
SETTLED = 2.0  # seconds: a file written later than that may change again within its time stamp
SAVE_SECONDS = 300.0
_STAMP = 16  # bytes
_STAMPS = f"S{_STAMP}"  # equal if all bytes are
_NO_STAMP = bytes(_STAMP)  # of what is not remembered
_quoted = json.JSONEncoder().encode
_PIECE = 256  # pictures
Picture = str | Path | Blob  # a file, or a picture inside an archive


class Infos(Sequence[ImageInfo]):
    """`ImageInfo`s in columns."""

    def __init__(self):
        self._sizes, self._digests, self._notes = array("i"), bytearray(), array("h")
        self._known: dict[tuple[str, ...], int] = {}
        self._kinds: list[tuple[str, ...]] = []

    def append(self, info: ImageInfo) -> None:
        self._sizes.extend((info.width, info.height))
        self._digests += bytes.fromhex(info.digest)
        self._notes.append(self._code(info.notes))

    def extend(self, others: "Infos") -> None:
        codes = np.array([self._code(notes) for notes in others._kinds], np.int16)
        self._sizes.extend(others._sizes)
        self._digests += others._digests
        self._notes.frombytes(codes[np.array(others._notes)].tobytes())

    def _code(self, notes: tuple[str, ...]) -> int:
        code = self._known.setdefault(notes, len(self._kinds))
        if code == len(self._kinds):
            self._kinds.append(notes)
        return code

    def __len__(self) -> int:
        return len(self._notes)

    def __getitem__(self, i: int) -> ImageInfo:
        i = range(len(self))[i]
        return ImageInfo(*self.size(i), self.digest(i), self._kinds[self._notes[i]])

    def __iter__(self) -> Iterator[ImageInfo]:
        return (self[i] for i in range(len(self)))

    def size(self, i: int) -> tuple[int, int]:
        return self._sizes[2 * i], self._sizes[2 * i + 1]

    def digest(self, i: int) -> str:
        return self._digests[32 * i : 32 * i + 32].hex()

    def sizes(self) -> Int64[np.ndarray, "n 2"]:
        """Widths and heights."""
        return np.array(self._sizes, np.int64).reshape(-1, 2)

    def _contents(self) -> np.ndarray:
        """The digests as a view, which must be gone before another is appended."""
        return np.frombuffer(self._digests, "V32")

    def _groups(self) -> np.ndarray:
        """The same number for pictures of the same content, counted from 0."""
        return np.unique(self._contents(), return_inverse=True)[1]

    def repeated(self, counted: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of the `counted` pictures have the content of another one of them."""
        group = self._groups()
        return counted & (np.bincount(group, counted)[group] > 1)

    def distinct(self) -> int:
        """The number of different contents."""
        return len(np.unique(self._groups()))

    def follow_same(self) -> Bool[np.ndarray, " n"]:
        """Which pictures have the content of the one before them."""
        group = self._groups()
        return np.concatenate([[False], group[1:] == group[:-1]])

    def remarks(self) -> dict[str, Int64[np.ndarray, " k"]]:
        """The pictures of each remark for the user, in the order of the first ones."""
        notes, found = np.array(self._notes), {}
        codes, first = np.unique(notes, return_index=True)
        for code in codes[np.argsort(first)]:
            for remark in self._kinds[code]:
                found.setdefault(remark, []).append(code)
        return {remark: np.flatnonzero(np.isin(notes, own)) for remark, own in found.items()}

    def take(self, rows: Sequence[int]) -> "Infos":
        """Those of these numbers, in their order."""
        taken, rows = Infos(), np.asarray(rows, np.int64)
        taken._kinds, taken._known = [*self._kinds], {**self._known}
        # Views of the columns, since this is called many times of long ones.
        taken._sizes.frombytes(np.asarray(self._sizes).reshape(-1, 2)[rows].tobytes())
        taken._digests += self._contents()[rows].tobytes()
        taken._notes.frombytes(np.asarray(self._notes)[rows].tobytes())
        return taken

    # As arrays, to be stored.

    def arrays(self) -> dict[str, np.ndarray]:
        kinds = json.dumps(self._kinds).encode()
        return {
            "sizes": self.sizes().astype(np.int32),
            "digests": np.frombuffer(bytes(self._digests), np.uint8).reshape(-1, 32),
            "notes": np.array(self._notes, np.int32),
            "kinds": np.frombuffer(kinds, np.uint8),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Infos":
        infos = cls()
        infos._sizes.frombytes(arrays["sizes"].tobytes())
        infos._digests += arrays["digests"].tobytes()
        infos._notes.frombytes(arrays["notes"].astype(np.int16).tobytes())
        infos._kinds = [tuple(notes) for notes in json.loads(arrays["kinds"].tobytes())]
        infos._known = {notes: code for code, notes in enumerate(infos._kinds)}
        return infos


class _Found:
    """What earlier starts found, by stamp; `used`: which pictures are there in this one too."""

    def __init__(self, stored: dict[str, np.ndarray] | None):
        self.stamps, self.infos = np.zeros(0, _STAMPS), Infos()
        if stored is not None:
            stamps = np.frombuffer(stored["stamps"].tobytes(), _STAMPS)
            order = np.argsort(stamps)
            self.stamps, self.infos = stamps[order], Infos.from_arrays(stored).take(order)
        self.used = np.zeros(len(self.stamps), bool)

    def use(self, stamps: Sequence[bytes]) -> Int64[np.ndarray, " n"]:
        """The numbers in `infos` of pictures with these stamps; -1 for those that are not known."""
        if not len(self.stamps):
            return np.full(len(stamps), -1)
        asked = np.array(stamps, _STAMPS)
        rows = np.minimum(np.searchsorted(self.stamps, asked), len(self.stamps) - 1)
        known = self.stamps[rows] == asked
        self.used[rows[known]] = True
        return np.where(known, rows, -1)


class Seen(NamedTuple):
    """What was found of pictures: each has a number in `infos`, or a fault."""

    numbers: dict[Picture, int]
    infos: Infos
    faults: dict[Picture, UserError]

    def of(self, picture: Picture) -> ImageInfo | UserError:
        return self.faults.get(picture) or self.infos[self.numbers[picture]]


class PictureIndex:
    """Remembers pictures by path, size and time of the file that holds them.

    A file that was changed without a change of its size and of its time (in nanoseconds) is taken
    for unchanged. A context manager: it is saved when the block ends, also by an error.
    """

    def __init__(self, cache: FeatureCache | None, name: str = ""):
        self.cache = cache
        self.key = hashlib.sha256(f"pictures {VERSION} {name}".encode()).hexdigest()
        self.opened = 0  # pictures that were not known
        self._old = _Found(cache.get(self.key) if cache is not None else None)
        self._new_stamps, self._new = bytearray(), Infos()
        self._saved = time.monotonic()
        self._archives: dict[Path, os.stat_result] = {}

    def __enter__(self) -> "PictureIndex":
        return self

    def __exit__(self, kind, *_) -> None:
        # A start that was stopped has not seen all of the old pictures; they stay known.
        self._save(keep_old=kind is not None)

    def look(
        self,
        pictures: Iterable[Picture],
        inspect: Callable[[Picture], ImageInfo],
        terms: Sequence[object],
        pool: Executor,
    ) -> Seen:
        """What `inspect` finds of each picture, or found the last time; a fault is not raised.

        `terms`: what it depends on besides the picture, in values that JSON has.
        """

        def found(picture: Picture) -> ImageInfo | UserError:
            try:
                return inspect(picture)
            except UserError as error:
                return error

        ending, now = "".join(f", {json.dumps(term)}" for term in terms), time.time()
        pictures = list(dict.fromkeys(pictures))
        # A thread takes many at once: to ask for a file near by takes less time than to share.
        pieces = [pictures[i : i + _PIECE] for i in range(0, len(pictures), _PIECE)]
        asked = pool.map(lambda piece: self._stamps(piece, ending), pieces)
        stamps = list(itertools.chain.from_iterable(asked))
        rows = self._old.use([stamp for stamp, _ in stamps])
        known, missing = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0).tolist()
        numbers = {pictures[i]: number for number, i in enumerate(known.tolist())}
        seen = Seen(numbers, self._old.infos.take(rows[known]), {})
        for i, info in zip(missing, pool.map(found, [pictures[i] for i in missing]), strict=True):
            if isinstance(info, UserError):
                seen.faults[pictures[i]] = info
                continue
            seen.numbers[pictures[i]] = len(seen.infos)
            seen.infos.append(info)
            stamp, written = stamps[i]
            if stamp != _NO_STAMP:
                self.opened += 1
                if now - written > SETTLED:
                    self._new_stamps += stamp
                    self._new.append(info)
        return seen

    def _stamps(self, pictures: Sequence[Picture], ending: str) -> list[tuple[bytes, float]]:
        """What names each picture as it is now, and when its file was written."""
        if self.cache is None:
            return [(_NO_STAMP, 0.0)] * len(pictures)
        found = []
        for picture in pictures:
            blob = isinstance(picture, Blob)
            file = picture.archive if blob else picture
            try:
                status = self._status(file) if blob else os.stat(file)
            except OSError:  # to look at the picture reports it
                found.append((_NO_STAMP, 0.0))
                continue
            name = f"[{_quoted(str(file))}, {status.st_size}, {status.st_mtime_ns}"
            place = f", {_quoted(picture.name)}, {picture.place}, {picture.size}" if blob else ""
            stamp = hashlib.sha256(f"{name}{place}{ending}]".encode()).digest()[:_STAMP]
            found.append((stamp, status.st_mtime))
        return found

    def _status(self, archive: Path) -> os.stat_result:
        if archive not in self._archives:
            self._archives[archive] = os.stat(archive)
        return self._archives[archive]

    def save_sometimes(self) -> None:
        """Saves the results of a long first start, in case it is stopped."""
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save(keep_old=True)

    def _save(self, keep_old: bool) -> None:
        self._saved = time.monotonic()
        if self.cache is None or not self.opened:
            return
        rows = np.flatnonzero(self._old.used | keep_old)
        stamps = self._old.stamps[rows].tobytes() + self._new_stamps
        infos = self._old.infos.take(rows)
        infos.extend(self._new)
        if stamps:
            stamps = np.frombuffer(stamps, np.uint8).reshape(-1, _STAMP)
            self.cache.put(self.key, infos.arrays() | {"stamps": stamps})
