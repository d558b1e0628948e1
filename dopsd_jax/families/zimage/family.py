"""Z-Image-Turbo as a `Family`: see `families.base`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dopsd_jax.common.config_fields import shown
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.flow import check_grid, shifted_grid
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.data.padding import pad_stack
from dopsd_jax.dopsd import Denoiser
from dopsd_jax.families.base import STUDENT, TEACHER, Features, PaddedLengths
from dopsd_jax.families.sampling import merged
from dopsd_jax.families.texts import QWEN3_4B
from dopsd_jax.families.zimage.flops import context_work, image_tokens, velocity_work
from dopsd_jax.families.zimage.networks import NETWORKS
from dopsd_jax.families.zimage.options import CONTEXTS, EDITING
from dopsd_jax.families.zimage.pipeline import TOKENS
from dopsd_jax.families.zimage.pipeline import ZImagePipeline as Pipeline
from dopsd_jax.models.zimage import STACKS, ZImage
from dopsd_jax.models.zimage_config import PAD_MULTIPLE, ZImageConfig
from dopsd_jax.random_model import configs as random_configs
from dopsd_jax.random_model import write_random_model

__all__ = [
    "CONTEXTS",
    "EDITING",
    "NETWORKS",
    "Pipeline",
    "context_work",
    "image_tokens",
    "velocity_work",
    "write_random_model",
]

NAME = "zimage"
PUBLISHED = {"Z-Image-Turbo": ZImageConfig()}
TEXT_ENCODERS = {"Z-Image-Turbo": QWEN3_4B}
SCHEDULER = 3.0  # the static shift of the published one
LATENT_FACTOR = 8
DEPLOYED_STEPS = 8
ROWS = (TOKENS[STUDENT], TOKENS[TEACHER])

# The seven linear layers of every block are upstream's own targets: 238 modules.
_ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
_FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
LORA_PRESETS = {
    "blocks": (*_ATTENTION, *_FEED_FORWARD),
    "attention": _ATTENTION,
    "main": tuple(f"layers.*.{t}" for t in (*_ATTENTION, *_FEED_FORWARD)),  # without the refiners
    "before_pr5": (*_ATTENTION, "feed_forward.w3"),  # what a missing comma left until 2026-05-12
}

# Upstream's 8-step list: shift 6 instead of Turbo's 3. For comparison only.
_LEGACY8 = (1000, 976.8991, 947.7647, 909.8782, 858.5987, 785.2998, 671.9212, 473.2203)


class Context(NamedTuple):
    """Caption features with their true lengths; the rows behind a length are never read.

    picture: where the tokens of the teacher's picture stand: the first row, and how many.
    """

    features: Float[Array, "b l c"]
    lengths: Int[Array, " b"]
    picture: Int[Array, "b 2"] | None = None


def read_scheduler(content: Any, where: str) -> float:
    """The static shift. Raises `UserError` for a scheduler of another kind."""
    fields = Fields(content, where)
    fields.only("_class_name", "FlowMatchEulerDiscreteScheduler", required=True)
    fields.only("use_dynamic_shifting", False, None)
    shift = fields.positive("shift")
    fields.finish()
    return shift


def grid(
    name: str | Sequence[float], scheduler: float, height: int = 0, width: int = 0
) -> tuple[float, ...]:
    """The sigma nodes that config.grid names, with the final 0: the same for all sizes.

    `nodes8`: the deployed sampler's; `nodes4`: every second of these, the released recipe's;
    `legacy8`: upstream's 8-step list; or a list of sigmas.
    """
    if not isinstance(name, str):
        return check_grid(name, "config.grid")
    grids = {
        "nodes8": shifted_grid(8, scheduler),
        "nodes4": shifted_grid(4, scheduler),
        "legacy8": (*(s / 1000 for s in _LEGACY8), 0.0),
    }
    if name not in grids:
        raise UserError(
            f"config.grid: {shown(name)} is not one of {', '.join(grids)} or a list of sigmas"
        )
    return grids[name]


def deployed_grid(steps: int, scheduler: float, height: int, width: int) -> tuple[float, ...]:
    """The nodes of the released sampler."""
    return shifted_grid(steps, scheduler)


def shift(scheduler: float, height: int, width: int) -> float:
    """The scheduler's own, for all sizes."""
    return scheduler


def build(size: ZImageConfig, *, dtype: Any, attention: str, remat: str, rngs: nnx.Rngs) -> ZImage:
    """The transformer, to be filled with weights."""
    return ZImage(size, dtype=dtype, attention=attention, remat=remat, rngs=rngs)


def denoiser(graphdef: nnx.GraphDef) -> Denoiser:
    """The transformer in the project's convention; its own is 1 - sigma in, x0 - noise out."""
    network = lambda trainable, base: merged(graphdef, trainable, base, STACKS)

    def precompute(trainable, base, context: Context):
        return network(trainable, base).refine(context.features, context.lengths)

    def velocity(trainable, base, x, sigma, context: Context, refined):
        t = jnp.broadcast_to(1.0 - sigma, (len(x),))
        return -network(trainable, base)(x, t, refined, context.lengths)

    return Denoiser(precompute, velocity, drop_picture)


def drop_picture(context: Context, keys: Key[Array, " b"], share: float) -> Context:
    """See `Denoiser`. What is left moves together, as if the others had never been there."""
    if context.picture is None:
        raise UserError(
            "config.teacher.vision_dropout: the prepared features do not say which of them are the "
            "picture's; prepare the data set again, or set it to 0"
        )
    rows, (first, count) = context.features.shape[1], context.picture.T[..., None]
    row = jnp.arange(rows)
    seen = (row >= first) & (row < first + count)
    chance = jax.vmap(lambda key: jax.random.uniform(key, (rows,)))(keys)
    rank = jnp.argsort(jnp.argsort(jnp.where(seen, chance, 1.0), axis=1), axis=1)
    left = jnp.maximum(1, jnp.round(count * (1 - share)))
    dropped = rank < count - left
    order = jnp.argsort(dropped, axis=1, stable=True)
    features = jnp.take_along_axis(context.features, order[..., None], axis=1)
    gone = jnp.sum(dropped, axis=1, dtype=context.lengths.dtype)
    return Context(features, context.lengths - gone)


def largest_latent(size: ZImageConfig) -> tuple[int, int]:
    """As far as the rotary tables go."""
    return size.axes_lens[1] * size.patch, size.axes_lens[2] * size.patch


def collate(features: Sequence[Features], rows: PaddedLengths | None = None) -> Context:
    """Caption features [n_i, c] of a batch as one context, padded."""
    arrays = [one["features"] for one in features]
    fewest = -(-max(map(len, arrays)) // PAD_MULTIPLE) * PAD_MULTIPLE
    places = [one["picture"] for one in features if "picture" in one]
    picture = np.stack(places) if len(places) == len(features) else None
    return Context(*pad_stack(arrays, rows["features"] if rows else fewest), picture)


def abstract_features(
    size: ZImageConfig,
    role: int,
    rows: int,
    dtype: Any,
    height: int,
    width: int,
    references: int = 0,
) -> Context:
    """One sample's context in shapes; the teacher's says where the picture's tokens stand."""
    if rows % PAD_MULTIPLE or not 0 < rows <= size.max_caption:
        raise UserError(
            f"{rows} must be a multiple of {PAD_MULTIPLE}, from {PAD_MULTIPLE} to "
            f"{size.max_caption}"
        )
    features = jax.ShapeDtypeStruct((rows, size.caption_dim), dtype)
    picture = jax.ShapeDtypeStruct((2,), jnp.int32) if role == TEACHER else None
    return Context(features, jax.ShapeDtypeStruct((), jnp.int32), picture)


def positions(context: Context) -> int:
    """Rows of the padded features."""
    return context.features.shape[-2]


def random_size() -> ZImageConfig:
    """The transformer of the random model."""
    sizes = random_configs.transformer(random_configs.Size())
    return ZImageConfig.from_dict(sizes, "random model")
