"""Flow matching of text encoder, vision tower and transformer together.

Two linear heads, which are not kept, speed up the learning: one predicts from the language model's
features what each part of a shown image is and where; one predicts from the transformer's image
tokens their positions, because its rotary embedding shows only relative ones.
Dimension names: b batch, h w c latent, p image tokens, d width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dopsd_jax.miniature import configs, networks, optimizer, pool
from dopsd_jax.miniature.configs import Size
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.training import Loss, Stage

MUON_RATE, ADAM_RATE, DECAY, COOLDOWN = 0.01, 1.5e-3, 0.1, 0.6
TEXTS, IMAGES = 16, 32
SHIFT = 3.0  # of the noise levels, as in the scheduler
LOW = 0.5  # noise level
READING = 0.5  # weight of what a head cannot read
SHOWN, WHERE = HEADS = "shown.kernel", "where.kernel"


def start(size: Size, seed: int) -> Parameters:
    """The networks' first parameters and the heads'."""
    _, parameters = optimizer.flat(networks.start(size, seed))
    patch, place = configs.PATCH**2 * configs.LATENT_CHANNELS, networks.places(size).shape[1]
    heads = jnp.zeros((size.text_dim, patch + place)), jnp.zeros((size.dim, place))
    return parameters | dict(zip(HEADS, heads, strict=True))


def stage(size: Size, start: Parameters, steps: int) -> Stage:
    """Flow matching from `start`, which has the heads."""
    tx = optimizer.muon(MUON_RATE, ADAM_RATE, steps, cooldown=COOLDOWN, decay=DECAY)
    return Stage("flow matching", steps, loss(size), tx, start, TEXTS, IMAGES, without_heads)


def without_heads(parameters: Parameters) -> Parameters:
    """The networks' parameters alone."""
    return {name: value for name, value in parameters.items() if name not in HEADS}


def draw(keys: Array, latents: Float[Array, "b h w c"], noise: Float[Array, "b h w c"]):
    """Noise levels, noised states, and the velocities there; a key for each sample.

    The levels are spread evenly over the batch.
    """
    u = (jnp.arange(len(keys)) + jax.vmap(jax.random.uniform)(keys)) / len(keys)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    s = sigma[:, None, None, None]
    return sigma, (1 - s) * latents + s * noise, noise - latents


def _mismatch(found, velocity, sigma: Float[Array, " b"]) -> Array:
    """Mean squared error of velocities.

    Below `LOW` the weight falls as for an error of the clean latents: the errors there are finer
    than a decoder shows, and their noise would dominate the rest.
    """
    weight = jnp.minimum(1.0, sigma / LOW) ** 2
    return jnp.mean(weight * jnp.mean((found - velocity) ** 2, axis=(1, 2, 3)))


def loss(size: Size) -> Loss:
    """Error of the velocity, and of what the heads read."""
    module = networks.abstract(size)
    places = networks.places(size)

    def evaluate(parameters: Parameters, batch: pool.Batch, keys: Array):
        net = optimizer.merge(module, parameters)
        level, drop = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        sigma, x, velocity = draw(level, batch.latents.astype(jnp.float32), batch.noise)
        features, told = networks.contexts(net, batch, drop)
        found, states = net.velocity_and_states(x, sigma, *told)
        where = [_unread(parameters[WHERE], tokens, places) for tokens in states]
        error = _mismatch(found, velocity, sigma) + READING * sum(where) / len(where)
        if batch.images is None:
            return error
        shown = networks.latent_patches(batch.shown.astype(jnp.float32))
        shown = jnp.concatenate([shown, jnp.broadcast_to(places, (len(x), *places.shape))], -1)
        seen = networks.at_image(features, batch.ids)
        return error + READING * _unread(parameters[SHOWN], seen, shown)

    return evaluate


def _unread(head: Float[Array, "d r"], tokens: Float[Array, "b p d"], truth) -> Array:
    """Mean squared error of what a head reads from tokens of whatever size."""
    tokens = tokens * jax.lax.rsqrt(jnp.mean(tokens**2, -1, keepdims=True) + 1e-6)
    return jnp.mean((tokens @ head - truth) ** 2)
