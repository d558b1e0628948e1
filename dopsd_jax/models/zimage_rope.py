"""Rotary positions of Z-Image on three axes: sequence, row, column.

Dimension names: b batch, n tokens, l caption tokens, h heads, d width of a head.
Facts: diffusers 0.42.1.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@functools.cache
def rope_tables(
    theta: float, dims: tuple[int, ...], lens: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    """Angles [position, frequency] of each axis: float64 rounded to float32, as in diffusers."""
    tables = []
    for dim, length in zip(dims, lens, strict=True):
        frequencies = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        tables.append(np.outer(np.arange(length, dtype=np.float64), frequencies).astype(np.float32))
    return tuple(tables)


def rotate(x: Float[Array, "b n h d"], rope: tuple[Array, Array]) -> Float[Array, "b n h d"]:
    """Rotary embedding; adjacent elements are a pair. In float32."""
    cos, sin = rope
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return pairs.reshape(x.shape).astype(x.dtype)


def caption_positions(l: int) -> Int[Array, "l 3"]:
    """Captions stand along the first axis, from 1."""
    return jnp.stack([1 + jnp.arange(l), jnp.zeros(l, int), jnp.zeros(l, int)], axis=-1)


def image_positions(
    rows: int, columns: int, pads: int, padded: Int[Array, " b"]
) -> Int[Array, "b n 3"]:
    """Image tokens stand on a plane behind the caption's `padded` tokens; `pads` follow them."""
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    frame = jnp.broadcast_to(padded[:, None] + 1, (len(padded), rows * columns))
    real = jnp.stack(
        [frame, jnp.broadcast_to(row, frame.shape), jnp.broadcast_to(column, frame.shape)], axis=-1
    )
    return jnp.pad(real, ((0, 0), (0, pads), (0, 0)))  # padding tokens stand at (0, 0, 0)
