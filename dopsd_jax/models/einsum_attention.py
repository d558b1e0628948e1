"""Attention as matrix products and a softmax, for every device and type.

As in kernels, a backward pass keeps no n x m numbers: it makes the weights again from queries and
keys. On a processor that is faster than to keep them, too.

Dimension names: b batch, n queries, m keys, g heads of keys, d head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dopsd_jax.common.products import einsum
from dopsd_jax.models import kept

HIDDEN = -1e30  # added to the logit of a key that is not seen: its weight is exactly 0


def einsum_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    lengths: Int[Array, " b"] | None,
    *,
    causal: bool,
) -> Float[Array, "b n h d"]:
    """See `attention.attention`."""
    (b, n, h, d), (m, g) = q.shape, k.shape[1:3]
    # The queries of heads that share a key are rows of one product: keys are not repeated.
    rows = q.reshape(b, n, g, h // g, d).transpose(0, 2, 3, 1, 4).reshape(b, g, -1, d)
    bias = jnp.float32(0)
    if lengths is not None:
        bias += jnp.where(jnp.arange(m) >= lengths[:, None, None, None], HIDDEN, 0.0)
    if causal:
        position = jnp.tile(jnp.arange(n), h // g)[:, None]
        bias += jnp.where(jnp.arange(m) > position, HIDDEN, 0.0)
    y = _attended_anew(rows, k.swapaxes(1, 2), v.swapaxes(1, 2), bias)
    return y.reshape(b, g, h // g, n, d).transpose(0, 3, 1, 2, 4).reshape(b, n, h, d)


def _attended(
    q: Float[Array, "b g n d"],
    k: Float[Array, "b g m d"],
    v: Float[Array, "b g m d"],
    bias: Float[Array, "..."],
) -> Float[Array, "b g n d"]:
    """bias: added to the logits [b, g, n, m]; it has no gradient."""
    weights, total = _weights(q, k, bias)
    y = einsum("bgnm,bgmd->bgnd", weights.astype(v.dtype), v, to=jnp.float32)
    # The sum divides the few numbers of the output, not each of the weights.
    return kept.keep((y / total).astype(q.dtype))


def _forward(q, k, v, bias):
    # Nothing is kept that a forward pass without a gradient does not make anyway: so a compiler
    # makes the same program of both, and both give the same bits.
    y = _attended(q, k, v, bias)
    return y, (q, k, v, bias, y)


def _backward(kept_arrays, dy):
    q, k, v, bias, y = kept_arrays
    weights, total = _weights(q, k, bias)
    # Again the sum divides the small array.
    dy = (dy.astype(jnp.float32) / total).astype(dy.dtype)
    mean = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    d_weights = einsum("bgnd,bgmd->bgnm", dy, v, to=jnp.float32)
    d_logits = (weights * ((d_weights - mean) * q.shape[-1] ** -0.5)).astype(q.dtype)
    dq = einsum("bgnm,bgmd->bgnd", d_logits, k)
    # Made as d x m: products of XLA on a processor read large arrays by columns several times as
    # slowly as by rows.
    dk = einsum("bgnd,bgnm->bgdm", q, d_logits)
    dv = einsum("bgnd,bgnm->bgdm", dy, weights.astype(dy.dtype))
    return dq, dk.swapaxes(2, 3), dv.swapaxes(2, 3), jnp.zeros_like(bias)


def _weights(q, k, bias):
    """exp(logits - their largest) [b, g, n, m] and its sums [b, g, n, 1], both float32."""
    logits = einsum("bgnd,bgmd->bgnm", q, k, to=jnp.float32) * q.shape[-1] ** -0.5 + bias
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights, jnp.sum(weights, axis=-1, keepdims=True)


_attended_anew = jax.custom_vjp(_attended)
_attended_anew.defvjp(_forward, _backward)
