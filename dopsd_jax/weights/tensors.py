"""What every source of named tensors offers: a file, a converted checkpoint, a view of one.

A `Tensors` is a mapping of PyTorch names to descriptions, and a function that reads one tensor, or
some rows of it. Layouts, merged adapters and exports are views of a `Tensors`: nothing is held in
memory.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import ml_dtypes
import numpy as np

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.models.names import Leaf

# Safetensors' type codes. The sub-byte types are missing: no numpy array holds them as stored.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
STRIP = 64  # columns of a transposed matrix that are copied together
# The bits of the exponent, all set in NaN and infinity.
EXPONENTS = {
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F32": np.uint32(0x7F800000),
    "F64": np.uint64(0x7FF0000000000000),
}
FLOATS = ("F32", "BF16", "F16")  # what a network's parameters may be stored in


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Type code of `DTYPES`, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numpy(self) -> np.dtype:
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.numpy.itemsize


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    infos: Mapping[str, TensorInfo]
    where: str  # for messages: the file or folder

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or the given rows of its first axis."""
        ...


@dataclasses.dataclass(frozen=True)
class ArrayTensors:
    """Arrays in memory as `Tensors`."""

    arrays: Mapping[str, np.ndarray]
    where: str = "memory"

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {n: TensorInfo(CODES[a.dtype], a.shape) for n, a in self.arrays.items()}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        return take(self.arrays[name], rows)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where a tensor of a view comes from: rows of a tensor of another source."""

    name: str
    rows: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A tensor of a view: pieces stacked along the first axis, then given `shape`."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]


class View:
    """Tensors of another source, rearranged under other names; read only when asked for."""

    def __init__(self, base: Tensors, recipes: Mapping[str, Recipe]):
        self.base, self.where, self.recipes = base, base.where, recipes
        self.infos = {
            name: TensorInfo(base.infos[recipe.pieces[0].name].dtype, recipe.shape)
            for name, recipe in recipes.items()
        }

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        recipe = self.recipes[name]
        parts = [self.base.read(p.name, slice(*(p.rows or (None,)))) for p in recipe.pieces]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return take(whole.reshape(recipe.shape), rows)


class Cast:
    """Tensors of another source in one floating type; other types stay."""

    def __init__(self, base: Tensors, dtype: str):
        self.base, self.where = base, base.where
        self.infos = {
            name: TensorInfo(dtype if info.dtype in FLOATS else info.dtype, info.shape)
            for name, info in base.infos.items()
        }

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        with np.errstate(over="ignore"):  # `check_finite` tells
            return self.base.read(name, rows).astype(self.infos[name].numpy, copy=False)


def check_finite(array: np.ndarray, where: object, name: str) -> np.ndarray:
    """`array`, if none of its numbers is NaN or infinite. Raises `UserError`.

    Looks at the bits, in strips that fit the cache: several GB a second, in every type.
    """
    exponent = EXPONENTS.get(CODES[array.dtype])
    if exponent is not None:
        bits = array.reshape(-1).view(exponent.dtype)
        for first in range(0, len(bits), 1 << 16):
            if ((bits[first : first + (1 << 16)] & exponent) == exponent).any():
                raise UserError(
                    f"{where}: tensor {name!r} holds numbers that are not finite; the training "
                    f"that made it failed, or they are beyond {CODES[array.dtype]}"
                )
    return array


def read_leaf(tensors: Tensors, leaf: Leaf) -> list[np.ndarray]:
    """The tensors that make a leaf, their numbers looked at. Raises `UserError`."""
    names = [source.name for source in leaf.sources]
    pieces = [check_finite(tensors.read(name), tensors.where, name) for name in names]
    raise_if(
        f"{tensors.where}: tensor {name!r} holds {piece.min()}; no number of it can be below "
        f"{leaf.low:g}; download the file again"
        for name, piece in zip(names, pieces, strict=True)
        if leaf.low is not None and piece.min() < leaf.low
    )
    return pieces


def take(array: np.ndarray, rows: slice) -> np.ndarray:
    """Rows of the first axis; a number has none, and is only asked for as a whole."""
    return array if rows == slice(None) else array[rows]


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in row order, copied if it is not.

    A transposed matrix is copied in strips that fit the cache: five times as fast as numpy's copy.
    """
    if array.flags.c_contiguous:
        return array
    if array.ndim != 2:
        return np.ascontiguousarray(array)
    copy = np.empty(array.shape, array.dtype)
    for first in range(0, array.shape[1], STRIP):
        columns = slice(first, first + STRIP)
        copy[:, columns] = array[:, columns]
    return copy


def total_bytes(tensors: Tensors) -> int:
    return sum(info.nbytes for info in tensors.infos.values())
