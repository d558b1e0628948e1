"""What every kind of adapter is: the interface between a network, its training and its files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float


class AdapterScale(nnx.Variable):
    """The strength of an adapter; 0 where a layer of a stack is not adapted. Never trained."""


class Adapter(nnx.Module):
    """The trained change of one linear layer: y = x W + update(x).

    It is held by a `models.layers.Dense`, for one of its fused parts, under the part's number; the
    `Dense` only calls `updates`. Its trained arrays are `nnx.LoRAParam`. In a stack of layers each
    array has a leading axis of layers, and a scan over them calls `updates` for one at a time.

    `export` and `load` are of one layer: `weights` are its trained arrays by attribute, without
    that axis.
    """

    scale: AdapterScale

    @classmethod
    def init(
        cls, key: jax.Array, lead: tuple[int, ...], din: int, dout: int, rank: int
    ) -> "Adapter":
        """An adapter that changes nothing yet; `lead`: () or (layers,). `attach` sets `scale`."""
        raise NotImplementedError

    def delta(self) -> Float[Array, "*lead din dout"]:
        """The change of the kernel, in float32."""
        raise NotImplementedError

    @classmethod
    def updates(
        cls,
        parts: Sequence["Adapter"],
        x: Float[Array, "... din"],
        rows: Callable[[Array], Array] = lambda a: a,
        columns: Callable[[Array], Array] = lambda a: a,
    ) -> list[Array]:
        """What each of a `Dense`'s adapters adds to its layer's output [..., dout].

        In x's type. `rows`, `columns`: the first or last axis of an array [din, ...] or [..., dout]
        in the order that the `Dense` has. They are for weights: to order x or the output would send
        these between devices. A kind that has a cheaper way than its whole `delta`, or can share
        work between parts, says so here.
        """
        return [x @ columns(rows(part.delta().astype(x.dtype))) for part in parts]

    @staticmethod
    def size(din: int, dout: int, rank: int) -> int:
        """How many numbers are trained for one layer."""
        raise NotImplementedError

    @staticmethod
    def export(weights: Mapping[str, np.ndarray], scale: float) -> Any:
        """The layer's adapter as its files have it, in PyTorch's shapes."""
        raise NotImplementedError

    @staticmethod
    def load(
        weights: Mapping[str, np.ndarray], module: Any, scale: float
    ) -> Mapping[str, np.ndarray]:
        """`weights` with what `export` gave elsewhere. Raises ValueError for what does not fit."""
        raise NotImplementedError
