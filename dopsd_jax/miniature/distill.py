"""Segment distillation: one step of the student goes where the guided teacher's flow goes.

At a node of the deployed grid the student's velocity is pulled to the mean velocity of the frozen
teacher, with guidance, on the way to the next node.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dopsd_jax.common.flow import shifted_grid
from dopsd_jax.miniature import networks, optimizer, pool
from dopsd_jax.miniature.configs import Size
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.training import Loss

STEPS = 8  # of the deployed sampler
SHIFT = 3.0
GUIDANCE = 1.5  # more makes shapes no surer and colours glaring
MUON_RATE, ADAM_RATE = 0.005, 5e-4


def loss(size: Size, teacher: Parameters, empty: tuple[Array, Array]) -> Loss:
    """Squared distance of the student's velocity from the teacher's mean velocity.

    `empty`: token row [1, n] and length [1] of the empty prompt.
    """
    module = networks.abstract(size)
    grid = jnp.asarray(shifted_grid(STEPS, SHIFT), jnp.float32)

    def evaluate(parameters: Parameters, batch: pool.Batch, keys: Array):
        pick, draw = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        x0 = batch.latents.astype(jnp.float32)
        node = jax.vmap(lambda key: jax.random.randint(key, (), 0, STEPS))(pick)
        sigma, following = grid[node], grid[node + 1]
        noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(draw)
        x = _mix(x0, noise, sigma)
        target = jax.lax.stop_gradient(_mean_velocity(batch, x, sigma, following))
        net = optimizer.merge(module, parameters)
        found = net.velocity(x, sigma, _features(net, batch), batch.lengths)
        return jnp.mean((found - target) ** 2)

    def _mean_velocity(batch, x, sigma, following):
        net = optimizer.merge(module, teacher)
        captions = [
            (net.transformer.refine(_features(net, batch), batch.lengths), batch.lengths),
            (net.transformer.refine(*_rows(net, len(x))), jnp.repeat(empty[1], len(x))),
        ]

        def velocity(x, sigma):
            full, none = (-net.transformer(x, 1.0 - sigma, *c) for c in captions)
            return none + GUIDANCE * (full - none)

        middle = 0.5 * (sigma + following)
        halfway = x + _wide(middle - sigma) * velocity(x, sigma)
        return velocity(halfway, middle)

    def _rows(net, count):
        features = net.context(*empty)
        return jnp.repeat(features, count, 0), jnp.repeat(empty[1], count)

    def _features(net, batch):
        patches = None if batch.images is None else networks.patches_of(batch.images)
        return net.context(batch.ids, batch.lengths, patches)

    return evaluate


def _wide(values: Array) -> Array:
    return values[:, None, None, None]


def _mix(clean: Array, noise: Array, sigma: Array) -> Array:
    return (1 - _wide(sigma)) * clean + _wide(sigma) * noise
