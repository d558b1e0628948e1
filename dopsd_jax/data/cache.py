"""Outputs of frozen encoders on disk, under a hash of what they were made from."""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy

from dopsd_jax.common.atomic import partial_of, remove_leftovers
from dopsd_jax.common.errors import FULL, UserError
from dopsd_jax.common.files import expand, open_regular
from dopsd_jax.weights.safetensors_io import Header, TensorFiles, parse_header
from dopsd_jax.weights.tensors import CODES

# Part of every key, by role: raised when old entries must not be read.
FORMATS = {"student": 1, "teacher": 2, "latent": 1, "mask": 1}
TYPES = ("BF16", "F32", "I32", "I64", "U8")  # of arrays
READERS = 4  # threads


def feature_key(
    *,
    role: Literal["student", "teacher", "latent", "mask"],
    prompt: str,
    encoder: str,
    options: Mapping[str, object],
    pictures: Sequence[tuple[str, str]] = (),
) -> str:
    """sha256 of all that an encoder's output depends on.

    `encoder` is the digest of the encoder's weights; `options` holds template and length settings
    as plain JSON; `pictures`: of each one shown the sha256 of the file, and what was done to it.
    """
    parts = [FORMATS[role], role, prompt, encoder, dict(options), *map(list, pictures)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


class FeatureCache:
    """A folder of safetensors files, one for each key.

    Entries are written beside their place and renamed into it, so any number of processes may
    write at once and a reader sees a whole entry or none. A damaged entry counts as missing: one
    line is given to `report`, and the entry is removed.
    """

    def __init__(self, directory: str | Path, report: Callable[[str], None] = print):
        self.directory = expand(directory)
        self.report = report
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.safetensors"

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Stores an entry: arrays of the types above, none of them empty."""
        arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        for name, array in arrays.items():
            if CODES.get(array.dtype) not in TYPES or array.size == 0:
                raise ValueError(f"{name} is {array.dtype}{array.shape}; not for the cache")
        content = safetensors.numpy.save(arrays, {"key": key, "crc32": _checksum(arrays)})
        place = self.path(key)
        with self._writing():
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = partial_of(place)
            try:
                with open(temporary, "xb") as file:
                    file.write(content)
                os.replace(temporary, place)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """An entry, or None if it is missing or damaged."""
        place = self.path(key)
        header = self._header(place)
        if header is None:
            return None
        files = TensorFiles(str(place), {place: header})
        if header.metadata.get("key") != key:
            return self._drop(place, "it belongs to another key")
        try:
            arrays = {name: files.read(name) for name in header.tensors}
        except UserError as error:
            return self._drop(place, str(error))
        if header.metadata.get("crc32") != _checksum(arrays):
            return self._drop(place, "its checksum is wrong")
        return arrays

    def _header(self, place: Path) -> Header | None:
        """The header of an entry; None if it is missing, or damaged and therefore removed."""
        if not os.path.exists(place):
            return None
        with open_regular(place) as file:
            try:
                return parse_header(place, os.fstat(file.fileno()).st_size, file)
            except OSError as error:
                raise UserError(f"{place}: cannot be read ({error.strerror})") from error
            except UserError as error:
                return self._drop(place, str(error))

    def load(self, key: str) -> dict[str, np.ndarray]:
        """An entry that must be there."""
        arrays = self.get(key)
        if arrays is None:
            raise UserError(
                f"{self.path(key)}: this cached feature is gone or was damaged; start the run "
                "again and it is computed anew"
            )
        return arrays

    def shapes(self, key: str) -> dict[str, tuple[int, ...]] | None:
        """Array shapes of an entry, from its header alone; None if missing or not whole."""
        header = self._header(self.path(key))
        return header and {name: info.shape for name, info in header.tensors.items()}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those keys, each once and in order, that are missing or damaged.

        Entries are read whole: damage that is found later, without the encoders, ends a run.
        """
        keys = list(dict.fromkeys(keys))
        remove_leftovers(*{self.path(key).parent for key in keys})
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(lambda key: self.get(key) is not None, keys)
            return [key for key, there in zip(keys, found, strict=True) if not there]

    def _drop(self, place: Path, fault: str) -> None:
        fault = fault.removeprefix(f"{place}: ").partition("\n")[0]
        self.report(f"{place}: damaged ({fault}); removed, to be computed anew")
        with contextlib.suppress(FileNotFoundError):
            place.unlink()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise UserError(
                    f"{self.directory}: no space left for cached features; free some, or set "
                    "data.cache to another disk (what is stored stays good)"
                ) from error
            raise UserError(
                f"{self.directory}: cannot be written ({error.strerror}); set data.cache to a "
                "folder that can"
            ) from error


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    total = 0
    for name in sorted(arrays):
        array = arrays[name]
        total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), total)
        total = zlib.crc32(array.reshape(-1).view(np.uint8), total)
    return f"{total:08x}"
