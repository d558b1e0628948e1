"""Qwen3 as a text encoder: hidden states of a causal language model.

Dimension names: b batch, n tokens, d width, h query heads, g key-value heads, r half a head.
Facts: transformers 5.23 (`Qwen3Model`) and the published checkpoints.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dopsd_jax.common.json_fields import MAX_LAYERS, Fields, in_json
from dopsd_jax.models.attention import attention
from dopsd_jax.models.layers import Dense, RMSNorm, scan_range, stack
from dopsd_jax.models.names import Leaf, Source, linear, vector

MAX_HEAD = 1 << 12  # width of an attention head


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a Qwen3 language model, as in its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    tied: bool

    @classmethod
    def from_dict(cls, json_dict: Any, where: str) -> "Qwen3Config":
        """Reads a text encoder's config.json; `where` names the file in errors.

        Raises `UserError` with every missing or unsupported field.
        """
        fields = Fields(json_dict, where)
        fields.only("model_type", "qwen3", required=True)
        tied = fields.json.get("tie_word_embeddings", False)  # the class default of transformers
        config, rope = read_language_fields(fields, tied)
        _check_plain_rope(fields, rope)
        fields.finish()
        return config


def read_language_fields(fields: Fields, tied: Any) -> tuple[Qwen3Config, Mapping]:
    """The fields that Qwen3 and Qwen3-VL's language model share, and the rope settings as stored.

    Problems are noted in `fields`; the caller checks the rope settings and calls `finish`.
    """
    fields.only("hidden_act", "silu", required=True)
    fields.only("attention_bias", False)
    fields.only("use_sliding_window", False, None)
    kinds = fields.json.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        fields.problem(f"field layer_types is {in_json(kinds)}; only 'full_attention' is supported")
    if not isinstance(tied, bool):
        fields.problem(f"field tie_word_embeddings is {in_json(tied)}; it must be true or false")
    theta, rope = _read_rope(fields)
    config = Qwen3Config(
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        intermediate_size=fields.count("intermediate_size"),
        num_layers=fields.count("num_hidden_layers", most=MAX_LAYERS),
        num_heads=fields.count("num_attention_heads"),
        num_kv_heads=fields.count("num_key_value_heads"),
        head_dim=fields.count("head_dim", most=MAX_HEAD),
        norm_eps=fields.positive("rms_norm_eps"),
        rope_theta=theta,
        tied=tied is True,
    )
    if config.head_dim % 2:
        fields.problem(f"field head_dim is {config.head_dim}; it must be even")
    if config.num_kv_heads and config.num_heads % config.num_kv_heads:
        fields.problem(
            f"field num_attention_heads is {config.num_heads}; it must be a multiple of "
            f"num_key_value_heads, {config.num_kv_heads}"
        )
    return config, rope


def _read_rope(fields: Fields) -> tuple[float, Mapping]:
    # transformers 4 writes rope_theta and rope_scaling, transformers 5 one entry rope_parameters.
    found = fields.json.get("rope_parameters")
    if found is None:
        rope = fields.json.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            fields.problem(
                f"field rope_scaling is {in_json(rope)}; it must be a JSON object or null"
            )
            rope = {}
        return fields.positive("rope_theta"), rope
    inner = fields.part("rope_parameters")
    theta = (inner if "rope_theta" in inner.json else fields).positive("rope_theta")
    old = fields.json.get("rope_theta", theta)
    if old != theta:
        both = f"rope_theta {in_json(old)} and rope_parameters.rope_theta {in_json(theta)}"
        fields.problem(f"fields {both} differ")
    return theta, inner.json


def _check_plain_rope(fields: Fields, rope: Mapping) -> None:
    settings = {k: v for k, v in rope.items() if k != "rope_theta"}
    if any(k not in ("rope_type", "type") or v != "default" for k, v in settings.items()):
        fields.problem(
            f"rope settings {in_json(settings)} are unsupported; only rope_type 'default' is"
        )


def names(cfg: Qwen3Config, prefix: str = "model.") -> list[Leaf]:
    """Every parameter and the tensors it is made of; `prefix` begins each tensor name."""
    d, f = cfg.hidden_size, cfg.intermediate_size
    dq, dkv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    leaves = [vector("embedding", None, f"{prefix}embed_tokens.weight", cfg.vocab_size, d)]
    for i in range(cfg.num_layers):
        layer = f"{prefix}layers.{i}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        qkv = ((f"{attn}.q_proj", dq, d), (f"{attn}.k_proj", dkv, d), (f"{attn}.v_proj", dkv, d))
        gate_up = ((f"{mlp}.gate_proj", f, d), (f"{mlp}.up_proj", f, d))
        norm = f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"
        leaves += [
            vector("layers.attention_norm.scale", i, norm[0], d),
            linear("layers.attention.qkv.kernel", i, *qkv),
            vector("layers.attention.q_norm.scale", i, f"{attn}.q_norm.weight", cfg.head_dim),
            vector("layers.attention.k_norm.scale", i, f"{attn}.k_norm.weight", cfg.head_dim),
            linear("layers.attention.out.kernel", i, (f"{attn}.o_proj", d, dq)),
            vector("layers.ffn_norm.scale", i, norm[1], d),
            linear("layers.ffn.gate_up.kernel", i, *gate_up),
            linear("layers.ffn.down.kernel", i, (f"{mlp}.down_proj", d, f)),
        ]
    leaves.append(vector("norm.scale", None, f"{prefix}norm.weight", d))
    return leaves


def unused(cfg: Qwen3Config) -> list[Source]:
    """Tensors that a checkpoint may hold and features do not need: the head.

    Where it is tied to the embedding it is usually not stored, but some programs store a copy.
    """
    return [Source("lm_head.weight", (cfg.vocab_size, cfg.hidden_size))]


def inverse_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta^(-2j / head_dim), j = 0 ... head_dim/2 - 1, in float32 as transformers makes them."""
    steps = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / np.power(np.float32(theta), steps)


def rotate(
    x: Float[Array, "b n h e"], cos: Float[Array, "#b n r"], sin: Float[Array, "#b n r"]
) -> Float[Array, "b n h e"]:
    """Rotary embedding, half-split: element i of a head pairs with element i + e/2."""
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Causal attention with grouped key-value heads; queries and keys are normed per head."""

    def __init__(self, cfg: Qwen3Config, implementation: str, *, rngs: nnx.Rngs):
        self.head_dim, self.implementation = cfg.head_dim, implementation
        dq, dkv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.qkv = Dense(cfg.hidden_size, (dq, dkv, dkv), rngs=rngs)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
        self.out = Dense(dq, cfg.hidden_size, rngs=rngs)

    def heads(
        self, x: Float[Array, "b n d"], cos, sin
    ) -> tuple[Float[Array, "b n h e"], Float[Array, "b n g e"], Float[Array, "b n g e"]]:
        """Queries, keys and values, the first two normed and turned to their positions."""
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
        q, k, v = map(heads, self.qkv.parts(x))
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v

    def __call__(self, x: Float[Array, "b n d"], lengths, cos, sin) -> Float[Array, "b n d"]:
        q, k, v = self.heads(x, cos, sin)
        y = attention(q, k, v, lengths=lengths, causal=True, implementation=self.implementation)
        return self.out(y.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, cfg: Qwen3Config, *, rngs: nnx.Rngs):
        self.gate_up = Dense(cfg.hidden_size, (cfg.intermediate_size,) * 2, rngs=rngs)
        self.down = Dense(cfg.intermediate_size, cfg.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        gate, up = self.gate_up.parts(x)
        return self.down(jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, cfg: Qwen3Config, implementation: str, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.attention = Attention(cfg, implementation, rngs=rngs)
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.ffn = FeedForward(cfg, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], lengths, cos, sin) -> Float[Array, "b n d"]:
        x = x + self.attention(self.attention_norm(x), lengths, cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class Qwen3(nnx.Module):
    """Embedding, layers and final norm; also the language model of Qwen3-VL."""

    def __init__(
        self,
        cfg: Qwen3Config,
        *,
        attention: str = "xla",
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.cfg, self.remat = cfg, remat
        init = jax.nn.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (cfg.vocab_size, cfg.hidden_size)))
        self.layers = stack(lambda r: Layer(cfg, attention, rngs=r), cfg.num_layers, rngs)
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)

    def __call__(
        self,
        ids: Int[Array, "b n"],
        lengths: Int[Array, " b"],
        *,
        hidden: tuple[int, ...],
        dtype: Any = jnp.float32,
    ) -> tuple[Float[Array, "b n d"], ...]:
        """Hidden states of token rows padded on the right, in the numbering of transformers.

        Entry 0 is the embedding, k the output of layer k - 1, num_layers the last layer's output
        after the final norm; negative ones count from the end. Only the layers needed are run.
        Rows from `lengths` on (each at least 1) are padding: they see the real tokens only, as with
        a padding mask in transformers, and depend on them and on their own id and position.
        """
        angles = jnp.arange(ids.shape[1])[None, :, None] * inverse_frequencies(
            self.cfg.head_dim, self.cfg.rope_theta
        )
        return self.hidden_states(
            self.embed(ids, dtype), lengths, jnp.cos(angles), jnp.sin(angles), hidden=hidden
        )

    def embed(self, ids: Int[Array, "b n"], dtype: Any) -> Float[Array, "b n d"]:
        """Token embeddings in `dtype`, the type in which everything after them is computed."""
        return self.embedding[...][ids].astype(dtype)

    def hidden_states(
        self,
        x: Float[Array, "b n d"],
        lengths: Int[Array, " b"],
        cos: Float[Array, "#b n r"],
        sin: Float[Array, "#b n r"],
        *,
        hidden: tuple[int, ...],
        deepstack: Sequence[Float[Array, "b n d"]] = (),
    ) -> tuple[Float[Array, "b n d"], ...]:
        """The chosen hidden states (see `__call__`) of embeddings x under given rotary tables.

        `deepstack[i]` is added to the output of layer i. As in transformers, entry i + 1 is that
        output before the addition; only the final norm and later layers see the sum.
        """
        depth = self.cfg.num_layers
        if not hidden or any(not -depth - 1 <= k <= depth for k in hidden):
            raise ValueError(f"hidden {hidden}: entries of a {depth}-layer model are 0 to {depth}")
        if len(deepstack) > depth:
            raise ValueError(f"{len(deepstack)} deepstack features for {depth} layers")
        wanted = [k % (depth + 1) for k in hidden]
        lengths = lengths.astype(jnp.int32)
        apply = lambda layer, x: layer(x, lengths, cos, sin)
        stops = {k for k in (*wanted, *range(1, len(deepstack) + 1)) if 0 < k <= max(wanted)}
        states, start = {0: x}, 0
        for stop in sorted(stops):
            x = scan_range(apply, self.layers, x, start, stop, self.remat)
            states[stop] = x
            if stop <= len(deepstack):
                x = x + deepstack[stop - 1].astype(x.dtype)
            start = stop
        if depth in wanted:
            states[depth] = self.norm(x)
        return tuple(states[k] for k in wanted)
