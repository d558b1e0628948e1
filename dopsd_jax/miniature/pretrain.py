"""Flow matching of encoders and transformer together.

Linear heads, which are not kept, speed up the learning: one predicts from the transformer's image
tokens their positions, because its rotary embedding shows only relative ones; a family may have
one of its own.
Dimension names: b batch, h w c latent, p image tokens, d width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dopsd_jax.miniature import optimizer
from dopsd_jax.miniature.families import Batch, Family
from dopsd_jax.miniature.few_steps import SHIFT
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.reading import unread
from dopsd_jax.miniature.training import Loss, Stage

MUON_RATE, ADAM_RATE, DECAY, COOLDOWN = 0.01, 1.5e-3, 0.1, 0.6
TEXTS, IMAGES = 16, 32
LOW = 0.5  # noise level
READING = 0.5  # weight of what a head cannot read
WHERE = "where.kernel"


def start(family: Family, seed: int) -> Parameters:
    """The networks' first parameters and the heads'."""
    _, parameters = optimizer.flat(family.start(seed))
    return parameters | family.heads()


def stage(family: Family, start: Parameters, steps: int) -> Stage:
    """Flow matching from `start`, which has the heads."""
    tx = optimizer.muon(MUON_RATE, ADAM_RATE, steps, cooldown=COOLDOWN, decay=DECAY)
    shown = lambda parameters: without_heads(family, parameters)
    return Stage("flow matching", steps, loss(family), tx, start, TEXTS, IMAGES, shown)


def without_heads(family: Family, parameters: Parameters) -> Parameters:
    """The networks' parameters alone."""
    heads = family.heads().keys()
    return {name: value for name, value in parameters.items() if name not in heads}


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


def loss(family: Family) -> Loss:
    """Error of the velocity, and of what the heads read."""
    module = family.abstract()
    places = family.places()

    def evaluate(parameters: Parameters, batch: Batch, keys: Array):
        net = optimizer.merge(module, parameters)
        level, drop = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        sigma, x, velocity = draw(level, batch.latents.astype(jnp.float32), batch.noise)
        context = net.context(batch.told, drop)
        found, states = net.velocity_and_states(x, sigma, context)
        where = [unread(parameters[WHERE], tokens, places) for tokens in states]
        error = _mismatch(found, velocity, sigma) + READING * sum(where) / len(where)
        own = family.unread(parameters, context, batch.told)
        return error if own is None else error + READING * own

    return evaluate
