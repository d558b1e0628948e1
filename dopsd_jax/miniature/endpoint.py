"""Endpoint regression: at every node the student points at where the many-step model ends.

The velocity at a node becomes (x - end) / sigma on the guided many-step model's own path, so that
the first clean estimate is no longer a mean over pictures but nearly one of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dopsd_jax.miniature import few_steps, optimizer
from dopsd_jax.miniature.families import Batch, Family
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.training import Loss, Stage

MUON_RATE, ADAM_RATE = 0.002, 3e-4  # more makes it forget what the image in context shows
TEXTS, IMAGES = 16, 16
STEPS = 16  # of the many-step model, as many from node to node


def stage(family: Family, many: Parameters, steps: int) -> Stage:
    """Regression from the many-step model's weights."""
    tx = optimizer.muon(MUON_RATE, ADAM_RATE, steps, warmup=10)
    return Stage("endpoints", steps, loss(family, many), tx, many, TEXTS, IMAGES)


def loss(family: Family, many: Parameters) -> Loss:
    """Squared error of the clean estimates at all nodes; `many`: the many-step model's weights."""
    module, grid = family.abstract(), family.grid
    nodes = len(grid) - 1
    between = STEPS // nodes
    at = np.arange(nodes * between + 1) / between
    fine = tuple(np.interp(at, np.arange(nodes + 1), grid))

    def evaluate(parameters: Parameters, batch: Batch, keys: Array):
        drop, draw = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        noise = few_steps.normal(draw, batch.latents.shape[1:])
        teacher = few_steps.guided(optimizer.merge(module, many), batch, drop)
        states = jax.lax.stop_gradient(few_steps.path(teacher, noise, fine))
        visited, end = states[:-1:between], states[-1]
        student = few_steps.told(optimizer.merge(module, parameters), batch, drop)

        def error(total, node):
            x, sigma = node
            found = x - sigma * student(x, jnp.full(len(x), sigma))
            return total + jnp.mean((found - end) ** 2), None

        sigmas = jnp.asarray(grid[:-1], jnp.float32)
        return jax.lax.scan(error, jnp.zeros(()), (visited, sigmas))[0] / nodes

    return evaluate
