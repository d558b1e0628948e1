"""Heads that read a network's tokens while it learns; they are not kept."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unread(head: Float[Array, "d r"], tokens: Float[Array, "b p d"], truth) -> Float[Array, ""]:
    """Mean squared error of what a head reads from tokens of whatever size."""
    tokens = tokens * jax.lax.rsqrt(jnp.mean(tokens**2, -1, keepdims=True) + 1e-6)
    return jnp.mean((tokens @ head - truth) ** 2)
