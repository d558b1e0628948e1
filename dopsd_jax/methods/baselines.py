"""The baselines: other methods for the same pictures, with the interface of D-OPSD.

Each takes what `dopsd.loss_and_gradient` takes and returns the losses and the gradient of one
batch. `teacher` is the network that the run keeps beside the student: D-OPSD's teacher, or, where a
method compares with its start, a frozen copy of that. Pictures are sampled here, on the run's own
grid, without a gradient. Formulas, fields and costs: docs/methods.md.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dopsd_jax.common.flow import euler
from dopsd_jax.dopsd import (
    Contexts,
    Denoiser,
    Distance,
    Losses,
    Nodes,
    Teachers,
    ask_teacher,
    compared,
    mean_over,
    mean_square,
    rollout,
)
from dopsd_jax.methods.flow_matching import (
    Batch,
    Draws,
    Levels,
    Points,
    fit,
    folded,
    noised,
    normals,
    over_points,
)

Tree = Any


def sft(
    net: Denoiser, student: Tree, base: Tree, batch: Batch, draws: Draws, levels: Levels
) -> tuple[Losses, Tree]:
    """Ordinary fine-tuning: flow matching on the data set's pictures.

    L = E_{sigma, noise} mean( (v(x) - (noise - x0))^2 ),  x = (1 - sigma) x0 + sigma noise
    """
    x0, sigma = batch.target, levels.draw(folded(draws.keys, 0))
    noise = normals(folded(draws.keys, 1), levels.samples, x0)
    points = Points(noised(x0, noise, sigma), sigma, noise - x0, jnp.ones(len(sigma)))
    return fit(net, student, base, batch.contexts.student, points, region=batch.region)


def sft_teacher(
    net: Denoiser,
    student: Tree,
    teacher: Tree,
    base: Tree,
    batch: Batch,
    draws: Draws,
    levels: Levels,
    grid: tuple[float, ...],
) -> tuple[Losses, Tree]:
    """`sft` on pictures that the teacher draws in its own context, in place of the data set's."""
    x0 = rollout(net.teacher, teacher, base, batch.contexts.teacher, draws.start, grid)
    return sft(net, student, base, batch._replace(target=x0), draws, levels)


def dreambooth(
    net: Denoiser,
    student: Tree,
    start: Tree,
    base: Tree,
    batch: Batch,
    draws: Draws,
    levels: Levels,
    grid: tuple[float, ...],
    weight: float,
) -> tuple[Losses, Tree]:
    """`sft` with prior preservation (arXiv 2208.12242, section 3.3).

    L = L_sft(pictures, prompts) + weight L_sft(pictures of the class, class prompts)

    The pictures of the class are drawn by `start`, the network before training; all of each counts.
    """
    own, gradient = sft(net, student, base, batch, draws, levels)
    x0 = rollout(net, start, base, batch.prior, draws.start, grid)
    of_class = Batch(Contexts(batch.prior, None), x0)
    other = Draws(draws.start, folded(draws.keys, 2))
    prior, prior_gradient = sft(net, student, base, of_class, other, levels)
    losses = own._replace(
        total=own.total + weight * prior.total, per_step=own.per_step + weight * prior.per_step
    )
    return losses, jax.tree.map(lambda g, p: g + weight * p, gradient, prior_gradient)


def offpolicy(
    net: Denoiser,
    student: Tree,
    teacher: Tree | Teachers,
    base: Tree,
    batch: Batch,
    draws: Draws,
    nodes: Nodes,
    states: str,
    every_step: bool = True,
    distance: Distance = mean_square,
) -> tuple[Losses, Tree]:
    """D-OPSD's loss on states that are not the student's.

    L = 1/K sum_k w_k distance( v_student(x_k), sg v_teacher(x_k) )

    states: where the x_k come from. `teacher`: the teacher's own rollout, with `Teachers` by the
      velocities that the student is to learn. `targets`: the data set's pictures,
      x_k = (1 - sigma_k) x0 + sigma_k noise.
    """
    ask = ask_teacher(net, teacher, base, batch.contexts)

    def visit(x, node: Nodes):
        v = ask(x, node)
        return euler(x, v, node.sigma, node.sigma_next), (x, v)

    def answer(item):
        x, node = item
        if every_step:
            return ask(x, node)
        return jax.lax.cond(node.loss_mask, ask, lambda x, _: jnp.zeros_like(x), x, node)

    if states == "teacher":
        _, (x, wanted) = jax.lax.scan(visit, draws.start, nodes)
    else:
        noise = normals(draws.keys, len(nodes.sigma), batch.target)
        x = noised(batch.target, noise, nodes.sigma[:, None])
        wanted = jax.lax.map(answer, (x, nodes))
    sigma = jnp.broadcast_to(nodes.sigma[:, None], x.shape[:2])
    points = Points(x, sigma, wanted, nodes.weight)
    loss_mask = None if every_step else nodes.loss_mask
    own = student, base, batch.contexts.student, points
    return fit(net, *own, loss_mask, distance, batch.region)


class Preference(NamedTuple):
    """Options of `pso`: config.pso. negatives: who draws them, `student` or `start`."""

    beta: float
    kappa: float
    prior: float
    negatives: str


def pso(
    net: Denoiser,
    student: Tree,
    start: Tree,
    base: Tree,
    batch: Batch,
    draws: Draws,
    nodes: Nodes,
    grid: tuple[float, ...],
    options: Preference,
    every_step: bool = True,
) -> tuple[Losses, Tree]:
    """Pairwise sample optimization (arXiv 2410.03190), adapted to flow matching.

    Positives x_w are the data set's pictures, negatives x_l pictures of the few-step model for the
    same prompts; at every node of the grid both get one noise. With the errors of each sample
    e = w_k mean( (v(x_k) - (noise - x0))^2 ) (w = sigma^2: of the clean estimate), and those of the
    network before training, r:

    D = e_w - kappa e_l,   L = 1/K sum_k E[ -log sigmoid( beta (D_r - D) ) + prior e_l ]
    """
    context = batch.contexts.student
    artist = student if options.negatives == "student" else start
    lost_x0 = rollout(net, artist, base, context, draws.start, grid)
    noise = normals(draws.keys, len(nodes.sigma), lost_x0)
    precomputed = net.precompute(start, base, context)
    reference = lambda x, sigma: net.velocity(start, base, x, sigma, context, precomputed)

    def loss(velocity, point):
        node, noise = point

        def error(velocity, x0):
            v, wanted = velocity(noised(x0, noise, node.sigma), node.sigma), noise - x0
            each = mean_over(jnp.square(v - wanted), batch.region, axis=(1, 2, 3))
            return each, compared(v, wanted, batch.region)

        def margin(velocity):
            (won, seen), (lost, _) = error(velocity, batch.target), error(velocity, lost_x0)
            return node.weight * (won - options.kappa * lost), seen, lost

        delta, seen, lost = margin(velocity)
        delta_reference = jax.lax.stop_gradient(margin(reference)[0])
        preference = jax.nn.softplus(-options.beta * (delta_reference - delta))
        return jnp.mean(preference + options.prior * node.weight * lost), seen

    loss_mask = None if every_step else nodes.loss_mask
    return over_points(net, student, base, context, loss, (nodes, noise), loss_mask)
