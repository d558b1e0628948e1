"""The losses as a configuration names them: nodes, weights, distance, what the teacher is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_error
from test_baselines import GRID, NET, SHAPE, world

from dopsd_jax.config.loading import load
from dopsd_jax.dopsd import Teachers
from dopsd_jax.methods import registry
from dopsd_jax.methods.losses import Schedule
from dopsd_jax.run import build
from dopsd_jax.training import state

SCHEDULE = Schedule(lambda height, width: GRID, lambda height, width: 3.0)
ANCHOR = "anchor"  # the loss of the anchors, which goes with every method
DISTANCES = ("dopsd", "offpolicy", ANCHOR)  # those that compare two velocities by config.loss


@functools.cache
def learn(method, half=False, untold=False, schedule=SCHEDULE, **fields):
    """Losses and gradient of the toy; `fields`: with __ for a dot.

    half: only the upper half of a frame counts. untold: where the teacher is not told, the student
    itself is asked.
    """
    own = {} if method == ANCHOR else {"method": method}
    config = load("zimage:random", own | {k.replace("__", "."): v for k, v in fields.items()})
    base, student, teacher, batch, draws = world()
    teacher = Teachers(teacher, student) if untold else teacher
    key, networks = jax.random.key(7), (student, teacher, base)
    if method == ANCHOR:
        loss = registry.anchor_loss(config, NET, schedule)
        return jax.jit(loss)(*networks, batch.contexts.student, draws.start, key)
    loss = registry.loss_function(config, NET, schedule)
    draws = draws.start if registry.method(config).start_only else draws
    region = np.zeros((*SHAPE[:3], 1), np.float32)
    region[:, :2] = 2.0
    batch = batch._replace(region=region if half else None)
    return jax.jit(loss)(*networks, batch, draws, key)


@pytest.mark.parametrize("method", [*DISTANCES, "pso"])
def test_only_the_nodes_of_loss_steps_have_a_loss(method):
    losses, gradient = learn(method, loss_steps="1")
    assert np.isfinite(losses.per_step).tolist() == [False, True, False]
    assert relative_error(losses.total, losses.per_step[1]) < 1e-6
    _, of_all = learn(method)
    assert relative_error(gradient["w"], of_all["w"]) > 1e-2


@pytest.mark.parametrize("method", DISTANCES)
def test_nodes_have_the_weights_and_the_distance_of_the_loss(method):
    losses, _ = learn(method, loss="0.5,0,3")
    assert relative_error(losses.per_step, np.array([0.5, 0, 3]) * losses.mse) < 1e-6
    apart, _ = learn(method, loss="decoupled", decoupled__magnitude="0")
    assert (apart.per_step < 0.999 * apart.mse).all()  # without the difference of the norms


def test_a_preference_without_weight_is_a_coins_throw():
    losses, _ = learn("pso", loss="0,1,1")
    assert losses.per_step[0] == pytest.approx(np.log(2), abs=1e-6)
    assert (abs(losses.per_step[1:] - np.log(2)) > 1e-3).all()


@pytest.mark.parametrize(
    ("method", "fields"),
    [("dopsd", {}), ("offpolicy", {}), ("offpolicy", {"offpolicy__states": "targets"})],
)
def test_a_teacher_is_told_at_the_nodes_of_told_alone(method, fields):
    """At the others the start is asked what the student is told: here it is the student."""
    losses, _ = learn(method, untold=True, teacher__told="1", **fields)
    assert losses.mse[1] > 1e-3 and max(losses.mse[0], losses.mse[2]) < 1e-12


@pytest.mark.parametrize("method", registry.METHODS)
def test_every_method_looks_where_the_batch_says(method):
    (whole, _), (part, _) = learn(method), learn(method, half=True)
    assert relative_error(part.total, whole.total) > 1e-4


def test_class_prompts_have_the_configured_weight():
    prior = learn("dreambooth")[0].total - learn("sft")[0].total
    half = learn("dreambooth", dreambooth__weight="0.5")[0].total - learn("sft")[0].total
    assert prior > 1e-2 and relative_error(half, 0.5 * prior) < 1e-5


def test_grid_and_shift_are_those_of_the_latents_height_and_width():
    asked = []
    note = lambda found: lambda height, width: asked.append((height, width)) or found
    for method in ("dopsd", "sft", ANCHOR):
        learn(method, schedule=Schedule(note(GRID), note(3.0)))
    assert set(asked) == {SHAPE[1:3]} and len(asked) == 6


# --- the step of a configuration


def step_of(contexts=None, anchors=None, **fields):
    """The state after one step of the toy, whose adapters are off, its metrics, and the gap."""
    config = load("zimage:random", {k.replace("__", "."): v for k, v in fields.items()})
    base, adapters, _, batch, _ = world()
    contexts = batch.contexts if contexts is None else contexts
    batch, tx = batch._replace(contexts=contexts, target=None, prior=None), optax.sgd(0.0)
    off, rows = jax.tree.map(jnp.zeros_like, adapters), jax.tree.map(lambda x: x[None], batch)
    begun = state.create(off, registry.teacher(config), tx)
    gap = build.make_gap(config, NET, SCHEDULE)(begun, base, rows, jax.random.key(1), latent=SHAPE)
    step = build.make_step(config, NET, SCHEDULE, tx)
    return *step(begun, base, rows, 0, anchors, latent=SHAPE), gap


def test_where_a_teacher_is_not_told_nothing_is_learned_at_first():
    _, whole, gap = step_of()
    _, metrics, of_one = step_of(teacher__told="1")
    assert metrics["loss_per_step"][1] > 1e-3 < whole["loss_per_step"].min()
    assert max(metrics["loss_per_step"][0], metrics["loss_per_step"][2]) < 1e-12
    assert 0.2 < of_one / gap < 0.5  # one of three nodes is left


def test_anchors_have_their_share_of_a_step_and_begin_without_a_gap():
    prompts = jax.random.normal(jax.random.key(3), (1, 2, 3))
    plain, (_, metrics, _) = step_of()[1], step_of(anchors=prompts, anchor__share="0.25")
    assert metrics["anchor_gap"] < 1e-6 and metrics["loss"] == plain["loss"]
    assert relative_error(metrics["grad_norm"], 0.75 * plain["grad_norm"]) < 1e-5


@pytest.mark.parametrize(("nonfinite", "steps"), [("skip", 1), ("stop", 0)])
def test_a_step_that_is_not_finite_is_counted_where_it_may_be_skipped(nonfinite, steps):
    broken = jax.tree.map(lambda x: np.nan * x, world()[3].contexts)
    new, metrics, _ = step_of(broken, nonfinite=nonfinite)
    assert new.step == steps and not metrics["finite"].all()


def test_another_seed_draws_another_step():
    first, again, other = (step_of(seed=seed)[1]["loss"] for seed in ("1", "1", "2"))
    assert first == again and abs(other / first - 1) > 1e-3
