"""What config.teacher.products = fp8 does to the teacher's velocity, measured before training.

On the user's weights and rows, at the states of the student's own rollout, on the devices of the
run: beside the gap to the student, which is what there is to learn.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dopsd_jax.common.flow import euler
from dopsd_jax.dopsd import Denoiser
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.parallel import multihost, sharding
from dopsd_jax.reporting.previews import Sample

LARGE = 0.5  # of the gap: a quarter of what the loss sees is then rounding


class Rounding(NamedTuple):
    """Of one row, at each node of training's grid; v: the teacher's velocity, not rounded.

    error: rms(rounded - v) / rms(v). gap: rms(student's - v) / rms(v). norm_ratio: rms(rounded) /
    rms(v). cosine: of rounded and v.
    """

    error: Float[np.ndarray, " K"]
    gap: Float[np.ndarray, " K"]
    norm_ratio: Float[np.ndarray, " K"]
    cosine: Float[np.ndarray, " K"]


class Measurement:
    """Measures rows of `Previews`.

    Args:
      net: with `Denoiser.rounded`. student, teacher: trained parts of the network.
      grid: (height, width) of a latent -> training's noise levels.
    """

    def __init__(
        self,
        pipe: Pipeline,
        net: Denoiser,
        student: Any,
        teacher: Any,
        grid: Callable[[int, int], Sequence[float]],
    ):
        self.pipe, self.trained, self.grid = pipe, (student, teacher), grid
        self.walk = jax.jit(functools.partial(_walk, net))

    def __call__(self, sample: Sample) -> Rounding:
        """The rounding on a row."""
        sigma = jnp.asarray(self.grid(*sample.noise.shape[1:3]), jnp.float32)
        with sharding.spread_samples(self.pipe.mesh, (sample.contexts, sample.noise)) as own:
            found = self.walk(*self.trained, self.pipe.split[2], *own, sigma)
        return Rounding(*map(multihost.to_host, found))


def _walk(net: Denoiser, student, teacher, base, contexts, noise, sigma):
    told = net.precompute(student, base, contexts.student)
    seen = [one.precompute(teacher, base, contexts.teacher) for one in (net, net.teacher)]
    rms = lambda v: jnp.sqrt(jnp.mean(jnp.square(v)))

    def denoise(x, pair):
        own = net.velocity(student, base, x, pair[0], contexts.student, told)
        exact, rounded = (
            one.velocity(teacher, base, x, pair[0], contexts.teacher, precomputed)
            for one, precomputed in zip((net, net.teacher), seen, strict=True)
        )
        size = rms(exact)
        figures = (
            rms(rounded - exact) / size,
            rms(own - exact) / size,
            rms(rounded) / size,
            jnp.mean(rounded * exact) / (rms(rounded) * size),
        )
        return euler(x, own, *pair), figures

    return jax.lax.scan(denoise, noise, (sigma[:-1], sigma[1:]))[1]


def describe(found: Sequence[Rounding]) -> list[str]:
    """One line for all rows, and a warning where the rounding is large."""
    mean = Rounding(*(np.mean(each, axis=0) for each in zip(*found, strict=True)))
    series = lambda values, digits=3: " ".join(f"{v:.{digits}f}" for v in values)
    lines = [
        f"teacher.products = fp8: relative error of the teacher's velocity by step "
        f"{series(mean.error)}, beside a gap to the student of {series(mean.gap)}; norm ratio "
        f"{series(mean.norm_ratio)}, cosine {series(mean.cosine, 4)}"
    ]
    if np.mean(mean.error) > LARGE * np.mean(mean.gap):
        lines.append(
            "warning: the rounding is more than half as large as what the teacher has to teach; "
            "set config.teacher.products to dtype"
        )
    return lines
