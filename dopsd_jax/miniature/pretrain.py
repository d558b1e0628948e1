"""Flow matching of text encoder, vision tower and transformer together.

One language model serves captions alone and captions with an image. Dimension names: b batch,
h w c latent.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dopsd_jax.miniature import networks, optimizer, pool
from dopsd_jax.miniature.configs import Size
from dopsd_jax.miniature.training import Loss

MUON_RATE, ADAM_RATE = 0.015, 2e-3
SHIFT = 3.0  # of the noise levels, as in the scheduler


def draw(keys: Array, latents: Float[Array, "b h w c"]):
    """Noise levels, noised states, and the velocities there; a key for each sample."""
    level, noise = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    u = jax.vmap(jax.random.uniform)(level)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(noise)
    s = sigma[:, None, None, None]
    return sigma, (1 - s) * latents + s * noise, noise - latents


def loss(size: Size) -> Loss:
    """Mean squared error of the velocity."""
    module = networks.abstract(size)

    def evaluate(parameters: optimizer.Parameters, batch: pool.Batch, keys: Array):
        net = optimizer.merge(module, parameters)
        sigma, x, velocity = draw(keys, batch.latents.astype(jnp.float32))
        patches = None if batch.images is None else networks.patches_of(batch.images)
        features = net.context(batch.ids, batch.lengths, patches)
        return jnp.mean((net.velocity(x, sigma, features, batch.lengths) - velocity) ** 2)

    return evaluate
