"""The three networks that are trained together, and the contexts and velocities they give.

Dimension names: b batch, n tokens of a context, p patches, h w c of a latent.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from dopsd_jax.families.zimage import family as zimage_family
from dopsd_jax.miniature.families import Told
from dopsd_jax.miniature.render import SIDE
from dopsd_jax.miniature.zimage import configs
from dopsd_jax.miniature.zimage.configs import Size
from dopsd_jax.models import kinds, qwen3, qwen3_vl, qwen3_vl_vision, zimage

GRID = (SIDE // configs.IMAGE_PATCH,) * 2
REMAT = kinds.UNROLLED
GATE = 0.5  # start of the transformer's gates, before the tanh


class Context(NamedTuple):
    """Features of all token rows; and what the transformer is told: without what is left out."""

    features: Float[Array, "b n c"]
    caption: Any
    lengths: Int[Array, " b"]


class Networks(nnx.Module):
    """Transformer, text encoder (the language model of both contexts) and vision tower."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        transformer, text, vlm, _ = configs.parsed(size)
        self.transformer = zimage.ZImage(transformer, remat=REMAT, rngs=rngs)
        self.text = qwen3.Qwen3(text, remat=REMAT, rngs=rngs)
        self.vision = qwen3_vl_vision.Qwen3VLVision(vlm.vision, rngs=rngs)
        self.vlm = vlm

    def context(self, told: Told, keys: Key[Array, " b"] | None = None) -> Context:
        """See `families.Networks`."""
        if told.images is None:
            features, lengths = self.text(told.ids, told.lengths, hidden=(-2,))[0], told.lengths
            return Context(features, self.transformer.refine(features, lengths), lengths)
        patches = patches_of(told.images)
        features = qwen3_vl.encode(
            self.vision, self.text, self.vlm, told.ids, told.lengths, patches, GRID, hidden=(-2,)
        )[0]
        left, lengths = features, told.lengths
        if keys is not None:
            left, lengths = _dropped(features, told, keys)
        return Context(features, self.transformer.refine(left, lengths), lengths)

    def velocity(self, x: Float[Array, "b h w c"], sigma: Float[Array, " b"], context: Context):
        """dx/dsigma: the project's sign, as `families.zimage.denoiser` gives it."""
        return -self.transformer(x, 1.0 - sigma, context.caption, context.lengths)

    def velocity_and_states(self, x, sigma, context: Context):
        """The same, and the image tokens [b, p, c] after each layer of the transformer."""
        net, states = self.transformer, []
        tokens, apply, c = net.enter(x, 1.0 - sigma, context.caption, context.lengths)
        for i in range(net.cfg.layers):
            tokens = apply(jax.tree.map(lambda a, i=i: a[i], net.layers), tokens)
            states.append(tokens[:, : GRID[0] * GRID[1]])
        return -net.leave(tokens, c, x.shape), states


def _dropped(features: Float[Array, "b n c"], told: Told, keys: Key[Array, " b"]):
    """Features and lengths without the share of an image's tokens that `told.dropped` says."""
    first = jnp.argmax(told.ids == configs.IDS["<|image_pad|>"], axis=1)
    picture = jnp.stack([first, jnp.full_like(first, GRID[0] * GRID[1])], axis=1)
    drop = lambda f, n, p, key, share: zimage_family.drop_picture(
        zimage_family.Context(f[None], n[None], p[None]), key[None], share
    )[:2]
    left, lengths = jax.vmap(drop)(features, told.lengths, picture, keys, told.dropped)
    return left[:, 0], lengths[:, 0]


def patches_of(images: UInt8[Array, "b s s 3"]) -> Float[Array, "b p c"]:
    """What the vision tower's processor makes of square pictures that need no resizing."""
    patch = configs.IMAGE_PATCH
    b, s = images.shape[:2]
    x = jnp.asarray(images).astype(jnp.float32) / 127.5 - 1
    x = x.reshape(b, s // patch, patch, s // patch, patch, 3).transpose(0, 1, 3, 5, 2, 4)
    x = jnp.repeat(x[:, :, :, :, None], 2, axis=4)  # a still image is two equal frames
    return x.reshape(b, GRID[0] * GRID[1], -1)


def latent_patches(latents: Float[Array, "b h w c"]) -> Float[Array, "b p d"]:
    """Latents by image token: what each token's part of the picture is encoded as."""
    (b, _, _, c), k = latents.shape, configs.PATCH
    x = latents.reshape(b, GRID[0], k, GRID[1], k, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, GRID[0] * GRID[1], k * k * c)


def at_image(features: Float[Array, "b n c"], ids: Int[Array, "b n"]) -> Float[Array, "b p c"]:
    """Features of the image tokens, which stand together."""
    first = jnp.argmax(ids == configs.IDS["<|image_pad|>"], axis=1)
    return jax.vmap(lambda f, i: jax.lax.dynamic_slice_in_dim(f, i, GRID[0] * GRID[1]))(
        features, first
    )


def start(size: Size, seed: int) -> Networks:
    """Networks with random weights, initialized so that they learn fast.

    The velocity is zero, the gates are half open, and the vision tower's positions are the waves
    that the transformer's own rotation turns its queries by: a query can then find the image token
    of its own place by a linear map.
    """
    networks = Networks(size, rngs=nnx.Rngs(seed))
    transformer, vision = networks.transformer, networks.vision
    for blocks in (transformer.noise_refiner, transformer.layers):
        d = size.dim
        bias = blocks.modulation.bias[...]
        gates = jnp.zeros_like(bias).at[:, d : 2 * d].set(GATE).at[:, 3 * d :].set(GATE)
        blocks.modulation.bias[...] = gates
        blocks.modulation.kernel[...] = 0.2 * blocks.modulation.kernel[...]
    transformer.final_linear.kernel[...] = jnp.zeros_like(transformer.final_linear.kernel[...])
    networks.text.embedding[...] = 50.0 * networks.text.embedding[...]
    waves = places(size)
    vision.position_table[...] = jnp.pad(waves, ((0, 0), (0, size.vision_dim - waves.shape[1])))
    return networks


def places(size: Size) -> Float[np.ndarray, "p c"]:
    """What the rotation of the transformer turns a query at each image token's place by."""
    row, column = np.divmod(np.arange(GRID[0] * GRID[1]), GRID[1])
    theta = configs.transformer(size)["rope_theta"]
    columns = []
    for axis, position in ((size.axes[1], row), (size.axes[2], column)):
        for frequency in theta ** (-np.arange(0, axis, 2) / axis):
            columns += [np.cos(frequency * position), np.sin(frequency * position)]
    return np.stack(columns, 1).astype(np.float32)
