"""Z-Image's transformer (`ZImageTransformer2DModel`), text-to-image mode, any configuration.

Dimension names: b batch, h w latent rows and columns, c channels, n image tokens, l caption tokens,
d width. Facts: the published checkpoint and diffusers 0.42.1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dopsd_jax.models.attention import attention
from dopsd_jax.models.layers import Dense, RMSNorm, gated, normalize, scan_blocks, sinusoids, stack
from dopsd_jax.models.zimage_config import (
    PAD_MULTIPLE,
    TIME_FREQUENCIES,
    TIME_HIDDEN,
    ZImageConfig,
)
from dopsd_jax.models.zimage_rope import caption_positions, image_positions, rope_tables, rotate
from dopsd_jax.parallel.sharding import constrain_batch, declare_block_kernels

QK_NORM_EPS = 1e-5  # fixed in the block, whatever `norm_eps` says
FINAL_NORM_EPS = 1e-6
STACKS = ("noise_refiner", "context_refiner", "layers")  # parameters with a leading layer axis

declare_block_kernels(
    columns=("attention.qkv", "feed_forward.w13"), rows=("attention.out", "feed_forward.w2")
)


class Attention(nnx.Module):
    """Self-attention with normalised queries and keys."""

    def __init__(self, cfg: ZImageConfig, implementation: str, *, rngs: nnx.Rngs):
        self.heads, self.implementation = cfg.heads, implementation
        self.qkv = Dense(cfg.dim, (cfg.dim,) * 3, groups=cfg.groups, rngs=rngs)
        self.out = Dense(cfg.dim, cfg.dim, rngs=rngs)
        self.q_norm = RMSNorm(cfg.head_dim, QK_NORM_EPS) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, QK_NORM_EPS) if cfg.qk_norm else None

    def __call__(
        self, x: Float[Array, "b n d"], rope, lengths: Int[Array, " b"]
    ) -> Float[Array, "b n d"]:
        q, k, v = (
            constrain_batch(y.reshape(*y.shape[:2], self.heads, -1), "context", "tensor", None)
            for y in self.qkv.parts(x)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        y = attention(q, k, v, lengths=lengths, implementation=self.implementation)
        return self.out(y.reshape(x.shape))


class FeedForward(nnx.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, cfg: ZImageConfig, *, rngs: nnx.Rngs):
        self.w13 = Dense(cfg.dim, (cfg.hidden_dim,) * 2, groups=cfg.groups, rngs=rngs)
        self.w2 = Dense(cfg.hidden_dim, cfg.dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.w2(gated(*self.w13.parts(x)))


class Block(nnx.Module):
    """A layer with a norm before and after each half; scaled and gated by the time if modulated."""

    def __init__(self, cfg: ZImageConfig, implementation: str, modulated: bool, *, rngs: nnx.Rngs):
        self.attention = Attention(cfg, implementation, rngs=rngs)
        self.feed_forward = FeedForward(cfg, rngs=rngs)
        self.attention_norm1 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attention_norm2 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm1 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm2 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.modulation = (
            Dense(cfg.modulation_dim, 4 * cfg.dim, bias=True, rngs=rngs) if modulated else None
        )

    def __call__(
        self,
        x: Float[Array, "b n d"],
        rope,
        lengths: Int[Array, " b"],
        c: Float[Array, "b m"] | None = None,
    ) -> Float[Array, "b n d"]:
        if self.modulation is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rope, lengths))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        # In float32: a few numbers a sample, and every token feels their rounding.
        modulation = constrain_batch(self.modulation(c)[:, None])
        s_attn, g_attn, s_ffn, g_ffn = jnp.split(modulation, 4, axis=-1)
        scale = lambda s: (1 + s).astype(x.dtype)
        gate = lambda g: jnp.tanh(g).astype(x.dtype)
        y = self.attention(self.attention_norm1(x) * scale(s_attn), rope, lengths)
        x = x + gate(g_attn) * self.attention_norm2(y)
        y = self.feed_forward(self.ffn_norm1(x) * scale(s_ffn))
        return x + gate(g_ffn) * self.ffn_norm2(y)


class ZImage(nnx.Module):
    """The transformer: `refine` embeds the caption, without the time; `__call__` is one forward.

    Args:
      cfg: architecture.
      dtype: type of activations; parameters keep the type they are loaded in.
      attention: see `attention.IMPLEMENTATIONS`.
      remat: see `layers.scan_blocks`.
    """

    def __init__(
        self,
        cfg: ZImageConfig,
        *,
        dtype=jnp.float32,
        attention: str = "xla",
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.cfg, self.dtype, self.remat = cfg, jnp.dtype(dtype), remat
        make = lambda modulated: lambda r: Block(cfg, attention, modulated, rngs=r)
        pixels = cfg.patch**2 * cfg.channels
        self.x_embedder = Dense(pixels, cfg.dim, bias=True, rngs=rngs)
        self.caption_norm = RMSNorm(cfg.caption_dim, cfg.norm_eps)
        self.caption_embedder = Dense(cfg.caption_dim, cfg.dim, bias=True, rngs=rngs)
        self.time_in = Dense(TIME_FREQUENCIES, TIME_HIDDEN, bias=True, rngs=rngs)
        self.time_out = Dense(TIME_HIDDEN, cfg.modulation_dim, bias=True, rngs=rngs)
        self.x_pad_token = nnx.Param(jnp.zeros((1, cfg.dim)))
        self.caption_pad_token = nnx.Param(jnp.zeros((1, cfg.dim)))
        self.noise_refiner = stack(make(True), cfg.refiner_layers, rngs)
        self.context_refiner = stack(make(False), cfg.refiner_layers, rngs)
        self.layers = stack(make(True), cfg.layers, rngs)
        self.final_modulation = Dense(cfg.modulation_dim, cfg.dim, bias=True, rngs=rngs)
        self.final_linear = Dense(cfg.dim, pixels, bias=True, rngs=rngs)

    def refine(
        self, features: Float[Array, "b l c"], lengths: Int[Array, " b"]
    ) -> Float[Array, "b l d"]:
        """Embeds and refines captions. l is a multiple of 32; rows from `lengths` on are void."""
        l = features.shape[1]
        if l % PAD_MULTIPLE or l > self.cfg.max_caption:
            raise ValueError(
                f"caption rows {l} must be a multiple of {PAD_MULTIPLE} and at most "
                f"{self.cfg.max_caption}"
            )
        x = self.caption_embedder(self.caption_norm(features.astype(self.dtype)))
        real = jnp.arange(l) < lengths[:, None]
        x = jnp.where(real[..., None], x, self.caption_pad_token[...].astype(x.dtype))
        rope = self._rope(caption_positions(l)[None])
        padded = padded_length(lengths)
        x = scan_blocks(
            lambda block, x: block(x, rope, padded), self.context_refiner, x, self.remat
        )
        return constrain_batch(x)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        caption: Float[Array, "b l d"],
        lengths: Int[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """The network's own output x0 - noise, in float32; t = 1 - sigma; `caption` is refined."""
        tokens, block, c = self.enter(x, t, caption, lengths)
        return self.leave(scan_blocks(block, self.layers, tokens, self.remat), c, x.shape)

    def enter(self, x, t, caption, lengths) -> tuple[Array, Callable, Array]:
        """What the layers begin with: tokens [b, n, d], image first; (layer, tokens) -> tokens;
        and the embedded time."""
        cfg, (h, w) = self.cfg, x.shape[1:3]
        rows, columns = h // cfg.patch, w // cfg.patch
        tokens = rows * columns
        if h % cfg.patch or w % cfg.patch or rows > cfg.axes_lens[1] or columns > cfg.axes_lens[2]:
            raise ValueError(
                f"latent {h} x {w}: sides must be multiples of {cfg.patch} and fit axes_lens "
                f"{cfg.axes_lens}"
            )
        padded = padded_length(lengths)
        c = self.time_out(
            jax.nn.silu(self.time_in(sinusoids(t * cfg.time_scale, TIME_FREQUENCIES)))
        )

        image = self.x_embedder(patchify(x, cfg.patch).astype(self.dtype))
        pads = -tokens % PAD_MULTIPLE
        pad_rows = jnp.broadcast_to(
            self.x_pad_token[...].astype(self.dtype), (len(x), pads, cfg.dim)
        )
        image = jnp.concatenate([image, pad_rows], axis=1)
        image_rope = self._rope(image_positions(rows, columns, pads, padded))
        image_lengths = jnp.full((len(x),), tokens + pads)
        image = scan_blocks(
            lambda block, x: block(x, image_rope, image_lengths, c),
            self.noise_refiner,
            image,
            self.remat,
        )

        # Image first, so that the rows behind a caption's own padding are the last ones.
        both = jnp.concatenate([constrain_batch(image), caption.astype(self.dtype)], axis=1)
        caption_rope = self._rope(caption_positions(caption.shape[1])[None])
        rope = jax.tree.map(
            lambda i, l: jnp.concatenate([i, jnp.broadcast_to(l, (len(x), *l.shape[1:]))], axis=1),
            image_rope,
            caption_rope,
        )
        total = tokens + pads + padded
        return both, lambda block, x: block(x, rope, total, c), c

    def leave(self, tokens, c, shape: tuple[int, ...]) -> Float[Array, "b h w c"]:
        """The output for a latent of that shape, from the last layer's tokens; `c` is the time."""
        rows, columns = shape[1] // self.cfg.patch, shape[2] // self.cfg.patch
        # For all tokens: where they are split over devices, only their few outputs are gathered.
        y = normalize(tokens.astype(jnp.float32), FINAL_NORM_EPS)
        y = y * (1 + self.final_modulation(jax.nn.silu(c)))[:, None]
        y = constrain_batch(self.final_linear(y.astype(self.dtype)))
        y = y[:, : rows * columns].astype(jnp.float32)
        return unpatchify(y, rows, columns, self.cfg.patch)

    def _rope(self, positions: Int[Array, "b n 3"]) -> tuple[Array, Array]:
        tables = rope_tables(self.cfg.rope_theta, self.cfg.axes_dims, self.cfg.axes_lens)
        picked = [jnp.asarray(table)[positions[..., axis]] for axis, table in enumerate(tables)]
        angles = jnp.concatenate(picked, axis=-1)
        return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def padded_length(lengths: Int[Array, " b"]) -> Int[Array, " b"]:
    """Caption lengths with the learned padding, which is attended to."""
    return (lengths + PAD_MULTIPLE - 1) // PAD_MULTIPLE * PAD_MULTIPLE


def patchify(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n p"]:
    """Tokens in raster order; in a token row, column, channel, the channel fastest."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, -1, patch * patch * c)


def unpatchify(
    x: Float[Array, "b n p"], rows: int, columns: int, patch: int
) -> Float[Array, "b h w c"]:
    """Inverse of `patchify`."""
    b = len(x)
    x = x.reshape(b, rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * patch, columns * patch, -1)
