"""One optimizer step around a method, compiled."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dopsd_jax.dopsd import Losses, Teachers
from dopsd_jax.methods.flow_matching import start_noise
from dopsd_jax.methods.method import Teacher
from dopsd_jax.parallel import multihost
from dopsd_jax.parallel.sharding import constrain_batch, per_shard, to_device
from dopsd_jax.training import optimizers
from dopsd_jax.training.nonfinite import PARTS
from dopsd_jax.training.state import TrainState, all_finite, ema, step_key

Tree = Any


class Anchor(NamedTuple):
    """How anchors are learned.

    loss: as `method` of `make_step`, for the contexts of anchors, with the start as teacher. share:
    weight of the anchors' mean gradient; the method's has the rest.
    """

    loss: Callable[..., tuple[Losses, Tree]]
    share: float


def make_step(
    method: Callable[..., tuple[Losses, Tree]],
    tx: optax.GradientTransformation,
    teacher: Teacher,
    lr: optax.Schedule,
    seed: int | jax.Array,
    placement: TrainState | None = None,
    skip: bool = False,
    draw: Callable[[jax.Array, Sequence[int]], Tree] = start_noise,
    start: str = "",
    anchor: Anchor | None = None,
    teachers: bool = False,
) -> Callable:
    """The compiled step: (state, base, batch, number, anchors, latent) -> (state, metrics).

    `method(student, teacher, base, batch, noise, key)` gives the losses and the gradient of one
    micro-batch. `noise` is what `draw(key, shape)` returns: all that is random about a sample, in
    arrays [samples, ...], so that it does not depend on the devices; `key` is the same for all
    samples.
    `batch`: a tree whose leaves have a leading axis of micro-batches; their gradients are averaged.
    `latent`: static shape [b, h, w, c] of a micro-batch's noise. `anchors`: the contexts of
    `anchor`, in micro-batches of their own; the metrics then have `anchor_loss` and `anchor_gap`
    beside those of the method. `start`: where the weights of the network before training are, see
    `registry.start`; with `teachers` the method is given them too, as `dopsd.Teachers`. The state
    is donated; `placement`, a sharding for each of its parts, is where the new one lies too.

    A step is refused when its loss, its gradient or anything of the new state is not finite;
    `metrics["finite"]` says for each of `PARTS` whether it is finite. A refused step changes
    nothing, except that with `skip` it counts as a step. Without `skip` it does not count, and
    steps that the host started before it noticed change nothing either: they are known by their
    `number` (steps before this one), which is higher than the state's count.
    """

    # Adapters stand whole on every device: their gradient is summed over devices only once.
    on_shards = lambda loss: loss
    if placement and all(s.is_fully_replicated for s in jax.tree.leaves(placement.student)):
        on_shards = lambda loss: per_shard(loss, (False, False, False, True, True, False))

    def learn(loss, draw, teacher, state, base, batch, shape, total, first=0, factor=None):
        """`total` and the gradients of the micro-batches of `batch`; and the losses of each.

        first: the number of the first one in the step. factor: of the gradients.
        """

        def micro(carry, batch):
            total, number = carry
            key = jax.random.fold_in(step_key(seed, state.step), number)
            noise_key, loss_key = jax.random.split(key)
            noise = jax.tree.map(constrain_batch, draw(noise_key, shape))
            losses, gradient = loss(state.student, teacher, base, batch, noise, loss_key)
            if placement:
                gradient = jax.lax.with_sharding_constraint(gradient, placement.student)
            if factor is not None:
                gradient = jax.tree.map(lambda g: factor * g, gradient)
            return (jax.tree.map(jnp.add, total, gradient), number + 1), losses

        (total, _), losses = jax.lax.scan(micro, (total, first), batch)
        return total, losses

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
        anchors: Tree | None = None,
        *,
        latent: tuple[int, ...],
    ):
        zeros = lambda: jax.tree.map(jnp.zeros_like, state.student)
        target, begun = _target(state), functools.partial(_start, state, start)
        count = len(jax.tree.leaves(batch)[0])
        asked = Teachers(target, begun()) if teachers else target
        own = on_shards(method), draw, asked, state, base, batch, latent
        gradient, losses = learn(*own, zeros())
        loss, of_anchors = jnp.mean(losses.total), {}
        if anchors is not None:
            more, size = jax.tree.leaves(anchors)[0].shape[:2]
            held = on_shards(anchor.loss), start_noise, begun(), state, base
            gradient = jax.tree.map(lambda g: (1 - anchor.share) / count * g, gradient)
            gradient, found = learn(
                *held, anchors, (size, *latent[1:]), gradient, count, anchor.share / more
            )
            of_anchors = {
                "anchor_loss": jnp.mean(found.total),
                "anchor_gap": jnp.sqrt(jnp.nanmean(found.mse)),
            }
        else:
            gradient = jax.tree.map(lambda g: g / count, gradient)
        before = to_device(state.opt_state)
        updates, opt_state = tx.update(gradient, before, state.student)
        student = optax.apply_updates(state.student, updates)
        shadow = state.teacher
        if teacher.weights == "ema":
            warm = state.step < teacher.warmup_steps
            rate = jnp.where(warm, 1 - teacher.warmup_decay, 1 - teacher.decay)
            shadow = ema(to_device(shadow), student, rate.astype(jnp.float32))
        grad_norm = optax.tree.norm(gradient)
        finite = {
            "loss": jnp.isfinite(loss + of_anchors.get("anchor_loss", 0)),
            "gradient": jnp.isfinite(grad_norm),
            "student": all_finite(student),
            # Only an EMA makes new numbers; any other teacher has passed this check before.
            "teacher": all_finite(shadow if teacher.weights == "ema" else ()),
            "optimizer": all_finite(opt_state),
        }
        metrics = {
            "loss": loss,
            "loss_per_step": jnp.nanmean(losses.per_step, axis=0),
            "gap": jnp.sqrt(jnp.nanmean(losses.mse)),
            "norm_ratio": jnp.sqrt(jnp.divide(*jnp.nanmean(losses.power, axis=(0, 1)))),
            "grad_norm": grad_norm,
            **of_anchors,
            "lr": jnp.asarray(lr(optimizers.scheduled(before, state.step)), jnp.float32),
            "finite": jnp.stack([finite[part] for part in PARTS]),
        }
        good = jnp.all(metrics["finite"])
        if number is not None:
            good &= state.step == number
        new = TrainState(state.step + 1, student, shadow, opt_state)
        old, kept = state._replace(start=None), state.start
        state = jax.tree.map(lambda new, old: jnp.where(good, new, to_device(old)), new, old)
        state = state._replace(start=kept)
        return state._replace(step=new.step) if skip else state, metrics

    return step


def make_gap(
    method: Callable[..., tuple[Losses, Tree]],
    draw: Callable[[jax.Array, Sequence[int]], Tree],
    start: str = "",
    teachers: bool = False,
) -> Callable:
    """The compiled (state, base, batch, key, latent) -> mean square of the gap; nothing is learned.

    `batch`: one micro-batch, as in a step's. The other arguments: see `make_step`. Its
    random numbers are those of `key`: with the same one the gaps of two states can be compared.
    """

    @multihost.begin_together
    @functools.partial(jax.jit, static_argnames="latent")
    def gap(state: TrainState, base: Tree, batch: Tree, key: jax.Array, *, latent: tuple[int, ...]):
        noise_key, loss_key = jax.random.split(key)
        noise = jax.tree.map(constrain_batch, draw(noise_key, latent))
        target = _target(state)
        asked = Teachers(target, _start(state, start)) if teachers else target
        batch = jax.tree.map(lambda x: x[0], batch)
        losses, _ = method(state.student, asked, base, batch, noise, loss_key)
        return jnp.nanmean(losses.mse)

    return gap


def _target(state: TrainState) -> Tree:
    """The weights of the teacher; a live one has the student's."""
    return jax.lax.stop_gradient(state.student) if state.teacher is None else state.teacher


def _start(state: TrainState, where: str) -> Tree:
    """The weights of the network before training; `where`: see `registry.start`."""
    if where == "off":
        return jax.tree.map(jnp.zeros_like, state.student)
    return state.start if where == "copy" else _target(state)
