"""Text from Qwen3, token by token: the keys and values of earlier tokens are kept.

`prefill` runs the whole prompt once. Each further token is one forward of that token alone, whose
queries meet the keys in the cache.
Dimension names: b batch, n tokens, m positions of the cache, l layers, d width, g key-value heads,
e width of a head, v vocabulary, t answer tokens, s stop tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dopsd_jax.common.products import einsum
from dopsd_jax.models.attention import attention
from dopsd_jax.models.qwen3 import Layer, Qwen3, inverse_frequencies


class Cache(NamedTuple):
    """Keys and values of all tokens so far; positions after them are zero and never seen."""

    keys: Float[Array, "l b m g e"]
    values: Float[Array, "l b m g e"]


class Sampling(NamedTuple):
    """How a token is drawn: softmax(logits / temperature), of its most likely tokens only.

    top_p: the fewest tokens whose probabilities add up to it are kept; the most likely one always.
    """

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


def prefill(
    language: Qwen3,
    x: Float[Array, "b n d"],
    cos: Float[Array, "b n r"],
    sin: Float[Array, "b n r"],
    deepstack: list[Float[Array, "b n d"]],
    room: int,
) -> tuple[Float[Array, "b d"], Cache]:
    """The last token's output of the final norm, and a cache for `room` tokens in all.

    No prompt has padding. `deepstack[i]` is added to the output of layer i.
    """
    batch, count = x.shape[:2]
    if count > room:
        raise ValueError(f"a prompt of {count} tokens does not fit into a cache for {room}")
    added = jnp.stack(deepstack).astype(x.dtype) if deepstack else None
    lengths = jnp.full((batch,), count, jnp.int32)
    pad = ((0, 0), (0, room - count), (0, 0), (0, 0))

    def body(x, i):
        kept = []

        def attend(q, k, v):
            kept.extend((jnp.pad(k, pad), jnp.pad(v, pad)))
            kernel = language.layers.attention.implementation
            return attention(q, k, v, lengths=lengths, causal=True, implementation=kernel)

        x = _layer(_pick(language, i), x, cos, sin, attend)
        if added is not None:
            own = jax.lax.dynamic_index_in_dim(added, jnp.minimum(i, len(added) - 1), 0, False)
            x = x + jnp.where(i < len(added), own, 0)
        return x, Cache(*kept)

    x, cache = jax.lax.scan(body, x, jnp.arange(language.cfg.num_layers))
    return language.norm(x[:, -1]), cache


def decode(
    language: Qwen3,
    tokens: Int[Array, " b"],
    index: Int[Array, ""],
    position: Int[Array, ""],
    cache: Cache,
) -> tuple[Float[Array, "b d"], Cache]:
    """The output of the final norm at one more token of each text, and the cache with it.

    index: how many tokens stand before it; position: its rotary position.
    """
    cfg, batch = language.cfg, tokens.shape[0]
    angles = position * inverse_frequencies(cfg.head_dim, cfg.rope_theta)[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    lengths = jnp.broadcast_to(index + 1, (batch,)).astype(jnp.int32)

    # The cache is carried and written in place: as inputs and outputs of the scan, every token
    # would copy all of it.
    def body(carry, i):
        x, kept = carry

        def attend(q, k, v):
            nonlocal kept
            start = (i, 0, index, 0, 0)
            put = lambda whole, new: jax.lax.dynamic_update_slice(whole, new[None], start)
            kept = Cache(put(kept.keys, k), put(kept.values, v))
            k, v = (jax.lax.dynamic_index_in_dim(whole, i, 0, False) for whole in kept)
            return attention(q, k, v, lengths=lengths)

        x = _layer(_pick(language, i), x, cos, sin, attend)
        return (x, kept), None

    start = language.embed(tokens[:, None], cache.keys.dtype), cache
    (x, cache), _ = jax.lax.scan(body, start, jnp.arange(cfg.num_layers))
    return language.norm(x[:, 0]), cache


def logits_of(hidden: Float[Array, "b d"], head: Float[Array, "v d"]) -> Float[Array, "b v"]:
    """Logits in float32 of outputs of the final norm; `head`: the embedding, where it is tied."""
    head = head.astype(hidden.dtype)
    return einsum("bd,vd->bv", hidden, head, to=jnp.float32)


def choose(
    logits: Float[Array, "b v"], keys: Key[Array, " b"], sampling: Sampling | None
) -> Int[Array, " b"]:
    """The next token of each text; `sampling`: None: the most likely one."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    likely = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely
    kept = (before < sampling.top_p).at[:, 0].set(True)
    place = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, ranked, -jnp.inf))
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("most",))
def generate(
    language: Qwen3,
    head: Float[Array, "v d"],
    hidden: Float[Array, "b d"],
    cache: Cache,
    index: Int[Array, ""],
    position: Int[Array, ""],
    keys: Key[Array, " b"],
    stops: Int[Array, " s"],
    sampling: Sampling | None,
    *,
    most: int,
) -> Int[Array, "b {most}"]:
    """The tokens that follow prompts, at most `most` each; the loop ends when all have ended.

    Token t of a text depends on its own key and t, not on the other texts of the batch.

    Args:
      head: see `logits_of`.
      hidden, cache: of `prefill`, which had `index` tokens; the cache has room for `most` more.
      position: rotary position of the first new token.
      stops: a text ends with any of these; where it has ended, the first of them follows.
    """
    if most < 1:
        raise ValueError(f"most is {most}; it must be at least 1")

    def next_token(hidden, step, ended):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        token = choose(logits_of(hidden, head), own, sampling)
        token = jnp.where(ended, stops[0].astype(jnp.int32), token)
        return token, ended | (token[:, None] == stops).any(axis=1)

    def more(state):
        step, ended, *_ = state
        return (step < most) & ~ended.all()

    def body(state):
        step, ended, tokens, cache = state
        last = jax.lax.dynamic_index_in_dim(tokens, step - 1, 1, False)
        before = step - 1
        hidden, cache = decode(language, last, index + before, position + before, cache)
        token, ended = next_token(hidden, step, ended)
        return step + 1, ended, tokens.at[:, step].set(token), cache

    first, ended = next_token(hidden, 0, jnp.zeros(hidden.shape[:1], bool))
    tokens = jnp.full((*first.shape, most), stops[0], jnp.int32).at[:, 0].set(first)
    return jax.lax.while_loop(more, body, (jnp.int32(1), ended, tokens, cache))[2]


def _pick(language: Qwen3, i) -> Layer:
    """Layer i of the stack; no other layer's weights are copied."""
    pick = lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
    return jax.tree.map(pick, language.layers)


def _layer(layer: Layer, x: Float[Array, "b n d"], cos, sin, attend) -> Float[Array, "b n d"]:
    """`Layer.__call__` with attention by `attend(q, k, v)`."""
    y = attend(*layer.attention.heads(layer.attention_norm(x), cos, sin))
    x = x + layer.attention.out(y.reshape(*x.shape[:2], -1))
    return x + layer.ffn(layer.ffn_norm(x))
