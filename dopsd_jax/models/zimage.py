"""Z-Image's transformer (`ZImageTransformer2DModel`), text-to-image mode, any configuration.

Dimension names: b batch, h w latent rows and columns, c channels, n image tokens, l caption tokens,
d width. Facts: the published checkpoint and diffusers 0.42.1.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dopsd_jax.common.json_fields import MAX_LAYERS, Fields
from dopsd_jax.models.attention import attention
from dopsd_jax.models.layers import Dense, RMSNorm, normalize, scan_blocks, sinusoids, stack
from dopsd_jax.models.names import Leaf, linear, vector
from dopsd_jax.models.zimage_rope import caption_positions, image_positions, rope_tables, rotate
from dopsd_jax.parallel.sharding import constrain_batch, declare_block_kernels

MODULATION_DIM = 256  # ADALN_EMBED_DIM; narrower models use their own width
TIME_HIDDEN = 1024
TIME_FREQUENCIES = 256
PAD_MULTIPLE = 32  # SEQ_MULTI_OF: image and caption are each padded to it, with learned tokens
QK_NORM_EPS = 1e-5  # fixed in the block, whatever `norm_eps` says
FINAL_NORM_EPS = 1e-6
MAX_POSITIONS = 1 << 16  # of an axis of the rotary tables
STACKS = ("noise_refiner", "context_refiner", "layers")  # parameters with a leading layer axis

declare_block_kernels(
    columns=("attention.qkv", "feed_forward.w13"), rows=("attention.out", "feed_forward.w2")
)


@dataclasses.dataclass(frozen=True)
class ZImageConfig:
    """Architecture; the fields of transformer/config.json under our names."""

    dim: int = 3840
    layers: int = 30
    refiner_layers: int = 2
    heads: int = 30
    channels: int = 16
    patch: int = 2
    caption_dim: int = 2560
    norm_eps: float = 1e-5
    qk_norm: bool = True
    rope_theta: float = 256.0
    time_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def hidden_dim(self) -> int:
        return int(self.dim / 3 * 8)  # diffusers' own expression: float division, then truncation

    @property
    def token_multiple(self) -> int:
        """What the numbers of image and of caption tokens are multiples of."""
        return PAD_MULTIPLE

    @property
    def groups(self) -> int:
        """Most devices that heads and hidden units can both be spread over; see `layers.Dense`."""
        return math.gcd(self.heads, self.hidden_dim)

    @property
    def modulation_dim(self) -> int:
        return min(self.dim, MODULATION_DIM)

    @property
    def max_caption(self) -> int:
        """Most caption tokens, padding included: image tokens stand at the next position."""
        return (self.axes_lens[0] - 2) // PAD_MULTIPLE * PAD_MULTIPLE

    @classmethod
    def from_dict(cls, config: Mapping, where: str) -> "ZImageConfig":
        """Reads transformer/config.json, named `where`. Raises `UserError` with every fault."""
        fields = Fields(config, where)
        # diffusers ignores n_kv_heads; the class has no grouped heads.
        patches = fields.counts("all_patch_size")
        if fields.counts("all_f_patch_size") != (1,) or len(patches) != 1:
            fields.problem(
                f"all_patch_size {fields.json.get('all_patch_size')} and all_f_patch_size "
                f"{fields.json.get('all_f_patch_size')}: supported are one patch size and frame "
                "patch 1"
            )
        if fields.json.get("siglip_feat_dim") is not None:
            fields.problem("siglip_feat_dim is set: Z-Image-Omni checkpoints are not supported")
        dim, heads = fields.count("dim"), fields.count("n_heads")
        axes_dims = fields.counts("axes_dims", 3, least=2)
        if dim and heads and axes_dims and (dim % heads or dim // heads != sum(axes_dims)):
            fields.problem(
                f"dim {dim} / n_heads {heads} is not the sum of axes_dims {list(axes_dims)}"
            )
        if any(a % 2 for a in axes_dims):
            fields.problem("axes_dims must be even")
        self = cls(
            dim=dim,
            layers=fields.count("n_layers", most=MAX_LAYERS),
            refiner_layers=fields.count("n_refiner_layers", most=MAX_LAYERS),
            heads=heads,
            channels=fields.count("in_channels"),
            caption_dim=fields.count("cap_feat_dim"),
            norm_eps=fields.positive("norm_eps"),
            qk_norm=fields.flag("qk_norm"),
            rope_theta=fields.positive("rope_theta"),
            time_scale=fields.positive("t_scale"),
            axes_dims=axes_dims,
            axes_lens=fields.counts("axes_lens", 3, most=MAX_POSITIONS),
            patch=patches[0] if patches else 0,
        )
        fields.finish()
        return self

    def to_dict(self) -> dict:
        """The same as transformer/config.json holds it."""
        return {
            "_class_name": "ZImageTransformer2DModel",
            "all_f_patch_size": [1],
            "all_patch_size": [self.patch],
            "axes_dims": list(self.axes_dims),
            "axes_lens": list(self.axes_lens),
            "cap_feat_dim": self.caption_dim,
            "dim": self.dim,
            "in_channels": self.channels,
            "n_heads": self.heads,
            "n_kv_heads": self.heads,
            "n_layers": self.layers,
            "n_refiner_layers": self.refiner_layers,
            "norm_eps": self.norm_eps,
            "qk_norm": self.qk_norm,
            "rope_theta": self.rope_theta,
            "t_scale": self.time_scale,
        }


def names(cfg: ZImageConfig) -> list[Leaf]:
    """Every tensor of the diffusers checkpoint and where it goes."""
    d, hidden, mod, size = cfg.dim, cfg.hidden_dim, cfg.modulation_dim, f"{cfg.patch}-1"
    pixels = cfg.patch**2 * cfg.channels

    def dense(path, module, dout, din):
        return [
            linear(f"{path}.kernel", None, (module, dout, din)),
            vector(f"{path}.bias", None, f"{module}.bias", dout),
        ]

    def block(where, i, modulated):
        torch, a, f = f"{where}.{i}", f"{where}.attention", f"{where}.feed_forward"
        ta, tf = f"{torch}.attention", f"{torch}.feed_forward"
        qkv = ((f"{ta}.to_{n}", d, d) for n in "qkv")
        yield linear(f"{a}.qkv.kernel", i, *qkv, groups=cfg.groups)
        yield linear(f"{a}.out.kernel", i, (f"{ta}.to_out.0", d, d))
        if cfg.qk_norm:
            yield vector(f"{a}.q_norm.scale", i, f"{ta}.norm_q.weight", cfg.head_dim)
            yield vector(f"{a}.k_norm.scale", i, f"{ta}.norm_k.weight", cfg.head_dim)
        w13 = ((f"{tf}.w{n}", hidden, d) for n in (1, 3))
        yield linear(f"{f}.w13.kernel", i, *w13, groups=cfg.groups)
        yield linear(f"{f}.w2.kernel", i, (f"{tf}.w2", d, hidden))
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            yield vector(f"{where}.{norm}.scale", i, f"{torch}.{norm}.weight", d)
        if modulated:
            yield linear(
                f"{where}.modulation.kernel", i, (f"{torch}.adaLN_modulation.0", 4 * d, mod)
            )
            yield vector(f"{where}.modulation.bias", i, f"{torch}.adaLN_modulation.0.bias", 4 * d)

    leaves = [
        *dense("x_embedder", f"all_x_embedder.{size}", d, pixels),
        vector("caption_norm.scale", None, "cap_embedder.0.weight", cfg.caption_dim),
        *dense("caption_embedder", "cap_embedder.1", d, cfg.caption_dim),
        *dense("time_in", "t_embedder.mlp.0", TIME_HIDDEN, TIME_FREQUENCIES),
        *dense("time_out", "t_embedder.mlp.2", mod, TIME_HIDDEN),
        vector("x_pad_token", None, "x_pad_token", 1, d),
        vector("caption_pad_token", None, "cap_pad_token", 1, d),
        *dense("final_linear", f"all_final_layer.{size}.linear", pixels, d),
        *dense("final_modulation", f"all_final_layer.{size}.adaLN_modulation.1", d, mod),
    ]
    for where, count in (
        ("noise_refiner", cfg.refiner_layers),
        ("context_refiner", cfg.refiner_layers),
        ("layers", cfg.layers),
    ):
        for i in range(count):
            leaves += block(where, i, where != "context_refiner")
    return leaves


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
            for y in self.qkv.split(self.qkv(x))
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
        parts = self.w13.split(self.w13(x))
        gate, up = (constrain_batch(y, "context", "tensor") for y in parts)
        return self.w2(jax.nn.silu(gate) * up)


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
