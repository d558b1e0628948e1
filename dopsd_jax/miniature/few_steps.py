"""What both stages of distillation share: the deployed grid, guidance, and whole paths.

Dimension names: b batch, h w c of a latent, n nodes of a grid.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dopsd_jax.common.flow import shifted_grid
from dopsd_jax.miniature import networks, pool

STEPS, SHIFT = 8, 3.0  # of the deployed sampler
GRID = shifted_grid(STEPS, SHIFT)
GUIDANCE = 2.0  # of the many-step model; what is distilled has it built in

Velocity = Callable[[Float[Array, "b h w c"], Float[Array, " b"]], Float[Array, "b h w c"]]


def told(net: networks.Networks, batch: pool.Batch, keys: Key[Array, " b"]) -> Velocity:
    """The velocity (x, sigma) with the batch's contexts; `keys` draw the image tokens left out."""
    _, (features, lengths) = networks.contexts(net, batch, keys)
    caption = net.transformer.refine(features, lengths)
    return lambda x, sigma: -net.transformer(x, 1.0 - sigma, caption, lengths)


def guided(net: networks.Networks, batch: pool.Batch, keys: Key[Array, " b"]) -> Velocity:
    """The same, with guidance away from what `batch` names."""
    away = net.context(batch.away_ids, batch.away_lengths)
    away, lengths = net.transformer.refine(away, batch.away_lengths), batch.away_lengths
    full = told(net, batch, keys)

    def velocity(x, sigma):
        less = -net.transformer(x, 1.0 - sigma, away, lengths)
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


def normal(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b h w c"]:
    """Noise of its own for each sample."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def wide(values: Float[Array, " b"]) -> Float[Array, "b 1 1 1"]:
    """Against latents."""
    return values[:, None, None, None]
