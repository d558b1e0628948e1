"""The distance of two velocities split into magnitude and direction: config.loss = decoupled.

A student that is unsure comes nearer to its teacher, in the mean square, by a smaller velocity, and
its pictures turn pale. Here the part of the distance that is about the direction has no gradient
along the student's velocity, so that only the other part can change its size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dopsd_jax.dopsd import Region, mean_over

_TINY = 1e-30  # below every norm; keeps the gradient of the norm of zeros finite


class Decoupled(NamedTuple):
    """A `dopsd.Distance`: the squared distance of velocities p and t, split exactly.

        |p - t|^2 = (|p| - |t|)^2 + 2 |p| |t| (1 - cos(p, t))

    The norms are those of a sample's whole latent, and |p| is not differentiated in the second
    term. magnitude: weight of the first term. mean: weight, in both, of the part of p and t that is
    the mean of each channel, the palette. With weights of 1 the value is `dopsd.mean_square`. Sums
    and means are over the places of a region, as these count.
    """

    magnitude: float = 1.0
    mean: float = 1.0

    def __call__(
        self,
        prediction: Float[Array, "b h w c"],
        target: Float[Array, "b h w c"],
        region: Region = None,
    ) -> Float[Array, ""]:
        p, t = self._weighted(prediction, region), self._weighted(target, region)
        p_norm, t_norm = _norm(p), _norm(t)
        # |p/|p| - t/|t||^2 = 2 (1 - cos), which float32 would round to 0 where p is near t.
        turned = jnp.sum(jnp.square(p / p_norm - t / t_norm), axis=(1, 2, 3), keepdims=True)
        direction = jax.lax.stop_gradient(p_norm) * t_norm * turned
        squared = self.magnitude * jnp.square(p_norm - t_norm) + direction
        return jnp.mean(squared) / (prediction.size // len(prediction))

    def _weighted(self, v: Float[Array, "b h w c"], region: Region) -> Float[Array, "b h w c"]:
        """The channels' means times the root of their weight: squares then have the weight.

        So it is with the places of `region`.
        """
        if self.mean != 1:
            mean = mean_over(v, region, axis=(1, 2))[:, None, None]
            v = v + (self.mean**0.5 - 1) * mean
        return v if region is None else jnp.sqrt(region) * v


def _norm(v: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 1"]:
    """The norm of each sample."""
    return jnp.sqrt(jnp.maximum(jnp.sum(v * v, axis=(1, 2, 3), keepdims=True), _TINY))
