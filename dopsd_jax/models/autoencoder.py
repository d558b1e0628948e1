"""KL autoencoder: images to latents and back (diffusers' AutoencoderKL, as in FLUX.1 and Z-Image).

Channels-last throughout. The products run in the input's type, whatever the weights are stored in;
GroupNorm runs in float32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dopsd_jax.common.products import precision
from dopsd_jax.models.attention import attention
from dopsd_jax.models.autoencoder_config import AutoencoderConfig
from dopsd_jax.models.layers import Dense
from dopsd_jax.models.names import Leaf, Source, linear, vector
from dopsd_jax.models.tiling import Tiling, run_tiled

NORM_EPS = 1e-6
# Rows of the attention matrix that exist at a time: 1024 of a 2048x2048 image take 0.25 GiB.
ATTENTION_ROWS = 1024


class Conv(nnx.Module):
    """2-D convolution with bias; `padding` is ((top, bottom), (left, right)), zeros."""

    def __init__(self, din: int, dout: int, size: int, *, stride=1, padding=None, rngs: nnx.Rngs):
        self.stride = stride
        self.padding = padding or ((size // 2, size // 2),) * 2
        init = jax.nn.initializers.normal(1 / math.sqrt(size * size * din))
        self.kernel = nnx.Param(init(rngs.params(), (size, size, din, dout)))
        self.bias = nnx.Param(jnp.zeros((dout,)))

    def __call__(self, x: Float[Array, "b h w din"]) -> Float[Array, "b h2 w2 dout"]:
        y = _convolve(x, self.kernel[...], self.padding, self.stride)
        return y + self.bias[...].astype(x.dtype)

    def of_doubled(self, x: Float[Array, "b h w din"]) -> Float[Array, "b 2*h 2*w dout"]:
        """That of `x` at twice its size by nearest neighbour, for 3x3, in 4/9 of the products.

        Of three rows in the large picture two are one row of `x`: their kernels are added. Which
        two depends on whether the row of the result is even; so for columns.
        """

        def halved(kernel, axis: int, odd: int):
            first, middle, last = jnp.split(kernel, 3, axis)
            pair = (first + middle, last) if odd else (first, middle + last)
            return jnp.concatenate(pair, axis)

        (b, h, w, _), kernel = x.shape, self.kernel[...].astype(jnp.float32)
        parts = [
            _convolve(x, halved(halved(kernel, 0, i), 1, j), ((1 - i, i), (1 - j, j)))
            for i in (0, 1)
            for j in (0, 1)
        ]
        y = jnp.stack(parts, axis=3).reshape(b, h, w, 2, 2, -1).swapaxes(2, 3)
        return y.reshape(b, 2 * h, 2 * w, -1) + self.bias[...].astype(x.dtype)


def _convolve(x, kernel, padding, stride: int = 1):
    """In the type of `x`."""
    kernel = kernel.astype(x.dtype)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x, kernel),
    )


class GroupNorm(nnx.Module):
    """Normalisation over space and the channels of a group, with weight and bias, in float32."""

    def __init__(self, dim: int, groups: int):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.bias = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        b, _, _, d = x.shape
        y = x.astype(jnp.float32).reshape(b, -1, d)
        # Over space first, whole channels side by side: on a processor in a third of the time.
        y = y - self._over_groups(jnp.mean(y, axis=1))
        factor = jax.lax.rsqrt(self._over_groups(jnp.mean(y * y, axis=1)) + NORM_EPS)
        y = y * (factor * self.scale[...].astype(jnp.float32))
        return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype).reshape(x.shape)

    def _over_groups(self, means: Float[Array, "b d"]) -> Float[Array, "b 1 d"]:
        """Each channel's mean over the channels of its group."""
        b, d = means.shape
        grouped = jnp.mean(means.reshape(b, self.groups, -1), axis=2)
        return jnp.repeat(grouped, d // self.groups, axis=1)[:, None]


class ResnetBlock(nnx.Module):
    """Twice norm, SiLU, convolution; added to the input (1x1 convolution if the widths differ)."""

    def __init__(self, din: int, dout: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(din, groups)
        self.conv1 = Conv(din, dout, 3, rngs=rngs)
        self.norm2 = GroupNorm(dout, groups)
        self.conv2 = Conv(dout, dout, 3, rngs=rngs)
        self.shortcut = Conv(din, dout, 1, rngs=rngs) if din != dout else None

    def __call__(self, x: Float[Array, "b h w din"]) -> Float[Array, "b h w dout"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nnx.Module):
    """Single-head attention among all positions, added to the input."""

    def __init__(self, dim: int, groups: int, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(dim, groups)
        self.qkv = Dense(dim, (dim, dim, dim), bias=True, rngs=rngs)
        self.out = Dense(dim, dim, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        b, h, w, d = x.shape
        q, k, v = self.qkv.parts(self.norm(x))
        k, v = k.reshape(b, h * w, 1, d), v.reshape(b, h * w, 1, d)
        attend = lambda q: attention(q.reshape(b, -1, 1, d), k, v).reshape(q.shape)
        if h * w <= ATTENTION_ROWS:
            y = attend(q)
        else:
            # The whole attention matrix would be 16 GiB at 2048x2048.
            at_a_time = max(1, ATTENTION_ROWS // w)
            y = jnp.moveaxis(jax.lax.map(attend, jnp.moveaxis(q, 1, 0), batch_size=at_a_time), 0, 1)
        return x + self.out(y)


class MidBlock(nnx.Module):
    """Residual block, attention (unless switched off), residual block; lowest resolution."""

    def __init__(self, cfg: AutoencoderConfig, *, rngs: nnx.Rngs):
        dim, groups = cfg.block_out_channels[-1], cfg.norm_num_groups
        self.first = ResnetBlock(dim, dim, groups, rngs=rngs)
        self.attention = (
            SpatialAttention(dim, groups, rngs=rngs) if cfg.mid_block_add_attention else None
        )
        self.second = ResnetBlock(dim, dim, groups, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        x = self.first(x)
        if self.attention is not None:
            x = self.attention(x)
        return self.second(x)


class DownLevel(nnx.Module):
    """Residual blocks at one resolution, then half of it (`downsample`)."""

    def __init__(self, din, dout, blocks: int, groups: int, downsample: bool, *, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            ResnetBlock(din if i == 0 else dout, dout, groups, rngs=rngs) for i in range(blocks)
        )
        # One row of zeros below and one column at the right, none above and at the left.
        edge = ((0, 1), (0, 1))
        self.downsample = (
            Conv(dout, dout, 3, stride=2, padding=edge, rngs=rngs) if downsample else None
        )

    def __call__(self, x: Float[Array, "b h w din"]) -> Float[Array, "b h2 w2 dout"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsample is None else self.downsample(x)


class UpLevel(nnx.Module):
    """Residual blocks at one resolution, then twice that: nearest neighbour and a convolution."""

    def __init__(self, din, dout, blocks: int, groups: int, upsample: bool, *, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            ResnetBlock(din if i == 0 else dout, dout, groups, rngs=rngs) for i in range(blocks)
        )
        self.upsample = Conv(dout, dout, 3, rngs=rngs) if upsample else None

    def __call__(self, x: Float[Array, "b h w din"]) -> Float[Array, "b h2 w2 dout"]:
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsample is None:
            return x
        return self.upsample.of_doubled(x)


class Encoder(nnx.Module):
    """Images to the parameters of the posterior, before `quant_conv`."""

    def __init__(self, cfg: AutoencoderConfig, *, rngs: nnx.Rngs):
        dims, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = Conv(cfg.in_channels, dims[0], 3, rngs=rngs)
        self.levels = nnx.List(
            DownLevel(din, dout, cfg.layers_per_block, groups, i < len(dims) - 1, rngs=rngs)
            for i, (din, dout) in enumerate(encoder_widths(cfg))
        )
        self.mid = MidBlock(cfg, rngs=rngs)
        self.norm_out = GroupNorm(dims[-1], groups)
        self.conv_out = Conv(dims[-1], 2 * cfg.latent_channels, 3, rngs=rngs)

    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w m"]:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latents (after `post_quant_conv`) to images."""

    def __init__(self, cfg: AutoencoderConfig, *, rngs: nnx.Rngs):
        dims, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = Conv(cfg.latent_channels, dims[-1], 3, rngs=rngs)
        self.mid = MidBlock(cfg, rngs=rngs)
        self.levels = nnx.List(
            UpLevel(din, dout, cfg.layers_per_block + 1, groups, i < len(dims) - 1, rngs=rngs)
            for i, (din, dout) in enumerate(decoder_widths(cfg))
        )
        self.norm_out = GroupNorm(dims[0], groups)
        self.conv_out = Conv(dims[0], cfg.out_channels, 3, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        x = self.mid(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Autoencoder(nnx.Module):
    """The whole autoencoder. z is what the decoder takes; a latent is z shifted and scaled."""

    def __init__(self, cfg: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        z = cfg.latent_channels
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        self.quant_conv = Conv(2 * z, 2 * z, 1, rngs=rngs) if cfg.use_quant_conv else None
        self.post_quant_conv = Conv(z, z, 1, rngs=rngs) if cfg.use_post_quant_conv else None

    def moments(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w m"]:
        """Mean and raw log-variance of the posterior, joined along the channels."""
        moments = self.encoder(images)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def encode(
        self, images: Float[Array, "b H W c"]
    ) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
        """Mean and log-variance of the posterior of z; images in [-1, 1]."""
        return split_moments(self.moments(images))

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        """Images in about [-1, 1] (not clipped)."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def to_latent(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """The latent that the transformer sees."""
        return (z - self.cfg.shift_factor) * self.cfg.scaling_factor

    def from_latent(self, latent: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """Inverse of `to_latent`."""
        return latent / self.cfg.scaling_factor + self.cfg.shift_factor

    def encode_images(
        self,
        images: UInt8[Array, "b H W c"],
        key: Array | None = None,
        *,
        tiling: Tiling | None = None,
        dtype=jnp.float32,
    ) -> Float[Array, "b h w z"]:
        """Latents of images: the posterior's mode, or a sample of it if a `key` is given.

        Sides must be multiples of `cfg.factor`. With `tiling`, images over its limit are encoded
        tile by tile, from the host (not under `jax.jit`).
        """
        check_sides(images.shape[1:3], self.cfg.factor)
        x = from_uint8(images, dtype)
        if tiling is not None and tiling.needed(images.shape[1:3]):
            moments = run_tiled(
                lambda tile: _moments(self, tile), x, *tiling.sizes(self.cfg.stride), tiling.overlap
            )
        else:
            moments = _moments(self, x)
        mean, logvar = split_moments(moments)
        if key is not None:
            noise = jax.random.normal(key, mean.shape, jnp.float32).astype(mean.dtype)
            mean = mean + jnp.exp(0.5 * logvar) * noise
        return self.to_latent(mean)

    def decode_images(
        self, latents: Float[Array, "b h w z"], *, tiling: Tiling | None = None
    ) -> Float[Array, "b H W c"]:
        """Images of latents, float32 in [0, 255], not yet rounded (see `to_uint8`).

        With `tiling`, images over its limit are decoded tile by tile, from the host (not under
        `jax.jit`).
        """
        z = self.from_latent(latents)
        h, w = z.shape[1:3]
        if tiling is not None and tiling.needed((h * self.cfg.stride, w * self.cfg.stride)):
            large, small = tiling.sizes(self.cfg.stride)
            images = run_tiled(lambda tile: _decode(self, tile), z, small, large, tiling.overlap)
        else:
            images = _decode(self, z)
        return jnp.clip(images.astype(jnp.float32) * 127.5 + 127.5, 0, 255)


# One compilation for each shape of image or tile.
_moments = jax.jit(Autoencoder.moments)
_decode = jax.jit(Autoencoder.decode)


def split_moments(
    moments: Float[Array, "b h w m"],
) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
    """Mean and log-variance; the latter clipped as the reference does."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def from_uint8(images: UInt8[Array, "..."], dtype=jnp.float32) -> Float[Array, "..."]:
    """0..255 -> [-1, 1]."""
    return (jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0).astype(dtype)


def to_uint8(images: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Rounds the output of `decode_images`, half to even as the reference does."""
    return jnp.round(images).astype(jnp.uint8)


def check_sides(sides: tuple[int, int], factor: int) -> None:
    """Raises `ValueError` unless both sides are multiples of `factor`."""
    if any(side % factor for side in sides):
        raise ValueError(f"image of {sides[0]}x{sides[1]}: sides must be multiples of {factor}")


def encoder_widths(cfg: AutoencoderConfig) -> list[tuple[int, int]]:
    """(input, output) channels of the encoder's levels, from the full resolution down."""
    dims = cfg.block_out_channels
    return list(zip((dims[0], *dims), dims, strict=False))


def decoder_widths(cfg: AutoencoderConfig) -> list[tuple[int, int]]:
    """(input, output) channels of the decoder's levels, from the lowest resolution up."""
    dims = cfg.block_out_channels[::-1]
    return list(zip((dims[0], *dims), dims, strict=False))


def names(cfg: AutoencoderConfig) -> list[Leaf]:
    """Every parameter and the diffusers tensors it is made of."""
    dims, z = cfg.block_out_channels, cfg.latent_channels
    last = len(dims) - 1
    leaves = []
    for path, widths, blocks, io, sampler in (
        ("encoder", encoder_widths(cfg), cfg.layers_per_block, (cfg.in_channels, 2 * z), "down"),
        ("decoder", decoder_widths(cfg), cfg.layers_per_block + 1, (z, cfg.out_channels), "up"),
    ):
        leaves += _conv(f"{path}.conv_in", f"{path}.conv_in", io[0], widths[0][0], 3)
        leaves += _mid_block(
            f"{path}.mid", f"{path}.mid_block", dims[-1], cfg.mid_block_add_attention
        )
        for i, (din, dout) in enumerate(widths):
            level, theirs = f"{path}.levels.{i}", f"{path}.{sampler}_blocks.{i}"
            for j in range(blocks):
                first = din if j == 0 else dout
                leaves += _resnet(f"{level}.resnets.{j}", f"{theirs}.resnets.{j}", first, dout)
            if i < last:
                name = f"{theirs}.{sampler}samplers.0.conv"
                leaves += _conv(f"{level}.{sampler}sample", name, dout, dout, 3)
        width = widths[-1][1]
        leaves += _norm(f"{path}.norm_out", f"{path}.conv_norm_out", width)
        leaves += _conv(f"{path}.conv_out", f"{path}.conv_out", width, io[1], 3)
    if cfg.use_quant_conv:
        leaves += _conv("quant_conv", "quant_conv", 2 * z, 2 * z, 1)
    if cfg.use_post_quant_conv:
        leaves += _conv("post_quant_conv", "post_quant_conv", z, z, 1)
    return leaves


def _conv(path: str, name: str, din: int, dout: int, size: int) -> list[Leaf]:
    kernel = Leaf(
        f"{path}.kernel", None, (Source(f"{name}.weight", (dout, din, size, size)),), "conv"
    )
    return [kernel, vector(f"{path}.bias", None, f"{name}.bias", dout)]


def _norm(path: str, name: str, dim: int) -> list[Leaf]:
    return [
        vector(f"{path}.scale", None, f"{name}.weight", dim),
        vector(f"{path}.bias", None, f"{name}.bias", dim),
    ]


def _resnet(path: str, name: str, din: int, dout: int) -> list[Leaf]:
    shortcut = _conv(f"{path}.shortcut", f"{name}.conv_shortcut", din, dout, 1)
    return [
        *_norm(f"{path}.norm1", f"{name}.norm1", din),
        *_conv(f"{path}.conv1", f"{name}.conv1", din, dout, 3),
        *_norm(f"{path}.norm2", f"{name}.norm2", dout),
        *_conv(f"{path}.conv2", f"{name}.conv2", dout, dout, 3),
        *(shortcut if din != dout else []),
    ]


def _mid_block(path: str, name: str, dim: int, attend: bool) -> list[Leaf]:
    leaves = _resnet(f"{path}.first", f"{name}.resnets.0", dim, dim)
    if attend:
        ours, theirs = f"{path}.attention", f"{name}.attentions.0"
        qkv = [f"{theirs}.to_{part}" for part in "qkv"]
        leaves += _norm(f"{ours}.norm", f"{theirs}.group_norm", dim)
        leaves += [
            linear(f"{ours}.qkv.kernel", None, *((part, dim, dim) for part in qkv)),
            Leaf(f"{ours}.qkv.bias", None, tuple(Source(f"{p}.bias", (dim,)) for p in qkv), "same"),
            linear(f"{ours}.out.kernel", None, (f"{theirs}.to_out.0", dim, dim)),
            vector(f"{ours}.out.bias", None, f"{theirs}.to_out.0.bias", dim),
        ]
    return leaves + _resnet(f"{path}.second", f"{name}.resnets.1", dim, dim)
