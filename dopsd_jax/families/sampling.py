"""The transformer's own programs: one forward, and the few-step rollout from noise to latents."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dopsd_jax import dopsd
from dopsd_jax.common.errors import UserError
from dopsd_jax.families.base import Family, Tree
from dopsd_jax.parallel import multihost, sharding


def merged(
    graphdef: nnx.GraphDef, trainable: nnx.State, base: nnx.State, stacks: Sequence[str]
) -> nnx.Module:
    """The network, with what lies in the host's memory copied to the device.

    `stacks`: parameters with a leading layer axis: the scan over their layers copies these.
    """
    flat = [
        (path, leaf if path[0] in stacks else sharding.to_device(leaf))
        for path, leaf in nnx.to_flat_state(trainable)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat), base)


def start_noise(
    seed: int, count: int, shape: tuple[int, ...], first: int = 0
) -> Float[Array, "b h w c"]:
    """Unit Gaussian start noise of images `first` and on; image i depends on (seed, i) only."""
    return _start_noise(jax.random.key(seed), first, count=count, shape=shape)


def finite(
    latents: Float[Array | np.ndarray, "b h w c"], strength: float = 1.0
) -> Float[Array | np.ndarray, "b h w c"]:
    """The drawn latents. Raises `UserError` if a number is not finite: the picture would be black.

    strength: that of the adapters.
    """
    if not np.isfinite(np.asarray(latents)).all():
        raise UserError(
            f"the drawn picture is not made of finite numbers (strength {strength:g} of LoRA "
            "files, if there are any); lower it, or look at the model: convert inspect --verify"
        )
    return latents


@functools.partial(jax.jit, static_argnames=("count", "shape"))
def _start_noise(key, first, *, count, shape):
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
    return jax.vmap(draw)(first + jnp.arange(count))


@functools.partial(jax.jit, static_argnums=(0, 1))
def velocity(family: Family, graphdef, trained, base, x, sigma, context: Tree):
    """dx/dsigma at a state [b, h, w, c], by a transformer in its parts."""
    net = family.denoiser(graphdef)
    return net.velocity(trained, base, x, sigma, context, net.precompute(trained, base, context))


@multihost.begin_together
@functools.partial(jax.jit, static_argnames=("family", "graphdef", "grid"))
def sample(trained, base, noise, context: Tree, *, family: Family, graphdef, grid):
    """Clean latents [b, h, w, c] of start noise: one rollout along the grid."""
    # A loop over the layers is soon compiled; only a backward pass is faster without.
    network = nnx.merge(graphdef, trained, base)
    network.remat = "none"
    net = family.denoiser(nnx.graphdef(network))
    return dopsd.rollout(net, trained, base, context, noise, grid)
