"""What the baselines share: states that do not depend on the student, and its loss there.

D-OPSD's states come from the student's own predictions, one after the other; a baseline's do not,
so they are P independent points, for all samples of a batch. The gradient is taken point by point
inside a scan, as in `dopsd.loss_and_gradient`, and memory does not grow with P.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dopsd_jax.dopsd import (
    NOT_COMPARED,
    Compared,
    Contexts,
    Denoiser,
    Distance,
    Losses,
    Region,
    add_gradients,
    compared,
    gradient_zeros,
    like,
    mean_square,
)

Tree = Any
LEVELS = ("logit_normal", "uniform", "shifted", "nodes")


class Batch(NamedTuple):
    """What a method learns from; None where it has no use for it.

    target: clean latents of the data set's pictures. prior: the context of the class prompts.
    region: the places that count, by config.data.masks and by the batch's rows; None: all the same.
    """

    contexts: Contexts
    target: Float[Array, "b h w c"] | None = None
    prior: Tree | None = None
    region: Region = None


class Draws(NamedTuple):
    """What is random about each sample.

    start: the noise that its rollout begins with. keys: for all else; one per sample, so that draws
    depend neither on the devices nor on the other samples.
    """

    start: Float[Array, "b h w c"]
    keys: Key[Array, " b"]


def start_noise(key: Key[Array, ""], shape: Sequence[int]) -> Float[Array, "b h w c"]:
    """Unit Gaussian noise, float32."""
    return jax.random.normal(key, shape, jnp.float32)


def draw(key: Key[Array, ""], shape: Sequence[int]) -> Draws:
    """The draws of a micro-batch of latents [b, h, w, c]; `start` is that of D-OPSD."""
    return Draws(start_noise(key, shape), jax.random.split(jax.random.fold_in(key, 1), shape[0]))


def folded(keys: Key[Array, " b"], name: int) -> Key[Array, " b"]:
    """Other keys of the same samples; each use of them has a name."""
    return jax.vmap(lambda key: jax.random.fold_in(key, name))(keys)


def normals(
    keys: Key[Array, " b"], count: int, x: Float[Array, "b h w c"]
) -> Float[Array, "p b h w c"]:
    """`count` unit Gaussian arrays of x's shape."""
    one = lambda key: jax.random.normal(key, (count, *x.shape[1:]), jnp.float32)
    return jnp.moveaxis(jax.vmap(one)(keys), 0, 1)


class Levels(NamedTuple):
    """The noise levels of the losses of a sample: config.sft.

    sigma: how they are distributed. `logit_normal`: the logit of sigma is a unit Gaussian (SD3);
    `uniform`; `shifted`: uniform under the model's shift, s sigma / (1 + (s - 1) sigma);
    `nodes`: those of the grid, with equal probability. samples: levels per picture and step.
    """

    sigma: str
    samples: int
    grid: tuple[float, ...]
    shift: float

    def draw(self, keys: Key[Array, " b"]) -> Float[Array, "p b"]:
        """Levels of each sample, the noisiest first."""
        return -jnp.sort(-jax.vmap(self._draw)(keys), axis=1).T

    def _draw(self, key: Key[Array, ""]) -> Float[Array, " p"]:
        if self.sigma == "nodes":
            return jax.random.choice(key, jnp.array(self.grid[:-1], jnp.float32), (self.samples,))
        if self.sigma == "logit_normal":
            return jax.nn.sigmoid(jax.random.normal(key, (self.samples,), jnp.float32))
        sigma = jax.random.uniform(key, (self.samples,), jnp.float32)
        s = self.shift if self.sigma == "shifted" else 1.0
        return s * sigma / (1 + (s - 1) * sigma)


def noised(x0: Float[Array, "b h w c"], noise: Float[Array, "..."], sigma: Float[Array, "..."]):
    """(1 - sigma) x0 + sigma noise; `sigma` stands for the axes before h, w, c."""
    sigma = sigma[..., None, None, None]
    return (1 - sigma) * x0 + sigma * noise


class Points(NamedTuple):
    """States and the velocities that are wanted there."""

    x: Float[Array, "p b h w c"]
    sigma: Float[Array, "p b"]
    wanted: Float[Array, "p b h w c"]
    weight: Float[Array, " p"]


def fit(
    net: Denoiser,
    student: Tree,
    base: Tree,
    context: Tree,
    points: Points,
    loss_mask: Bool[Array, " p"] | None = None,
    distance: Distance = mean_square,
    region: Region = None,
) -> tuple[Losses, Tree]:
    """L = 1/P sum_p w_p distance( v_student(x_p), wanted_p ) over the points of `loss_mask`.

    `region`: the places that count, the same at all points.
    """

    def loss(velocity, point: Points):
        v = velocity(point.x, point.sigma)
        value = point.weight * distance(v, point.wanted, region)
        return value, compared(v, point.wanted, region)

    return over_points(net, student, base, context, loss, points, loss_mask)


def over_points(
    net: Denoiser,
    student: Tree,
    base: Tree,
    context: Tree,
    loss: Callable[[Callable, Tree], tuple[Float[Array, ""], Compared]],
    points: Tree,
    loss_mask: Bool[Array, " p"] | None = None,
) -> tuple[Losses, Tree]:
    """The mean of `loss` over the points of `loss_mask`, and its gradient for the student.

    `loss(velocity, point)` gives the loss at one point, and what is reported beside it;
    `velocity(x, sigma)` is the student's, in `context`. `points`: a tree of arrays [P, ...].
    `loss_mask`: the points that count; for the others nothing is computed. None: all.
    """
    number = len(jax.tree.leaves(points)[0])
    mask = jnp.ones((number,), bool) if loss_mask is None else loss_mask
    count = jnp.sum(mask).astype(jnp.float32)
    precomputed, precompute_vjp = jax.vjp(lambda s: net.precompute(s, base, context), student)

    def at(student, precomputed, point):
        value, seen = loss(
            lambda x, sigma: net.velocity(student, base, x, sigma, context, precomputed), point
        )
        return value / count, (value, seen)

    def with_loss(point):
        gradients, found = jax.grad(at, argnums=(0, 1), has_aux=True)(student, precomputed, point)
        return gradients, found

    def skip(point):
        nothing = jnp.float32(jnp.nan), NOT_COMPARED
        return jax.tree.map(jnp.zeros_like, (student, precomputed)), nothing

    def add(total, item):
        has_loss, point = item
        gradients, found = (
            with_loss(point)
            if loss_mask is None
            else jax.lax.cond(has_loss, with_loss, skip, point)
        )
        return add_gradients(total, gradients), found

    zeros = gradient_zeros(student, precomputed)
    (gradient, precomputed_gradient), (per_point, seen) = jax.lax.scan(add, zeros, (mask, points))
    behind = precompute_vjp(like(precomputed, precomputed_gradient))
    gradient = jax.tree.map(jnp.add, gradient, *behind)
    total = jnp.sum(jnp.where(mask, per_point, 0.0)) / count
    return Losses(total, per_point, *seen), gradient
