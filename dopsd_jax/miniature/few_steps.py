"""What both stages of distillation share: guidance, and whole paths.

Dimension names: b batch, h w c of a latent, n nodes of a grid.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dopsd_jax.common.flow import shifted_grid
from dopsd_jax.miniature.families import Batch, Networks

SHIFT = 3.0  # of the many-step model's noise levels
GUIDANCE = 2.0  # of the many-step model; what is distilled has it built in

Velocity = Callable[[Float[Array, "b h w c"], Float[Array, " b"]], Float[Array, "b h w c"]]


def many(steps: int) -> tuple[float, ...]:
    """The many-step model's noise levels."""
    return shifted_grid(steps, SHIFT)


def told(net: Networks, batch: Batch, keys: Key[Array, " b"]) -> Velocity:
    """The velocity (x, sigma) with the batch's contexts; `keys` draw the image tokens left out."""
    context = net.context(batch.told, keys)
    return lambda x, sigma: net.velocity(x, sigma, context)


def guided(net: Networks, batch: Batch, keys: Key[Array, " b"]) -> Velocity:
    """The same, with guidance away from what `batch` names."""
    away = net.context(batch.away)
    full = told(net, batch, keys)

    def velocity(x, sigma):
        less = net.velocity(x, sigma, away)
        return less + GUIDANCE * (full(x, sigma) - less)

    return velocity


def path(
    velocity: Velocity, noise: Float[Array, "b h w c"], grid: tuple[float, ...]
) -> Float[Array, "n b h w c"]:
    """The states of Euler's method at every node of a grid, the noise first."""
    nodes = jnp.asarray(grid, jnp.float32)

    def step(x, pair):
        sigma, following = pair
        x = x + (following - sigma) * velocity(x, jnp.full(len(x), sigma))
        return x, x

    _, later = jax.lax.scan(step, noise, (nodes[:-1], nodes[1:]))
    return jnp.concatenate([noise[None], later])


def rollout(
    velocity: Velocity, noise: Float[Array, "b h w c"], grid: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """The last state alone."""
    nodes = jnp.asarray(grid, jnp.float32)

    def step(x, pair):
        sigma, following = pair
        return x + (following - sigma) * velocity(x, jnp.full(len(x), sigma)), None

    return jax.lax.scan(step, noise, (nodes[:-1], nodes[1:]))[0]


def normal(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b h w c"]:
    """Noise of its own for each sample."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def wide(values: Float[Array, " b"]) -> Float[Array, "b 1 1 1"]:
    """Against latents."""
    return values[:, None, None, None]
