"""Parts of one axis, interleaved by blocks, so that devices that split it have some of each."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  # of NumPy or JAX


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """An axis made of parts of `sizes`, each cut into `groups` blocks.

    The first block of each part comes first, then the second of each, ...: so a device that has
    1/n of the axis has 1/n of every part, if n divides `groups`. A single part stays as it is.
    """

    sizes: tuple[int, ...]
    groups: int = 1

    def join(self, parts: Sequence[Array], axis: int = -1) -> Array:
        """The whole axis, made of its parts."""
        if len(self.sizes) == 1:
            return parts[0]
        axis %= parts[0].ndim
        blocks = [
            part.reshape(*part.shape[:axis], self.groups, -1, *part.shape[axis + 1 :])
            for part in parts
        ]
        whole = parts[0].__array_namespace__().concatenate(blocks, axis=axis + 1)
        return whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])

    def split(self, x: Array, axis: int = -1) -> list[Array]:
        """The parts of the whole axis: the inverse of `join`."""
        axis %= x.ndim
        blocks = x.reshape(*x.shape[:axis], self.groups, -1, *x.shape[axis + 1 :])
        parts = _cut(blocks, [size // self.groups for size in self.sizes], axis + 1)
        return [part.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :]) for part in parts]

    def gathered(self, x: Array, devices: int = 1) -> list[Array]:
        """`split` of the last axis, block by block on each of the `devices` that split it.

        For a TPU: with an axis for all blocks its compiler turns arrays round, and the weights of
        all layers for them (Z-Image with LoRA: 8 GiB more). `devices` must divide `groups`.
        """
        sizes = np.array(self.sizes) // self.groups
        ends, step = np.cumsum(sizes), sizes.sum()
        x, lead = x.reshape(*x.shape[:-1], devices, -1), x.shape[:-1]
        blocks = lambda start, end: [
            x[..., start + k : end + k] for k in range(0, x.shape[-1], step)
        ]
        return [
            x.__array_namespace__().concatenate(blocks(end - size, end), axis=-1).reshape(*lead, -1)
            for size, end in zip(sizes, ends, strict=True)
        ]

    def ordered(self, x: Array, axis: int = -1) -> Array:
        """The whole axis, made of parts that stand one after another."""
        return x if len(self.sizes) == 1 else self.join(_cut(x, self.sizes, axis), axis)

    def plain(self, x: Array, axis: int = -1) -> Array:
        """The parts one after another: the inverse of `ordered`."""
        if len(self.sizes) == 1:
            return x
        return x.__array_namespace__().concatenate(self.split(x, axis), axis=axis)


def _cut(x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    return x.__array_namespace__().split(x, np.cumsum(sizes)[:-1], axis=axis)
