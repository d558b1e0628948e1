"""Parameters in training as named tensors: gathered one layer at a time."""

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax.models.names import Leaf, to_torch
from dopsd_jax.weights.tensors import CODES, TensorInfo, take

KEPT_LEAVES = 4  # in host memory: tensors that are fused here are not neighbours in a file


class LiveTensors:
    """A network's parameters on devices as tensors with canonical names, in one type.

    Reading gathers one layer of one parameter: with several processes all read the same tensors in
    the same order. A parameter may lie in host memory.
    """

    def __init__(self, parameters: nnx.State, leaves: Sequence[Leaf], dtype: Any):
        self.where, self.dtype = "the trained network", jnp.dtype(dtype)
        self.arrays = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(parameters)}
        self.homes = {source.name: leaf for leaf in leaves for source in leaf.sources}
        code = CODES[np.dtype(self.dtype)]
        self.infos = {s.name: TensorInfo(code, s.shape) for leaf in leaves for s in leaf.sources}
        self._recent: OrderedDict[tuple, list[np.ndarray]] = OrderedDict()

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        leaf = self.homes[name]
        names = [source.name for source in leaf.sources]
        return take(self._pieces(leaf)[names.index(name)], rows)

    def _pieces(self, leaf: Leaf) -> list[np.ndarray]:
        key = leaf.path, leaf.index
        if key not in self._recent:
            while len(self._recent) >= KEPT_LEAVES:
                self._recent.popitem(last=False)
            array = self.arrays[leaf.path]
            row = _whole(array.sharding, self.dtype, leaf.index is not None)(array, leaf.index or 0)
            self._recent[key] = to_torch(leaf, np.asarray(row))
        self._recent.move_to_end(key)
        return self._recent[key]


@functools.cache
def _whole(sharding: jax.sharding.Sharding, dtype: Any, stacked: bool):
    everywhere = None
    if isinstance(sharding, jax.NamedSharding):
        everywhere = jax.NamedSharding(sharding.mesh, jax.P())

    def gather(array, index):
        if stacked:
            array = jax.lax.dynamic_index_in_dim(array, index, keepdims=False)
        return jax.device_put(array, jax.memory.Space.Device).astype(dtype)

    return jax.jit(gather, out_shardings=everywhere)
