"""The flow convention and its grids: sigma in [0, 1], 1 is noise; x = (1 - sigma) x0 + sigma noise.

The velocity is dx/dsigma = noise - x0. Nothing outside a model family uses another sign or time.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from dopsd_jax.common.config_fields import shown
from dopsd_jax.common.errors import UserError


def shifted_grid(steps: int, shift: float) -> tuple[float, ...]:
    """`steps` + 1 nodes from 1 to 0: 1, ..., 1/steps under sigma' = s sigma / (1 + (s - 1) sigma).

    A static shift, as Z-Image's published scheduler has it.

    Examples:
      >>> shifted_grid(2, shift=3.0)
      (1.0, 0.75, 0.0)
    """
    sigma = np.linspace(1.0, 1.0 / steps, steps)
    return (*(shift * sigma / (1 + (shift - 1) * sigma)).tolist(), 0.0)


def check_grid(nodes: Sequence[float], field: str) -> tuple[float, ...]:
    """An explicit grid with its end, 0, added if absent. Raises `UserError` unless it falls.

    Examples:
      >>> check_grid([1, 0.5], "config.grid")
      (1.0, 0.5, 0.0)
    """
    nodes = tuple(float(n) for n in nodes)
    if nodes and nodes[-1] != 0.0:
        nodes = (*nodes, 0.0)
    falls = all(a > b for a, b in itertools.pairwise(nodes))
    if len(nodes) < 2 or not falls or nodes[0] != 1.0:  # a rollout begins with noise alone
        raise UserError(
            f"{field}: {shown(nodes)} is not a grid; give noise levels that fall from 1 towards 0, "
            "for example 1,0.9,0.75,0.5"
        )
    return nodes


def euler(x: Float[Array, "..."], velocity: Float[Array, "..."], sigma, sigma_next):
    """The state at `sigma_next`, one step along the velocity."""
    return x + (sigma_next - sigma) * velocity


def x0_hat(x: Float[Array, "..."], velocity: Float[Array, "..."], sigma):
    """The clean estimate at a state.

    Examples:
      >>> x0, noise, sigma = np.array([2.0]), np.array([-1.0]), 0.25
      >>> x = (1 - sigma) * x0 + sigma * noise
      >>> x0_hat(x, noise - x0, sigma).tolist()
      [2.0]
    """
    return x - sigma * velocity
