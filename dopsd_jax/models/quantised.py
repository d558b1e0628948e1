"""Frozen kernels stored in 8 or 4 bits, activations as they are (weight-only, quantised by qwix).

A kernel is dequantised where it is used, one layer at a time, and again in the backward pass: a
network needs the memory of its codes and of one layer's weights. No gradient reaches the codes.
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.products import matmul
from dopsd_jax.models import fp8
from dopsd_jax.models.kinds import WHOLE, quantised_faults
from dopsd_jax.parallel.sharding import block_kernel, gather_weights

REST = "bfloat16"  # type of parameters that are not quantised


@dataclasses.dataclass(frozen=True)
class Scheme:
    """qtype: qwix's name. tile: inputs that share a scale, for each output; None: all of them."""

    qtype: str
    tile: int | None = None


# Tiles: 64 is QLoRA's block (arXiv 2305.14314); int8's gain is in docs/quantised.md.
SCHEMES = {
    "int8": Scheme("int8", tile=128),
    "fp8": Scheme("float8_e4m3fn"),
    "nf4": Scheme("nf4", tile=64),
}

BASE_DTYPES = (*WHOLE, *SCHEMES)  # what config.base_dtype may be

# Values of the sixteen codes, as in qwix: arXiv 2305.14314, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class QuantisedWeight(nnx.Variable):
    """Codes or scales of a quantised kernel. Never trained."""


class QuantisedKernel(nnx.Module):
    """A kernel [..., in, out] as codes of that shape and float32 scales [..., tiles, out]."""

    def __init__(self, codes: Array, scales: Array, scheme: str):
        self.scheme = scheme
        self.codes = QuantisedWeight(codes)
        self.scales = QuantisedWeight(scales)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def apply(self, x: Float[Array, "... din"]) -> Float[Array, "... dout"]:
        """x W, in x's type; its gradient for x is that of the dequantised kernel."""
        return _product(self.scheme, x, self.codes[...], self.scales[...])

    def rounded(self) -> tuple[Array, Float[Array, " dout"]]:
        """The kernel as `fp8.rounded` gives it: of the scheme fp8 its own codes, else new ones."""
        codes, scales = gather_weights(self.codes[...]), self.scales[...]
        if codes.dtype == fp8.TYPE:
            return codes, scales[0]
        return fp8.rounded(dequantise(codes, scales, self.scheme), 0)


def stored_type(base_dtype: str | None) -> str | None:
    """Type of the parameters of a base that are not quantised; None: as they come.

    Raises `UserError` for a type that a base cannot have.
    """
    if base_dtype is not None and base_dtype not in BASE_DTYPES:
        raise UserError(f"base_dtype: {base_dtype!r} is not one of {', '.join(BASE_DTYPES)}")
    return REST if base_dtype in SCHEMES else base_dtype


def is_quantised(path: str) -> bool:
    """Whether a quantised network stores the parameter `path` (joined by dots) in few bits.

    The large kernels of blocks are: 98 % of Z-Image. Norms, modulations, embedders and the final
    layer are small, and their error affects every token: they are not.
    """
    return path.endswith(".kernel") and block_kernel(path) is not None


def quantised(model: nnx.Module, base_dtype: str) -> nnx.Module:
    """Quantises in place the kernels of `model` that `is_quantised` names.

    Works under `nnx.eval_shape` too: that is how the abstract base is made. Raises `UserError`
    without qwix.
    """
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if is_quantised(".".join(map(str, path))):
            owner = model
            for name in path[:-1]:
                owner = getattr(owner, name)
            parts = quantise_kernel(owner.kernel[...], base_dtype)
            owner.kernel = QuantisedKernel(parts["codes"], parts["scales"], base_dtype)
    return model


def quantise_kernel(kernel: Float[Array, "*layers in out"], base_dtype: str) -> dict[str, Array]:
    """Codes and float32 scales of a kernel, by their names in `QuantisedKernel`.

    Rounded to nearest; the largest weight that shares a scale keeps its size. Each layer of a stack
    is quantised by itself.
    """
    scheme = SCHEMES[base_dtype]
    inputs, every = kernel.ndim - 2, set(range(kernel.ndim))
    tiled = {} if scheme.tile is None else {inputs: _tile(kernel.shape[inputs], scheme.tile)}
    array = _qwix().quantize(
        kernel.astype(jnp.float32),
        scheme.qtype,
        channelwise_axes=sorted(every - {inputs}),
        tiled_axes=tiled,
    )
    return {"codes": array.qvalue, "scales": array.scale}


def dequantise(
    codes: Array, scales: Float[Array, "*layers tiles out"], base_dtype: str
) -> Float[Array, "*layers in out"]:
    """The kernel in float32, as `qwix.dequantize` gives it."""
    # qwix looks nf4's values up in a table, which a TPU does one by one.
    nf4 = SCHEMES[base_dtype].qtype == "nf4"
    values = _decode_nf4(codes) if nf4 else codes.astype(jnp.float32)
    tile = codes.shape[-2] // scales.shape[-2]
    tiles = values.reshape(*scales.shape[:-1], tile, scales.shape[-1])
    return (tiles * scales[..., None, :]).reshape(codes.shape)


def _product(scheme: str, x, codes, scales):
    @jax.custom_vjp
    def product(x, codes, scales):
        return matmul(x, whole(codes, scales, x.dtype))

    def whole(codes, scales, dtype):
        return dequantise(gather_weights(codes), scales, scheme).astype(dtype)

    # The backward pass keeps only the codes, not the dequantised weights.
    def forward(x, codes, scales):
        return product(x, codes, scales), (codes, scales)

    def backward(kept, gradient):
        return matmul(gradient, whole(*kept, gradient.dtype).T), None, None

    product.defvjp(forward, backward)
    return product(x, codes, scales)


def _decode_nf4(codes: Array) -> Float[Array, "..."]:
    """Values of 4-bit NormalFloat codes: a tree of selections by their bits."""
    bits = codes.astype(jnp.int32)
    values: list[Any] = [np.float32(value) for value in NF4]
    for bit in range(4):
        low = (bits >> bit) & 1 == 0
        values = [jnp.where(low, a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _tile(inputs: int, most: int) -> int:
    """The largest tile of at most `most` inputs that divides them."""
    return next(size for size in range(min(most, inputs), 0, -1) if inputs % size == 0)


def _qwix() -> ModuleType:
    raise_if(quantised_faults())
    import qwix  # optional, and slow to import

    return qwix
