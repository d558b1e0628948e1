"""Stacks of layers on devices, filled layer by layer: those of the same layers by one program."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dopsd_jax.models.names import Leaf

Group = tuple[str, int]


class Kind(NamedTuple):
    """Of a stack: its whole shape [layers, ...], type and place."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.Sharding


class DeviceStacks:
    """The stacks that the stacked ones of `leaves` make; `arrays`: the stacks by path, so far.

    The arrays of a layer wait until all are here. Then the stacks take them at once: two programs
    are compiled for all of them, and not two for each.
    """

    def __init__(self, leaves: Sequence[Leaf]):
        self.arrays: dict[str, jax.Array] = {}
        self.layers = Counter(leaf.path for leaf in leaves if leaf.index is not None)
        self.members = Counter(map(self._group, self.layers))
        self.waiting: dict[tuple[Group, int], list[Mapping[str, tuple[jax.Array, Kind]]]] = {}

    def _group(self, path: str) -> Group:
        """Stacks whose paths begin alike, of as many layers."""
        return path.partition(".")[0], self.layers[path]

    def put(self, leaf: Leaf, rows: Mapping[str, tuple[jax.Array, Kind]]) -> None:
        """Takes a layer's leaf, split over devices as in its stack.

        rows: what the leaf was made into, by the paths of stacks; none that lie elsewhere.
        """
        group = self._group(leaf.path)
        layer = self.waiting.setdefault((group, leaf.index), [])
        layer.append(rows)
        if len(layer) < self.members[group]:
            return
        del self.waiting[group, leaf.index]
        whole = {path: row for rows in layer for path, row in rows.items()}
        paths = sorted(whole)
        if not paths:
            return
        kinds = tuple(whole[path][1] for path in paths)
        if all(path in self.arrays for path in paths):
            stacks = [self.arrays.pop(path) for path in paths]
        else:
            stacks = _empty(kinds)()
        stacks = _set_rows(kinds)(stacks, [whole[path][0] for path in paths], leaf.index)
        self.arrays.update(zip(paths, stacks, strict=True))


@functools.cache
def _empty(kinds: tuple[Kind, ...]):
    empty = lambda: [jnp.zeros(kind.shape, kind.dtype) for kind in kinds]
    return jax.jit(empty, out_shardings=[kind.sharding for kind in kinds])


@functools.cache
def _set_rows(kinds: tuple[Kind, ...]):
    def set_rows(stacks, rows, index):
        put = jax.lax.dynamic_update_index_in_dim
        return [put(s, row.astype(s.dtype), index, 0) for s, row in zip(stacks, rows, strict=True)]

    places = [kind.sharding for kind in kinds]
    return jax.jit(set_rows, donate_argnums=0, out_shardings=places)
