"""What every kind of adapter is: the interface between a network, its training and its files."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dopsd_jax.common.products import matmul
from dopsd_jax.models.interleaved import Interleaved

IN_ORDER = Interleaved((1,))  # of an input or output of one part: its order is the layer's own


class AdapterScale(nnx.Variable):
    """The strength of an adapter; 0 where a layer of a stack is not adapted. Never trained."""


class Adapter(nnx.Module):
    """The trained change of one linear layer: y = x W + update(x).

    It is held by a `models.layers.Dense`, for one of its fused parts, under the part's number; the
    `Dense` only calls `updates` or `delta`. Its trained arrays are `nnx.LoRAParam`. In a stack of
    layers each array has a leading axis of layers, and a scan over them uses one at a time.

    `export` and `load` are of one layer: `weights` are its trained arrays by attribute, without
    that axis.
    """

    scale: AdapterScale
    is_wide: bool  # see `is_wide_for`
    title: ClassVar[str]
    module: ClassVar[type]  # what `export` makes

    @classmethod
    def init(
        cls, key: jax.Array, lead: tuple[int, ...], din: int, dout: int, rank: int
    ) -> "Adapter":
        """One that changes nothing yet; `lead`: () or (layers,). `attach` sets the rest."""
        raise NotImplementedError

    @classmethod
    def strength(cls, din: int, dout: int, rank: int, alpha: float) -> float:
        """The scale of an adapted layer."""
        return alpha / rank

    def delta(self) -> Float[Array, "*lead din dout"]:
        """The change of the kernel, in float32."""
        raise NotImplementedError

    @classmethod
    def updates(
        cls,
        parts: Sequence["Adapter"],
        x: Float[Array, "... din"],
        sizes: Sequence[Sequence[int]],
        inputs: Interleaved = IN_ORDER,
    ) -> list[list[Float[Array, "... _size"]]]:
        """What each of a `Dense`'s adapters adds to its layer's output, cut into its `sizes`.

        In x's type. `inputs`: the order that the `Dense` has x in. Better put weights in this
        order, and cut them: to order x would send it between devices, and to cut an output reads it
        once more. A kind that has a cheaper way than its whole `delta`, or can share work between
        adapters, says so here.
        """
        deltas = [inputs.ordered(part.delta().astype(x.dtype), axis=0) for part in parts]
        return [
            [matmul(x, columns) for columns in cut(delta, own)]
            for delta, own in zip(deltas, sizes, strict=True)
        ]

    @classmethod
    def size(cls, din: int, dout: int, rank: int) -> int:
        """How many numbers are trained for one layer."""
        raise NotImplementedError

    @classmethod
    def products(cls, din: int, dout: int, rank: int) -> int:
        """Multiplications for one row of x in one layer."""
        return cls.size(din, dout, rank)

    @classmethod
    def inner(cls, din: int, dout: int, rank: int) -> int:
        """Of `products`, those that `remat=dots` does again: on the way to the update's last one,
        and not kept by `models.kept`."""
        return 0

    @classmethod
    def is_wide_for(cls, din: int, dout: int, rank: int) -> bool:
        """Whether its own work is not small beside its layer's, so that it is faster in the kernel.

        Alone it has three products (forward, and two gradients) of narrow matrices, which run at
        about half the speed of wide ones; in the kernel, one more of the layer's size.
        """
        return 2 * 3 * cls.products(din, dout, rank) > din * dout

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


def cut(x: Float[Array, "... d"], sizes: Sequence[int]) -> list[Float[Array, "... _size"]]:
    """Pieces of the last axis, of `sizes`, one after another."""
    return jnp.split(x, np.cumsum(sizes)[:-1], axis=-1)
