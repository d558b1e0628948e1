"""FLUX.2's transformer (`Flux2Transformer2DModel`) as FLUX.2-klein has it: no biases, no guidance.

Dimension names: b batch, h w rows and columns of tokens, c channels, n tokens, l text tokens,
r reference tokens, d width. Facts: the published checkpoints and diffusers 0.42.1.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dopsd_jax.models.attention import attention
from dopsd_jax.models.flux2_config import Flux2Config
from dopsd_jax.models.interleaved import Interleaved
from dopsd_jax.models.layers import (
    Dense,
    RMSNorm,
    gated,
    normalize,
    repeated,
    scan_blocks,
    sinusoids,
    stack,
)
from dopsd_jax.models.zimage_rope import rotate
from dopsd_jax.parallel.sharding import axis_size, constrain_batch, declare_block_kernels

STACKS = ("double", "single")  # parameters with a leading layer axis
REFERENCE_FRAME = 10  # the k-th reference stands at 10, 20, ... on the first rotary axis

declare_block_kernels(
    columns=("image.qkv", "text.qkv", "w_in"), rows=("image.out", "text.out", "w_out")
)


def rope(cfg: Flux2Config, positions: np.ndarray) -> tuple[Array, Array]:
    """Cosine and sine [n, 1, frequency] of positions [n, 4]: computed in float64, then rounded."""
    parts = []
    for axis, width in enumerate(cfg.axes_dims):
        places = positions[:, axis].astype(np.float64)
        table, which = np.unique(places, return_inverse=True)
        frequencies = cfg.rope_theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angles = np.outer(table, frequencies)
        both = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
        parts.append(jnp.asarray(both)[:, which])  # a small table, and rows of it
    cos, sin = jnp.concatenate(parts, axis=-1)[:, :, None]
    return cos, sin


def text_positions(l: int) -> np.ndarray:
    """[l, 4]: texts stand along the last axis."""
    return np.pad(np.arange(l)[:, None], ((0, 0), (3, 0)))


def image_positions(rows: int, columns: int, frame: int = 0) -> np.ndarray:
    """[rows * columns, 4]: pictures stand on the two middle axes, each in its own frame."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.stack([np.full_like(row, frame), row, column, np.zeros_like(row)], axis=-1)


def modulated(x: Float[Array, "b n d"], shift, scale, eps: float) -> Float[Array, "b n d"]:
    """Layer normalisation in float32, then scaled and shifted by [b, 1, d] each."""
    y = repeated(lambda x: normalize(x.astype(jnp.float32), eps).astype(x.dtype), x)
    return y * (1 + scale).astype(x.dtype) + shift.astype(x.dtype)


class Row(NamedTuple):
    """Text, image and references as one row of tokens.

    `order`: of the two parts text and the rest, interleaved, so that a device of the axis context
    has some of both. `rope`: of the row, or of each sample's. `lengths`: see `attention`.
    """

    order: Interleaved
    rope: tuple[Array, Array]
    lengths: Int[Array, " b"] | None


class Stream(nnx.Module):
    """What a double block has for the tokens of one kind: of the image, or of the text."""

    def __init__(self, cfg: Flux2Config, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = Dense(cfg.dim, (cfg.dim,) * 3, groups=cfg.groups, rngs=rngs)
        self.out = Dense(cfg.dim, cfg.dim, rngs=rngs)
        self.q_norm, self.k_norm = (RMSNorm(cfg.head_dim, cfg.eps) for _ in range(2))
        halves = (cfg.hidden_dim,) * 2
        self.w_in = Dense(cfg.dim, halves, groups=cfg.groups, fused_before=True, rngs=rngs)
        self.w_out = Dense(cfg.hidden_dim, cfg.dim, rngs=rngs)

    def project(self, x: Float[Array, "b n d"], shift, scale) -> tuple[Array, Array, Array]:
        """Queries, keys and values [b, n, head, head_dim]."""
        parts = self.qkv.parts(modulated(x, shift, scale, self.cfg.eps))
        q, k, v = (_heads(part, self.cfg) for part in parts)
        return self.q_norm(q), self.k_norm(k), v

    def finish(self, x: Float[Array, "b n d"], attended, gate, rest) -> Float[Array, "b n d"]:
        """Adds what attention gave, then the feed-forward part; `rest`: its shift, scale, gate."""
        x = x + gate.astype(x.dtype) * self.out(attended)
        shift, scale, gate = rest
        parts = self.w_in.parts(modulated(x, shift, scale, self.cfg.eps))
        return x + gate.astype(x.dtype) * self.w_out(gated(*parts))


class DoubleBlock(nnx.Module):
    """Image and text with weights of their own, in one attention."""

    def __init__(self, cfg: Flux2Config, implementation: str, rngs: nnx.Rngs):
        self.implementation = implementation
        self.image, self.text = Stream(cfg, rngs), Stream(cfg, rngs)

    def __call__(self, x, row: Row, image_modulation, text_modulation):
        """x: image [b, n, d] and text [b, l, d]; a modulation: six arrays [b, 1, d]."""
        image, text = x
        (i_shift, i_scale, i_gate, *i_rest), (t_shift, t_scale, t_gate, *t_rest) = (
            image_modulation,
            text_modulation,
        )
        parts = zip(
            self.text.project(text, t_shift, t_scale),
            self.image.project(image, i_shift, i_scale),
            strict=True,
        )
        q, k, v = (row.order.join(pair, axis=1) for pair in parts)
        text_y, image_y = row.order.split(attend(q, k, v, row, self.implementation), axis=1)
        return (
            self.image.finish(image, image_y, i_gate, i_rest),
            self.text.finish(text, text_y, t_gate, t_rest),
        )


class SingleBlock(nnx.Module):
    """Attention and feed-forward side by side, each between the same two linear layers."""

    def __init__(self, cfg: Flux2Config, implementation: str, rngs: nnx.Rngs):
        self.cfg, self.implementation = cfg, implementation
        d, hidden, groups = cfg.dim, cfg.hidden_dim, cfg.groups
        outputs = (d, d, d, hidden, hidden)
        self.w_in = Dense(d, outputs, groups=groups, fused_before=True, rngs=rngs)
        self.w_out = Dense((d, hidden), d, groups=groups, rngs=rngs)
        self.q_norm, self.k_norm = (RMSNorm(cfg.head_dim, cfg.eps) for _ in range(2))

    def __call__(self, x: Float[Array, "b n d"], row: Row, modulation) -> Float[Array, "b n d"]:
        shift, scale, gate = modulation
        *qkv, hidden, up = self.w_in.parts(modulated(x, shift, scale, self.cfg.eps))
        q, k, v = (_heads(part, self.cfg) for part in qkv)
        y = attend(self.q_norm(q), self.k_norm(k), v, row, self.implementation)
        y = self.w_out.inputs.join([y, gated(hidden, up)])
        return x + gate.astype(x.dtype) * self.w_out(y)


def attend(q, k, v, row: Row, implementation: str) -> Float[Array, "b n d"]:
    """Attention of the whole row; queries, keys and values are [b, n, head, head_dim]."""
    q, k = rotate(q, row.rope), rotate(k, row.rope)
    y = attention(q, k, v, lengths=row.lengths, implementation=implementation)
    return y.reshape(*y.shape[:2], -1)


def _heads(x: Float[Array, "b n d"], cfg: Flux2Config) -> Float[Array, "b n h f"]:
    x = x.reshape(*x.shape[:2], cfg.heads, cfg.head_dim)
    return constrain_batch(x, "context", "tensor", None)


class Begin(NamedTuple):
    """What the blocks begin with: tokens of the image with its references, and of the text.

    double, single: (block, tokens) -> tokens; those of the single blocks are one row, `joined`.
    """

    tokens: tuple[Float[Array, "b n d"], Float[Array, "b l d"]]
    double: Callable
    single: Callable
    row: Row
    c: Float[Array, "b d"]

    def joined(self, tokens: tuple[Array, Array]) -> Float[Array, "b m d"]:
        """Text and image as one row."""
        image, text = tokens
        return self.row.order.join([text, image], axis=1)


class Flux2(nnx.Module):
    """The transformer: `embed` takes what does not depend on the time, `__call__` is one forward.

    Args:
      cfg: architecture.
      dtype: type of activations; parameters keep the type they are loaded in.
      attention: see `attention.IMPLEMENTATIONS`.
      remat: see `layers.scan_blocks`.
    """

    def __init__(
        self,
        cfg: Flux2Config,
        *,
        dtype=jnp.float32,
        attention: str = "xla",
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.cfg, self.dtype, self.remat = cfg, jnp.dtype(dtype), remat
        d = cfg.dim
        self.x_embedder = Dense(cfg.channels, d, rngs=rngs)
        self.text_embedder = Dense(cfg.text_dim, d, rngs=rngs)
        self.time_in = Dense(cfg.time_frequencies, d, rngs=rngs)
        self.time_out = Dense(d, d, rngs=rngs)
        self.image_modulation = Dense(d, 6 * d, rngs=rngs)
        self.text_modulation = Dense(d, 6 * d, rngs=rngs)
        self.single_modulation = Dense(d, 3 * d, rngs=rngs)
        self.double = stack(lambda r: DoubleBlock(cfg, attention, r), cfg.double_layers, rngs)
        self.single = stack(lambda r: SingleBlock(cfg, attention, r), cfg.single_layers, rngs)
        self.final_modulation = Dense(d, 2 * d, rngs=rngs)
        self.final_linear = Dense(d, cfg.channels, rngs=rngs)

    def embed(
        self,
        features: Float[Array, "b l t"],
        references: Sequence[Float[Array, "b _h _w c"]] = (),
        kept: Int[Array, "b k"] | None = None,
    ) -> tuple[Float[Array, "b l d"], tuple[Float[Array, "b _r d"], ...]]:
        """The tokens of the text and of clean reference latents; `kept`: cells of the last one."""
        text = constrain_batch(self.text_embedder(features.astype(self.dtype)))
        tokens = [self._tokens(latent) for latent in references]
        if kept is not None:
            tokens[-1] = jnp.take_along_axis(tokens[-1], kept[..., None], axis=1)
        return text, tuple(tokens)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        sigma: Float[Array, " b"],
        text: Float[Array, "b l d"],
        references: Sequence[Float[Array, "b _r d"]] = (),
        sizes: Sequence[tuple[int, int]] = (),
        kept: Int[Array, "b k"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """The network's output noise - x0, in float32.

        `text`, `references`, `kept`: see `embed`; `sizes`: rows and columns of each reference's
        latent.
        """
        begin = self.enter(x, sigma, text, references, sizes, kept)
        tokens = scan_blocks(begin.double, self.double, begin.tokens, self.remat)
        tokens = scan_blocks(begin.single, self.single, begin.joined(tokens), self.remat)
        return self.leave(begin.row.order.split(tokens, axis=1)[1], begin.c, x.shape)

    def enter(self, x, sigma, text, references=(), sizes=(), kept=None) -> Begin:
        """What the blocks begin with; arguments: see `__call__`."""
        h, w = x.shape[1:3]
        image = jnp.concatenate([self._tokens(x), *references], axis=1)
        row, pads = self._row(text.shape[1], [(h, w), *sizes], len(x), kept)
        image = jnp.pad(image, ((0, 0), (0, pads), (0, 0)))
        c = self.time_out(
            jax.nn.silu(self.time_in(sinusoids(1000.0 * sigma, self.cfg.time_frequencies)))
        )
        image_modulation = self._modulation(self.image_modulation, c, 6)
        text_modulation = self._modulation(self.text_modulation, c, 6)
        single_modulation = self._modulation(self.single_modulation, c, 3)
        return Begin(
            (image, text.astype(self.dtype)),
            lambda block, tokens: block(tokens, row, image_modulation, text_modulation),
            lambda block, tokens: block(tokens, row, single_modulation),
            row,
            c,
        )

    def leave(self, image: Float[Array, "b _n d"], c, shape: tuple[int, ...]) -> Array:
        """The output for a latent of that shape, from the image's tokens; `c`: the time."""
        tokens = constrain_batch(image)[:, : shape[1] * shape[2]]
        scale, shift = self._modulation(self.final_modulation, c, 2)
        y = self.final_linear(modulated(tokens, shift, scale, self.cfg.eps))
        return y.astype(jnp.float32).reshape(shape)

    def _row(
        self, l: int, sizes: Sequence[tuple[int, int]], b: int, kept: Int[Array, "b k"] | None
    ) -> tuple[Row, int]:
        """Where l text tokens, an image and references of `sizes` stand, and how many tokens of
        padding follow, so that the mesh axis context divides their number."""
        frames = [(*size, REFERENCE_FRAME * k) for k, size in enumerate(sizes)]
        places = np.concatenate([image_positions(*frame) for frame in frames])
        cells = len(places)
        n = cells if kept is None else cells - math.prod(sizes[-1]) + kept.shape[1]
        groups = math.gcd(l, axis_size("context"))
        pads = -n % groups
        if pads * groups > n + pads:  # so few that padding would not be the end of the row only
            groups, pads = 1, 0
        order = Interleaved((l, n + pads), groups)
        lengths = jnp.full((b,), l + n) if pads else None
        if kept is None:
            places = order.join([text_positions(l), np.pad(places, ((0, pads), (0, 0)))], axis=0)
            return Row(order, rope(self.cfg, places), lengths), pads
        # Samples keep other cells, so each has its own rows of one table; its last row is padding.
        table = rope(self.cfg, np.concatenate([text_positions(l), places, np.zeros((1, 4))]))
        every = lambda first, count: jnp.broadcast_to(first + jnp.arange(count), (b, count))
        before = n - kept.shape[1]
        image = [every(l, before), l + before + kept, jnp.full((b, pads), l + cells)]
        rows = order.join([every(0, l), jnp.concatenate(image, axis=1)], axis=1)
        return Row(order, tuple(one[rows] for one in table), lengths), pads

    def _tokens(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        flat = latent.reshape(len(latent), -1, latent.shape[-1]).astype(self.dtype)
        return constrain_batch(self.x_embedder(flat))

    def _modulation(self, layer: Dense, c: Float[Array, "b d"], count: int) -> list[Array]:
        # In float32: a few numbers a sample, and every token feels their rounding.
        return jnp.split(constrain_batch(layer(jax.nn.silu(c))[:, None]), count, axis=-1)
