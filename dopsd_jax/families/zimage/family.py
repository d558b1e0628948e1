"""Z-Image-Turbo: its sign and time, its grids, its contexts, its adapter targets."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.flow import check_grid, shifted_grid
from dopsd_jax.data.padding import pad_stack
from dopsd_jax.dopsd import Denoiser
from dopsd_jax.models.zimage import PAD_MULTIPLE, STACKS
from dopsd_jax.parallel.sharding import to_device

NAME = "zimage"
DEPLOYED_STEPS = 8  # forwards of the released few-step sampler (models.md 2.8)

# The seven linear layers of every block are upstream's own targets (d-opsd.md 6): 238 modules.
_ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
_FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
LORA_PRESETS = {
    "blocks": (*_ATTENTION, *_FEED_FORWARD),
    "attention": _ATTENTION,
    "main": tuple(f"layers.*.{t}" for t in (*_ATTENTION, *_FEED_FORWARD)),  # without the refiners
    "before_pr5": (*_ATTENTION, "feed_forward.w3"),  # what a missing comma left until 2026-05-12
}

# Upstream's 8-step list: shift 6 instead of Turbo's 3 (d-opsd.md 4). For comparison only.
_LEGACY8 = (1000, 976.8991, 947.7647, 909.8782, 858.5987, 785.2998, 671.9212, 473.2203)


class Context(NamedTuple):
    """Caption features with their true lengths; the rows behind a length are never read."""

    features: Float[Array, "b l c"]
    lengths: Int[Array, " b"]


def grid(name: str | Sequence[float], shift: float) -> tuple[float, ...]:
    """The sigma nodes that config.grid names, with the final 0.

    `nodes8`: the deployed sampler's; `nodes4`: every second of these, the released recipe's;
    `legacy8`: upstream's 8-step list; or a list of sigmas.
    """
    if not isinstance(name, str):
        return check_grid(name, "config.grid")
    grids = {
        "nodes8": shifted_grid(8, shift),
        "nodes4": shifted_grid(4, shift),
        "legacy8": (*(s / 1000 for s in _LEGACY8), 0.0),
    }
    if name not in grids:
        raise UserError(
            f"config.grid: {name!r} is not one of {', '.join(grids)} or a list of sigmas"
        )
    return grids[name]


def denoiser(graphdef: nnx.GraphDef) -> Denoiser:
    """The transformer in the project's convention: it is told 1 - sigma and answers x0 - noise."""

    def network(trainable, base):
        # What lies in the host's memory: stacks are left to the scan over their layers.
        flat = [
            (path, leaf if path[0] in STACKS else to_device(leaf))
            for path, leaf in nnx.to_flat_state(trainable)
        ]
        return nnx.merge(graphdef, nnx.from_flat_state(flat), base)

    def hoist(trainable, base, context: Context):
        return network(trainable, base).refine(*context)

    def velocity(trainable, base, x, sigma, context: Context, refined):
        t = jnp.broadcast_to(1.0 - sigma, (len(x),))
        return -network(trainable, base)(x, t, refined, context.lengths)

    return Denoiser(hoist, velocity)


def pad_features(features: Sequence[np.ndarray], rows: int | None = None) -> Context:
    """Caption features [n_i, c] of a batch as one context of `rows` rows, or as few as it needs."""
    rows = rows or -(-max(map(len, features)) // PAD_MULTIPLE) * PAD_MULTIPLE
    return Context(*pad_stack(features, rows))
