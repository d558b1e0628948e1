"""Attention: one function, three implementations, chosen by name."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("xla", "cudnn", "splash")


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    *,
    lengths: Int[Array, " b"] | None = None,
    causal: bool = False,
    implementation: str = "xla",
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v, the softmax in float32.

    h is a multiple of g: query head i uses key-value head i * g // h. Keys at positions >=
    `lengths` are not seen; padding stands last, so one length per sample replaces every mask.
    """
    if implementation in ("xla", "cudnn"):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            key_value_seq_lengths=lengths,
            query_seq_lengths=None
            if lengths is None or implementation == "xla"
            else jnp.full_like(lengths, q.shape[1]),
            implementation=implementation,
        )
    raise ValueError(f"attention is one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
