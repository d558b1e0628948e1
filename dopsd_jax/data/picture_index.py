"""What is known of each picture, in columns, and remembered from start to start."""

import hashlib
import json
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from dopsd_jax.data.blobs import Blob
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.data.images import ImageInfo, ImageLimits, inspect_image

VERSION = 1  # raise it when `inspect_image` finds something else
SETTLED = 2.0  # seconds: a file written later than that may change again within its time stamp
SAVE_SECONDS = 300.0
_STAMP = 16  # bytes


class Infos(Sequence[ImageInfo]):
    """`ImageInfo`s in columns."""

    def __init__(self):
        self._sizes, self._digests, self._notes = array("i"), bytearray(), array("h")
        self._known: dict[tuple[str, ...], int] = {}
        self._kinds: list[tuple[str, ...]] = []

    def append(self, info: ImageInfo) -> None:
        code = self._known.setdefault(info.notes, len(self._kinds))
        if code == len(self._kinds):
            self._kinds.append(info.notes)
        self._sizes.extend((info.width, info.height))
        self._digests += bytes.fromhex(info.digest)
        self._notes.append(code)

    def __len__(self) -> int:
        return len(self._notes)

    def __getitem__(self, i: int) -> ImageInfo:
        i = range(len(self))[i]
        digest = self._digests[32 * i : 32 * i + 32].hex()
        return ImageInfo(*self._sizes[2 * i : 2 * i + 2], digest, self._kinds[self._notes[i]])

    def __iter__(self) -> Iterator[ImageInfo]:
        return (self[i] for i in range(len(self)))

    def sizes(self) -> Int64[np.ndarray, "n 2"]:
        """Widths and heights."""
        return np.array(self._sizes, np.int64).reshape(-1, 2)

    def _groups(self) -> np.ndarray:
        """The same number for pictures of the same content, counted from 0."""
        return np.unique(np.frombuffer(bytes(self._digests), "V32"), return_inverse=True)[1]

    def repeated(self, counted: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of the `counted` pictures have the content of another one of them."""
        group = self._groups()
        return counted & (np.bincount(group, counted)[group] > 1)

    def distinct(self) -> int:
        """The number of different contents."""
        return len(np.unique(self._groups()))

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
        infos._sizes.extend(arrays["sizes"].reshape(-1).tolist())
        infos._digests += arrays["digests"].tobytes()
        infos._notes.extend(arrays["notes"].tolist())
        infos._kinds = [tuple(notes) for notes in json.loads(arrays["kinds"].tobytes())]
        infos._known = {notes: code for code, notes in enumerate(infos._kinds)}
        return infos


class PictureIndex:
    """Remembers pictures by path, size and time of the file that holds them.

    A file that was changed without a change of its size and of its time (in nanoseconds) is taken
    for unchanged. A context manager: it is saved when the block ends, also by an error.
    """

    def __init__(self, cache: FeatureCache | None, name: str = ""):
        self.cache = cache
        self.key = hashlib.sha256(f"pictures {VERSION} {name}".encode()).hexdigest()
        self.opened = 0  # pictures that were not known
        stored = cache.get(self.key) if cache is not None else None
        self._old = Infos() if stored is None else Infos.from_arrays(stored)
        stamps = b"" if stored is None else stored["stamps"].tobytes()
        self._row_of = {
            stamps[i : i + _STAMP]: row for row, i in enumerate(range(0, len(stamps), _STAMP))
        }
        self._stamps, self._new = bytearray(), Infos()
        self._lock = threading.Lock()
        self._saved = time.monotonic()
        self._archives: dict[Path, os.stat_result] = {}

    def __enter__(self) -> "PictureIndex":
        return self

    def __exit__(self, kind, *_) -> None:
        # A start that was stopped has not seen all of the old pictures; they stay known.
        self._save(keep_old=kind is not None)

    def look(
        self,
        picture: Path | Blob,
        limits: ImageLimits,
        verify: bool,
        inspect: Callable[..., ImageInfo] = inspect_image,
        kind: str = "",
    ) -> ImageInfo:
        """`inspect_image`, or what it found the last time. Raises `UserError`.

        `inspect`: another look at it, of this `kind`.
        """
        found = lambda: inspect(picture, limits, verify=verify)
        if self.cache is None:
            return found()
        try:
            status = self._status(picture)
        except OSError:  # the next line reports it
            return found()
        place = (picture.name, picture.place, picture.size) if isinstance(picture, Blob) else ()
        file = picture.archive if isinstance(picture, Blob) else picture
        identity = [
            str(file), status.st_size, status.st_mtime_ns, *place, *astuple(limits), verify,
            *[kind] * bool(kind),
        ]  # fmt: skip
        stamp = hashlib.sha256(json.dumps(identity).encode()).digest()[:_STAMP]
        row = self._row_of.get(stamp)
        known = row is not None
        info = self._old[row] if known else found()
        with self._lock:
            self.opened += not known
            if time.time() - status.st_mtime > SETTLED:
                self._stamps += stamp
                self._new.append(info)
        return info

    def _status(self, picture: Path | Blob) -> os.stat_result:
        if not isinstance(picture, Blob):
            return os.stat(picture)
        if picture.archive not in self._archives:
            self._archives[picture.archive] = os.stat(picture.archive)
        return self._archives[picture.archive]

    def save_sometimes(self) -> None:
        """Saves the results of a long first start, in case it is stopped."""
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save(keep_old=True)

    def _save(self, keep_old: bool) -> None:
        self._saved = time.monotonic()
        if self.cache is None or not self.opened:
            return
        with self._lock:
            stamps, infos = bytearray(self._stamps), self._new
            if keep_old:
                infos = Infos.from_arrays(infos.arrays())
                there = {bytes(stamps[i : i + _STAMP]) for i in range(0, len(stamps), _STAMP)}
                for stamp, row in self._row_of.items():
                    if stamp not in there:
                        stamps += stamp
                        infos.append(self._old[row])
            if not stamps:
                return
            stamps = np.frombuffer(bytes(stamps), np.uint8).reshape(-1, _STAMP)
            self.cache.put(self.key, infos.arrays() | {"stamps": stamps})
