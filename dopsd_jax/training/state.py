"""What training changes: student, teacher, optimizer; and one optimizer step around a method."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dopsd_jax.dopsd import Losses
from dopsd_jax.parallel.sharding import constrain_batch, per_shard, to_device

Tree = Any


class TrainState(NamedTuple):
    """step: optimizer steps done. teacher: None when it is the student itself (`live`)."""

    step: jax.Array
    student: Tree
    teacher: Tree | None
    opt_state: Tree


class Teacher(NamedTuple):
    """config.teacher's weights: `ema`, `frozen` or `live`, with the decay of an EMA.

    For the first `warmup_steps` steps an EMA decays with `warmup_decay` instead.
    """

    weights: str = "ema"
    decay: float = 0.9999
    warmup_steps: int = 0
    warmup_decay: float = 0.999


def create(student: Tree, teacher: Teacher, tx: optax.GradientTransformation) -> TrainState:
    """The state before step 1: the teacher is a copy of the student.

    `student` itself stays the caller's: the step donates what it is given.
    """
    student = jax.tree.map(jnp.copy, student)
    copy = None if teacher.weights == "live" else jax.tree.map(jnp.copy, student)
    return TrainState(jnp.zeros((), jnp.int32), student, copy, tx.init(student))


def offload(placement: TrainState, like: TrainState, names: Sequence[str]) -> TrainState:
    """`placement` with the arrays of the named parts (teacher, optimizer) in the host's memory."""

    def move(part: str, tree: Tree, shapes: Tree) -> Tree:
        if part not in names:
            return tree
        place = lambda s, x: s.with_memory_kind("pinned_host") if x.ndim else s
        return jax.tree.map(place, tree, shapes)

    return placement._replace(
        teacher=move("teacher", placement.teacher, like.teacher),
        opt_state=move("optimizer", placement.opt_state, like.opt_state),
    )


def ema(teacher: Tree, student: Tree, rate) -> Tree:
    """teacher + rate (student - teacher), rate = 1 - decay.

    Keep it in float32: bfloat16 rounds it all away. The rate, and not the decay, is handed over:
    1 - 0.9999 taken in float32 is off by 2e-4 of itself.
    """
    return jax.tree.map(lambda t, s: t + rate * (s - t), teacher, student)


def step_key(seed: int | jax.Array, step) -> jax.Array:
    """The random key of one optimizer step: it depends on nothing else, so nothing is saved."""
    return jax.random.fold_in(jax.random.key(seed), step)


def start_noise(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Unit Gaussian noise [b, h, w, c], float32."""
    return jax.random.normal(key, shape, jnp.float32)


def make_step(
    method: Callable[..., tuple[Losses, Tree]],
    tx: optax.GradientTransformation,
    teacher: Teacher,
    lr: optax.Schedule,
    seed: int | jax.Array,
    placement: TrainState | None = None,
    skip: bool = False,
    draw: Callable[[jax.Array, Sequence[int]], Tree] = start_noise,
) -> Callable:
    """The compiled optimizer step: (state, base, batch, number, latent) -> (state, metrics).

    `method(student, teacher, base, batch, noise, key)` gives the losses and the gradient of one
    micro-batch. `noise` is what `draw(key, shape)` returns: all that is random about a sample, in
    arrays [samples, ...], lest it depend on the devices; `key` is the same for all samples.
    `batch`: a tree whose leaves have a leading axis of micro-batches; their gradients are averaged.
    `latent`: static shape [b, h, w, c] of a micro-batch's noise. The state is
    donated; `placement`, a sharding for each of its parts, is where the new one lies too.

    A step whose loss or gradient is not finite changes nothing but, with `skip`, the count of
    steps. Without `skip` the count stays too, so that the steps that were started before the host
    knew, whose `number` (steps before this one) is then too high, change nothing either.
    """

    # Adapters stand whole on every device: their gradient is summed over devices only once.
    if placement and all(s.is_fully_replicated for s in jax.tree.leaves(placement.student)):
        method = per_shard(method, (False, False, False, True, True, False))

    def micro(state, base, carry, item):
        total, number = carry
        batch, shape = item
        key = jax.random.fold_in(step_key(seed, state.step), number)
        noise_key, method_key = jax.random.split(key)
        noise = jax.tree.map(constrain_batch, draw(noise_key, shape))
        target = jax.lax.stop_gradient(state.student) if state.teacher is None else state.teacher
        losses, gradient = method(state.student, target, base, batch, noise, method_key)
        if placement:
            gradient = jax.lax.with_sharding_constraint(gradient, placement.student)
        return (jax.tree.map(jnp.add, total, gradient), number + 1), losses

    everywhere = None  # every process reads the metrics
    if placement is not None:
        everywhere = NamedSharding(jax.tree.leaves(placement)[0].mesh, PartitionSpec())

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        static_argnames="latent",
        # Else the compiler may place it elsewhere, and the next step is compiled anew.
        out_shardings=None if placement is None else (placement, everywhere),
    )
    def step(
        state: TrainState,
        base: Tree,
        batch: Tree,
        number: jax.Array | int | None = None,
        *,
        latent: tuple[int, ...],
    ):
        count = len(jax.tree.leaves(batch)[0])
        zeros = jax.tree.map(jnp.zeros_like, state.student)
        body = lambda carry, item: micro(state, base, carry, (item, latent))
        (gradient, _), losses = jax.lax.scan(body, (zeros, 0), batch)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        updates, opt_state = tx.update(gradient, to_device(state.opt_state), state.student)
        student = optax.apply_updates(state.student, updates)
        shadow = state.teacher
        if teacher.weights == "ema":
            warm = state.step < teacher.warmup_steps
            rate = jnp.where(warm, 1 - teacher.warmup_decay, 1 - teacher.decay)
            shadow = ema(to_device(shadow), student, rate.astype(jnp.float32))
        metrics = {
            "loss": jnp.mean(losses.total),
            "loss_per_step": jnp.nanmean(losses.per_step, axis=0),
            "gap": jnp.sqrt(jnp.nanmean(losses.mse)),
            "grad_norm": optax.tree.norm(gradient),
            "lr": jnp.asarray(lr(state.step), jnp.float32),
        }
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        if number is not None:
            good &= state.step == number
        new = TrainState(state.step + 1, student, shadow, opt_state)
        state = jax.tree.map(lambda new, old: jnp.where(good, new, to_device(old)), new, state)
        return state._replace(step=new.step) if skip else state, metrics

    return step
