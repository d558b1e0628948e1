"""What training changes: student, teacher, optimizer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from dopsd_jax.methods.method import Teacher
from dopsd_jax.parallel.sharding import HOST

Tree = Any


class TrainState(NamedTuple):
    """step: optimizer steps done. teacher: None when it is the student itself (`live`).

    start: the student before training, where anchors or the teacher need a copy of it.
    """

    step: jax.Array
    student: Tree
    teacher: Tree | None
    opt_state: Tree
    start: Tree | None = None


def create(
    student: Tree, teacher: Teacher, tx: optax.GradientTransformation, keep_start: bool = False
) -> TrainState:
    """The state before step 1: the teacher is a copy of the student, and so is the start.

    The arrays are copies, because the step donates its state and the caller keeps `student`.
    """
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    own = copy(student)
    beside = None if teacher.weights == "live" else copy(student)
    start = copy(student) if keep_start else None
    return TrainState(jnp.zeros((), jnp.int32), own, beside, tx.init(own), start)


def offload(placement: TrainState, like: TrainState, names: Sequence[str]) -> TrainState:
    """`placement` with the arrays of the named parts (teacher, optimizer) in the host's memory.

    The start of the student goes with the teacher. Other names are of what is not trained.
    """

    def move(part: str, tree: Tree, shapes: Tree) -> Tree:
        if part not in names:
            return tree
        place = lambda s, x: s.with_memory_kind(HOST) if x.ndim else s
        return jax.tree.map(place, tree, shapes)

    return placement._replace(
        teacher=move("teacher", placement.teacher, like.teacher),
        opt_state=move("optimizer", placement.opt_state, like.opt_state),
        start=move("teacher", placement.start, like.start),
    )


def ema(teacher: Tree, student: Tree, rate) -> Tree:
    """teacher + rate (student - teacher), rate = 1 - decay; all in float32.

    bfloat16 would lose the small change. Pass 1 - decay computed in float64: 1 - 0.9999 computed in
    float32 has a relative error of 2e-4.
    """
    return jax.tree.map(lambda t, s: t + rate * (s - t), teacher, student)


def all_finite(tree: Tree) -> Bool[Array, ""]:
    """Whether no number of `tree` is NaN or infinite; integers always are finite."""
    numbers = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    checks = [jnp.all(jnp.isfinite(x)) for x in numbers]
    if not checks:
        return jnp.asarray(True)
    # One array for the compiler too: it would copy a chain of all checks into the loop of every
    # array that is chosen by them.
    return jnp.all(jax.lax.optimization_barrier(jnp.stack(checks)))


def step_key(seed: int | jax.Array, step) -> jax.Array:
    """The random key of one optimizer step: it depends on nothing else, so nothing is saved."""
    return jax.random.fold_in(jax.random.key(seed), step)
