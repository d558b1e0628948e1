"""FLUX.2-klein as a `Family`: see `families.base`."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dopsd_jax.common.config_fields import shown
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.flow import check_grid
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.dopsd import Denoiser
from dopsd_jax.families.base import TEACHER, Features, PaddedLengths
from dopsd_jax.families.flux2_klein.flops import context_work, image_tokens, velocity_work
from dopsd_jax.families.flux2_klein.networks import NETWORKS
from dopsd_jax.families.flux2_klein.options import CONTEXTS, EDITING
from dopsd_jax.families.flux2_klein.pipeline import KleinPipeline as Pipeline
from dopsd_jax.families.flux2_klein.random import random_size, write_random_model
from dopsd_jax.families.flux2_klein.references import REFERENCE
from dopsd_jax.families.sampling import merged
from dopsd_jax.families.texts import QWEN3_4B, QWEN3_8B
from dopsd_jax.models.flux2 import STACKS, Flux2
from dopsd_jax.models.flux2_config import TEXT_ROWS, Flux2Config

__all__ = [
    "CONTEXTS",
    "EDITING",
    "NETWORKS",
    "Pipeline",
    "context_work",
    "image_tokens",
    "random_size",
    "velocity_work",
    "write_random_model",
]

NAME = "flux2_klein"
PUBLISHED = {
    "4B": Flux2Config(),
    "9B": Flux2Config(heads=32, double_layers=8, single_layers=24, text_dim=12288),
}
TEXT_ENCODERS = {"4B": QWEN3_4B, "9B": QWEN3_8B}
SCHEDULER = None
LATENT_FACTOR = 16
DEPLOYED_STEPS = 4
ROWS = (TEXT_ROWS, TEXT_ROWS)
LARGEST_LATENT = 128  # cells a side: 2048 pixels
LEAST_SIGMA = 0.001  # where the scheduler's own levels end before they are shifted

_JOINT = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
_FEED_FORWARD = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
_SINGLE = ("attn.to_qkv_mlp_proj", "attn.to_out")
LORA_PRESETS = {
    "blocks": (*_JOINT, *_FEED_FORWARD, *_SINGLE),
    "double": (*_JOINT, *_FEED_FORWARD),
    "single": _SINGLE,
    "klein_upstream": _JOINT,  # all that the released code's patterns match
}


class Context(NamedTuple):
    """Text features, all rows seen, and clean latents of reference pictures.

    kept: the cells of the last reference that are seen, in their order; None: all.
    """

    text: Float[Array, "b l t"]
    references: tuple[Float[Array, "b _h _w c"], ...] = ()
    kept: Int[Array, "b k"] | None = None


# ---- The sampler.


def read_scheduler(content: Any, where: str) -> None:
    """Checks that it is klein's. Raises `UserError` for a scheduler of another kind."""
    fields = Fields(content, where)
    fields.only("_class_name", "FlowMatchEulerDiscreteScheduler", required=True)
    fields.only("use_dynamic_shifting", True, required=True)
    fields.only("time_shift_type", "exponential", None)
    fields.only("shift_terminal", None)
    fields.finish()


def empirical_mu(tokens: int, steps: int) -> float:
    """The logarithm of the shift for a number of image tokens and of forwards (FLUX.2's fit)."""
    many = 0.00016927 * tokens + 0.45666666  # for 200 forwards
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333  # for 10
    return many + (many - few) / 190 * (steps - 200)


def _shifted(sigma: np.ndarray, height: int, width: int) -> tuple[float, ...]:
    s = math.exp(empirical_mu(height * width, len(sigma)))
    return (*(s * sigma / (1 + (s - 1) * sigma)).tolist(), 0.0)


def deployed_grid(steps: int, scheduler: Any, height: int, width: int) -> tuple[float, ...]:
    """The nodes of the released sampler."""
    return _shifted(np.linspace(1.0, 1.0 / steps, steps), height, width)


def grid(name: str | Sequence[float], scheduler: Any, height: int, width: int) -> tuple[float, ...]:
    """The sigma nodes that config.grid names, with the final 0, for a latent [height, width].

    `nodes4`: the deployed sampler's; `upstream4`: those of the released training code, which are
    not the sampler's and end near 0; or a list of sigmas.
    """
    if not isinstance(name, str):
        return check_grid(name, "config.grid")
    levels = {
        "nodes4": np.linspace(1.0, 1.0 / 4, 4),
        "upstream4": np.linspace(1.0, LEAST_SIGMA, 4),
    }
    if name not in levels:
        raise UserError(
            f"config.grid: {shown(name)} is not one of {', '.join(levels)} or a list of sigmas"
        )
    return _shifted(levels[name], height, width)


def shift(scheduler: Any, height: int, width: int) -> float:
    """The deployed sampler's for this size."""
    return math.exp(empirical_mu(height * width, DEPLOYED_STEPS))


# ---- The network.


def build(size: Flux2Config, *, dtype: Any, attention: str, remat: str, rngs: nnx.Rngs) -> Flux2:
    """The transformer, to be filled with weights."""
    return Flux2(size, dtype=dtype, attention=attention, remat=remat, rngs=rngs)


def told_time(sigma: Array, dtype: Any) -> Array:
    """The noise level as the published pipeline tells it to a network of this type, in float32.

    In bfloat16 it rounds 1000 sigma, and again where it divides and multiplies by 1000: at
    1024 x 1024 pixels 968, 908 and 768 for 967.4, 908.1 and 767.2. The solver's sigma stays exact.
    """
    if dtype != jnp.bfloat16:
        return sigma
    # Not `astype`, there and back: the compiler may leave that out.
    rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    return rounded(1000 * rounded(rounded(1000 * sigma) / 1000)) / 1000


def denoiser(graphdef: nnx.GraphDef) -> Denoiser:
    """The transformer in the project's convention, which is its own."""
    network = lambda trainable, base: merged(graphdef, trainable, base, STACKS)

    def precompute(trainable, base, context: Context):
        return network(trainable, base).embed(*context)

    def velocity(trainable, base, x, sigma, context: Context, embedded):
        net = network(trainable, base)
        sizes = [latent.shape[1:3] for latent in context.references]
        sigma = jnp.broadcast_to(told_time(sigma, net.dtype), (len(x),))
        return net(x, sigma, *embedded, sizes, context.kept)

    return Denoiser(precompute, velocity, drop_picture)


def drop_picture(context: Context, keys: Key[Array, " b"], share: float) -> Context:
    """See `Denoiser`. Its own picture is the last reference, whose cells keep their places."""
    cells = math.prod(context.references[-1].shape[1:3])
    count = max(1, round(cells * (1 - share)))
    drawn = jax.vmap(lambda key: jax.random.permutation(key, cells)[:count])(keys)
    return context._replace(kept=jnp.sort(drawn, axis=1))


def largest_latent(size: Flux2Config) -> tuple[int, int]:
    """Positions are not bounded; this is far above what the model was made for."""
    return LARGEST_LATENT, LARGEST_LATENT


# ---- Contexts.


def collate(features: Sequence[Features], rows: PaddedLengths | None = None) -> Context:
    """Features of a batch as one context: all have as many references, the k-th of one size."""
    stacked = lambda name: np.stack([one[name] for one in features])
    names = (name for name in features[0] if name.startswith(REFERENCE))
    references = sorted(names, key=lambda name: int(name.removeprefix(REFERENCE)))
    return Context(stacked("text"), tuple(map(stacked, references)))


def abstract_features(
    size: Flux2Config,
    role: int,
    rows: int,
    dtype: Any,
    height: int,
    width: int,
    references: int = 0,
) -> Context:
    """One sample's context in shapes: the teacher's has one more reference."""
    if rows not in (TEXT_ROWS, size.text_rows):
        raise UserError(f"{rows} must be {size.text_rows}, as all texts have")
    shape = jax.ShapeDtypeStruct
    text = shape((size.text_rows, size.text_dim), dtype)
    latent = shape((height, width, size.channels), jnp.float32)
    return Context(text, (latent,) * (references + (role == TEACHER)))


def positions(context: Context) -> int:
    """Rows of the text and of the references."""
    cells = (math.prod(latent.shape[-3:-1]) for latent in context.references)
    return context.text.shape[-2] + sum(cells)
