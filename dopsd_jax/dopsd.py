"""D-OPSD: on-policy self-distillation of a few-step model (arXiv 2605.05204, section 3).

The student sees the prompt and rolls out its own few steps. At every state x_k it visits, the
teacher, the same network with a richer context, predicts the velocity too; the loss is the
difference of the two:

    L = 1/K sum_k  w_k  mean( (v_student(x_k) - sg v_teacher(x_k))^2 )

The paper's loss has w = 1. Its code compares clean estimates; x0_hat = x - sigma v at one shared
state makes that w = sigma^2 exactly.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dopsd_jax.common.config_fields import shown
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.flow import euler

Tree = Any


class Denoiser(NamedTuple):
    """What the method knows of a model: pure functions.

    precompute(trainable, base, context) -> precomputed: what depends on neither time nor state, a
      tree of floating-point arrays; called once per rollout, outside its loop.
    velocity(trainable, base, x, sigma, context, precomputed) -> dx/dsigma, float32, of x's shape;
      sigma: one for all samples, or one each [b].
    drop_picture(context, keys, share) -> a teacher's context in which this share of the tokens of
      the picture that the teacher alone sees is left out, drawn from a key for each sample; None
      where the family has none.
    rounded: the same network, whose products round more, for a teacher: no gradient goes through
      it. None: a teacher is asked like the student.
    """

    precompute: Callable[[Tree, Tree, Tree], Tree]
    velocity: Callable[[Tree, Tree, Float[Array, "b h w c"], Array, Tree, Tree], Array]
    drop_picture: Callable[[Tree, Array, float], Tree] | None = None
    rounded: "Denoiser | None" = None

    @property
    def teacher(self) -> "Denoiser":
        """The network as a teacher is asked."""
        return self.rounded or self


class Contexts(NamedTuple):
    """What conditions the two roles; each a tree the model's family understands.

    teacher: None for methods that ask no teacher.
    """

    student: Tree
    teacher: Tree | None


class Nodes(NamedTuple):
    """The noise levels of a rollout of K steps, each with the weight of its loss.

    loss_mask: whether the step has a loss; only there is the teacher asked. told: whether the
    teacher is asked in its own context, or else the start in the student's; for `Teachers`.
    """

    sigma: Float[Array, " K"]
    sigma_next: Float[Array, " K"]
    weight: Float[Array, " K"]
    loss_mask: Bool[Array, " K"]
    told: Bool[Array, " K"] | None = None


class Teachers(NamedTuple):
    """Weights of a teacher that is told more than the student at some nodes only: `Nodes.told`.

    start: those of the network before training, which is asked at the other nodes.
    """

    teacher: Tree
    start: Tree


class Losses(NamedTuple):
    """total: the loss. per_step: w_k distance_k. mse, power: see `Compared`. NaN without a loss."""

    total: Float[Array, ""]
    per_step: Float[Array, " K"]
    mse: Float[Array, " K"]
    power: Float[Array, "K 2"]


class Compared(NamedTuple):
    """A velocity beside the wanted one: their mean squared error, and the mean square of each."""

    mse: Float[Array, ""]
    power: Float[Array, " 2"]


# How much each place of a sample counts, 1 on average over a batch; None: every place 1.
Region = Float[Array, "b h w 1"] | None
# distance(prediction, target, region) of velocities [b, h, w, c]: one number, the mean over the
# samples.
Distance = Callable[[Array, Array, Region], Array]


def mean_square(
    prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"], region: Region = None
) -> Float[Array, ""]:
    """The mean squared error: the distance of the paper and of its code."""
    return mean_over(jnp.square(prediction - target), region)


def mean_over(
    x: Float[Array, "b h w c"], region: Region, axis: tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """The mean of x, in which every place counts as `region` says."""
    return jnp.mean(x if region is None else region * x, axis)


def compared(
    velocity: Float[Array, "b h w c"], wanted: Float[Array, "b h w c"], region: Region = None
) -> Compared:
    """What is reported of a velocity, whatever the loss is."""
    powers = [mean_over(jnp.square(v), region) for v in (velocity, wanted)]
    return Compared(mean_square(velocity, wanted, region), jnp.stack(powers))


NOT_COMPARED = Compared(np.float32(np.nan), np.full(2, np.nan, np.float32))


def step_weights(loss: str | Sequence[float], grid: Sequence[float]) -> tuple[float, ...]:
    """Weight of the distance of velocities at each node.

    `x0` (sigma^2: the paper's code), `velocity` (1: the paper), `decoupled` (1: its distance is
    another), `step` (the square of the Euler step's length: the per-step KL of arXiv 2605.15055) or
    a list of K numbers.

    Examples:
      >>> step_weights("x0", (1.0, 0.5, 0.0)), step_weights("step", (1.0, 0.75, 0.0))
      ((1.0, 0.25), (0.0625, 0.5625))
    """
    sigma = list(grid[:-1])
    if loss == "x0":
        return tuple(s * s for s in sigma)
    if loss in ("velocity", "decoupled"):
        return (1.0,) * len(sigma)
    if loss == "step":
        return tuple((a - b) ** 2 for a, b in zip(sigma, grid[1:], strict=True))
    finite = not isinstance(loss, str) and all(0 <= w < math.inf for w in loss)
    if not finite or len(loss) != len(sigma) or not any(loss):
        raise UserError(
            f"config.loss: {shown(loss)} is not x0, velocity, decoupled, step or a list of "
            f"{len(sigma)} weights, one for each step of config.grid, finite, none negative and "
            "not all zero"
        )
    return tuple(float(w) for w in loss)


def draw_loss_mask(loss_steps: str | Sequence[int], count: int, key: Array) -> Bool[Array, " K"]:
    """Which of `count` steps have a loss.

    `all`, a list of step numbers (0 is the noisiest), or `random:m` (m of them, drawn from `key`).

    Examples:
      >>> draw_loss_mask([0, 2], 4, jax.random.key(0)).tolist()
      [True, False, True, False]
    """
    if loss_steps == "all":
        return jnp.ones((count,), bool)
    if isinstance(loss_steps, str):
        head, _, number = loss_steps.partition(":")
        if head != "random" or not number.isdecimal() or not 1 <= int(number) <= count:
            raise UserError(
                f"config.loss_steps: {shown(loss_steps)} is not all, random:m with m from 1 to "
                f"{count}, or a list of step numbers"
            )
        return jax.random.permutation(key, count) < int(number)
    return _chosen(loss_steps, count, "loss_steps")


def make_nodes(
    grid: Sequence[float],
    loss: str | Sequence[float],
    loss_steps: str | Sequence[int],
    key: Array,
    told: str | Sequence[int] = "all",
) -> Nodes:
    """The nodes of one rollout. Raises `UserError` naming a field: loss, loss_steps, teacher.told.

    `told`: `all`, or the numbers of the steps at which the teacher is told more than the student.
    """
    sigma = jnp.asarray(grid, jnp.float32)
    weight = jnp.asarray(step_weights(loss, grid), jnp.float32)
    loss_mask, told_at = draw_loss_mask(loss_steps, len(weight), key), told_mask(told, len(weight))
    _check_weights(step_weights(loss, grid), loss_steps)
    if told_at is not None and not isinstance(loss_steps, str) and not {*told} & {*loss_steps}:
        raise UserError(
            f"config.teacher.told: none of the steps {shown(told)} is in config.loss_steps, "
            f"{shown(loss_steps)}, so the teacher's context would never be used; name one that is"
        )
    return Nodes(sigma[:-1], sigma[1:], weight, loss_mask, told_at)


def _check_weights(weights: Sequence[float], loss_steps: str | Sequence[int]) -> None:
    """Raises `UserError` for steps that may be the only ones with a loss and have no weight."""
    if loss_steps == "all" or all(weights):
        return
    if isinstance(loss_steps, str):
        idle = len(weights) - sum(map(bool, weights)) >= int(loss_steps.rpartition(":")[2])
    else:
        idle = not any(weights[step] for step in loss_steps)
    if idle:
        raise UserError(
            f"config.loss: {shown(weights)} may have no weight at any step of config.loss_steps, "
            f"{shown(loss_steps)}, and then nothing is learned; give those steps "
            "weights, or choose others"
        )


def told_mask(told: str | Sequence[int], count: int) -> Bool[Array, " K"] | None:
    """At which of `count` steps the teacher is told more than the student; None: at all."""
    if told == "all":
        return None
    if isinstance(told, str):
        raise UserError(f"config.teacher.told: {shown(told)} is not all, or a list of step numbers")
    return _chosen(told, count, "teacher.told")


def _chosen(steps: Sequence[int], count: int, field: str) -> Bool[Array, " K"]:
    whole = all(type(step) is int and 0 <= step < count for step in steps)
    if not steps or not whole:
        raise UserError(
            f"config.{field}: {shown(steps)} must name some of the steps 0 to {count - 1}"
        )
    return jnp.zeros((count,), bool).at[jnp.array(sorted(set(steps)))].set(True)


def ask_teacher(
    net: Denoiser, teacher: Tree | Teachers, base: Tree, contexts: Contexts
) -> Callable[[Float[Array, "b h w c"], Nodes], Float[Array, "b h w c"]]:
    """(x, one node) -> the velocity that the student shall have there.

    Where the student is held to its start, in its own context, nothing is rounded: there the two
    must be equal while nothing is learned.
    """

    def ask(net, weights, context):
        precomputed = net.precompute(weights, base, context)
        return lambda x, node: net.velocity(weights, base, x, node.sigma, context, precomputed)

    if not isinstance(teacher, Teachers):
        return ask(net.teacher, teacher, contexts.teacher)
    told = ask(net.teacher, teacher.teacher, contexts.teacher)
    untold = ask(net, teacher.start, contexts.student)
    return lambda x, node: jax.lax.cond(node.told, told, untold, x, node)


def loss_and_gradient(
    net: Denoiser,
    student: Tree,
    teacher: Tree | Teachers,
    base: Tree,
    contexts: Contexts,
    noise: Float[Array, "b h w c"],
    nodes: Nodes,
    every_step: bool = True,
    distance: Distance = mean_square,
    region: Region = None,
) -> tuple[Losses, Tree]:
    """One rollout of the student: its loss and the loss's gradient for the student.

    No gradient flows from one step's state to the step before, so the whole gradient is a sum over
    steps: it is computed inside the scan, and memory does not grow with K. `every_step`: all nodes
    have a loss, and the program has no branch. `distance`: of the two velocities. `region`: the
    places where they are compared. Noise, states, losses and gradients are float32.
    """
    count = jnp.sum(nodes.loss_mask).astype(jnp.float32)
    ask = ask_teacher(net, teacher, base, contexts)
    precomputed, precompute_vjp = jax.vjp(
        lambda s: net.precompute(s, base, contexts.student), student
    )

    def loss(student, precomputed, x, node, target):
        v = net.velocity(student, base, x, node.sigma, contexts.student, precomputed)
        value = node.weight * distance(v, target, region)
        return value / count, (v, value, compared(v, target, region))

    def step_with_loss(x, node):
        target = ask(x, node)
        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        gradients, (v, *found) = grad(student, precomputed, x, node, target)
        return v, tuple(found), gradients

    def step_without_loss(x, node):
        v = net.velocity(student, base, x, node.sigma, contexts.student, precomputed)
        return (
            v,
            (jnp.float32(jnp.nan), NOT_COMPARED),
            jax.tree.map(jnp.zeros_like, (student, precomputed)),
        )

    def denoise(carry, node):
        x, total = carry
        if every_step:
            v, found, gradients = step_with_loss(x, node)
        else:
            v, found, gradients = jax.lax.cond(
                node.loss_mask, step_with_loss, step_without_loss, x, node
            )
        x = euler(x, v, node.sigma, node.sigma_next)
        return (x, add_gradients(total, gradients)), found

    zeros = gradient_zeros(student, precomputed)
    (_, (gradient, precomputed_gradient)), (per_step, seen) = jax.lax.scan(
        denoise, (noise, zeros), nodes
    )
    behind = precompute_vjp(like(precomputed, precomputed_gradient))
    gradient = jax.tree.map(jnp.add, gradient, *behind)
    total = jnp.sum(jnp.where(nodes.loss_mask, per_step, 0.0)) / count
    return Losses(total, per_step, *seen), gradient


def gradient_zeros(student: Tree, precomputed: Tree) -> tuple[Tree, Tree]:
    """Where gradients of many forwards are summed: of activations in float32, whatever their type.

    In bfloat16 a sum of some hundred terms stands still.
    """
    wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    return jax.tree.map(jnp.zeros_like, student), jax.tree.map(wide, precomputed)


def add_gradients(total: Tree, more: Tree) -> Tree:
    """A sum of `gradient_zeros` with the gradients of one more forward."""
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def like(tree: Tree, other: Tree) -> Tree:
    """`other` in the types of `tree`."""
    return jax.tree.map(lambda a, b: b.astype(a.dtype), tree, other)


def rollout(
    net: Denoiser, trainable: Tree, base: Tree, context: Tree, x: Float[Array, "b h w c"], grid
) -> Float[Array, "b h w c"]:
    """Few-step sampling: the Euler solver along the grid, from noise to the clean latent."""
    precomputed = net.precompute(trainable, base, context)
    sigma = jnp.asarray(grid, jnp.float32)

    def denoise(x, pair):
        v = net.velocity(trainable, base, x, pair[0], context, precomputed)
        return euler(x, v, *pair), None

    return jax.lax.scan(denoise, x, (sigma[:-1], sigma[1:]))[0]
