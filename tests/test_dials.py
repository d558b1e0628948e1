"""The teacher's dials: laws on arrays small enough to reason about."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_error
from test_baselines import NET
from test_dopsd import GRID, SHAPE, losses_and_gradient, nodes, toy_denoiser, world

from dopsd_jax import dopsd
from dopsd_jax.common.errors import UserError
from dopsd_jax.config import schema
from dopsd_jax.config.loading import load
from dopsd_jax.methods import baselines, distance, losses, registry
from dopsd_jax.methods.flow_matching import Batch, draw
from dopsd_jax.methods.method import Teacher
from dopsd_jax.training import state, train_step

# --- loss = decoupled


def velocities(near=1.0):
    """A prediction and a target [2, 4, 5, 3] that lies `near` it."""
    draw = lambda n: jax.random.normal(jax.random.key(n), (2, 4, 5, 3)) + 0.3
    return draw(0), draw(0) + near * draw(1)


@pytest.mark.parametrize("near", [1.0, 1e-2])
def test_with_weights_of_one_the_value_is_the_mean_square(near):
    p, t = velocities(near)
    assert relative_error(distance.Decoupled()(p, t), dopsd.mean_square(p, t)) < 2e-5
    assert float(distance.Decoupled()(p, p)) == 0


def test_the_direction_has_no_gradient_along_the_prediction():
    """With magnitude 0 nothing is gained by a smaller velocity; the mean square gains."""
    p, t = velocities()
    for own, shrinks in ((distance.Decoupled(0, 0.3), False), (dopsd.mean_square, True)):
        gradient = jax.grad(own)(p, t)
        along = jnp.abs(jnp.sum(gradient * p, axis=(1, 2, 3)))
        whole = jnp.linalg.norm(gradient.reshape(2, -1), axis=1)
        along /= whole * jnp.linalg.norm(p.reshape(2, -1), axis=1)
        assert bool(jnp.all(along > 1e-2)) if shrinks else bool(jnp.all(along < 1e-6))


def test_the_magnitude_is_the_difference_of_norms():
    p, t = velocities()
    more, less = distance.Decoupled(3.0)(p, t), distance.Decoupled(1.0)(p, t)
    norms = [np.linalg.norm(np.reshape(v, (2, -1)), axis=1) for v in (p, t)]
    assert relative_error((more - less) / 2, np.mean((norms[0] - norms[1]) ** 2) / 60) < 1e-5


def test_the_mean_weighs_what_the_channels_have_in_common():
    p, t = velocities()
    mean = jnp.mean(p - t, axis=(1, 2), keepdims=True)
    whole = jnp.mean((p - t - mean) ** 2) + 0.25 * jnp.mean(mean**2)
    assert relative_error(distance.Decoupled(mean=0.25)(p, t), whole) < 1e-5
    tint = jnp.array([0.2, -0.1, 0.4])
    assert float(distance.Decoupled(mean=0)(p, p + tint)) < 1e-12


def test_a_velocity_of_zero_has_a_finite_gradient():
    _, t = velocities()
    assert bool(jnp.all(jnp.isfinite(jax.grad(distance.Decoupled())(jnp.zeros_like(t), t))))


def test_the_loss_and_its_gradient_are_those_of_the_distance():
    base, student, teacher, contexts, noise = world()
    config = load("zimage:random", {"loss": "decoupled", "decoupled.magnitude": "0.5"})
    setup = losses.Setup(config, None, (1.0, 0.5, 0.0), 1.0)
    assert setup.distance == distance.Decoupled(0.5, 1.0)
    assert losses.Setup(load("zimage:random", {}), *setup[1:]).distance is dopsd.mean_square
    given = student, teacher, base, contexts, noise
    plain, of_plain = losses_and_gradient(*given, nodes("velocity"))
    same, of_same = losses_and_gradient(*given, nodes("decoupled"), distance=distance.Decoupled())
    assert relative_error(same.per_step, plain.per_step) < 1e-5
    assert relative_error(same.mse, plain.mse) < 1e-6
    assert relative_error(of_same["w"], of_plain["w"]) > 1e-2
    half, _ = losses_and_gradient(*given, nodes("decoupled"), distance=setup.distance)
    assert float(half.total) < float(plain.total) and relative_error(half.mse, plain.mse) < 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "decoupled", "decoupled.mean": "0"}, None),
        ({"loss": "decoupled", "method": "sft", "anchor.share": "0.2"}, None),
        ({"loss": "decoupled", "method": "pso"}, "loss: decoupled does not go with config.method"),
        ({"decoupled.mean": "0"}, "decoupled.mean: has no effect with config.loss = x0"),
        (
            {"decoupled.mean": "0", "method": "sft", "anchor.share": "0.2"},
            "decoupled.mean: has no effect with config.loss = x0",
        ),
        ({"loss": "decoupled", "decoupled.magnitude": "-1"}, "magnitude: -1.0 must be at least 0"),
    ],
)
def test_what_goes_together_with_decoupled(fields, message):
    if message is None:
        return schema.check(load("zimage:random", fields), fields)
    with pytest.raises(UserError, match=message):
        schema.check(load("zimage:random", fields), fields)


# --- teacher.told

TOLD, UNTOLD = (1, 3), (0, 2)


def some_nodes(loss_steps="all", told="all"):
    return dopsd.make_nodes(GRID, "velocity", loss_steps, jax.random.key(0), told)


def at_some(method, base, student, teacher, contexts):
    """(the gradient with a teacher told at TOLD; the mean of those of its two halves)."""
    start = jax.tree.map(jnp.zeros_like, student)
    both = method(dopsd.Teachers(teacher, start), contexts, some_nodes(told=TOLD), True)
    of_told = method(teacher, contexts, some_nodes(TOLD), False)
    same = dopsd.Contexts(contexts.student, contexts.student)
    of_start = method(start, same, some_nodes(UNTOLD), False)
    return both, jax.tree.map(lambda a, b: (a + b) / 2, of_told, of_start)


def test_elsewhere_the_target_is_the_start_with_the_students_prompt():
    base, student, teacher, contexts, noise = world()

    def on_policy(teacher, contexts, nodes, every):
        return losses_and_gradient(student, teacher, base, contexts, noise, nodes, every)[1]

    def at_targets(teacher, contexts, nodes, every):
        draws = draw(jax.random.key(1), SHAPE)
        batch = Batch(contexts, jax.random.normal(jax.random.key(2), SHAPE))
        given = teacher, base, batch, draws, nodes
        return baselines.offpolicy(NET, student, *given, "targets", every)[1]

    for method in (on_policy, at_targets):
        found, expected = at_some(method, base, student, teacher, contexts)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert np.abs(a).max() > 1e-3 and relative_error(a, b) < 1e-5


@pytest.mark.parametrize("start", ["off", "copy"])
def test_the_step_gives_the_method_the_start(start):
    """Before training student and start are one: nothing is to be learned where none is told."""
    base, adapters, _, contexts, _ = world()
    net, role = toy_denoiser(), Teacher("ema", decay=0.5)
    student = jax.tree.map(jnp.zeros_like, adapters) if start == "off" else adapters

    def method(student, teacher, base, contexts, noise, key):
        nodes = some_nodes(told=TOLD)
        return dopsd.loss_and_gradient(net, student, teacher, base, contexts, noise, nodes)

    tx = optax.sgd(1.0)
    step = train_step.make_step(
        method, tx, role, lambda _: 1.0, 0, start=start, teachers=True
    )  # fmt: skip
    batch = jax.tree.map(lambda x: x[None], contexts)
    begun = state.create(student, role, tx, start == "copy")
    new, metrics = step(begun, base, batch, 0, latent=SHAPE)
    at = metrics["loss_per_step"]
    assert float(jnp.max(at[jnp.array(UNTOLD)])) < 1e-12 and float(at[jnp.array(TOLD)].min()) > 0
    _, metrics = step(new, base, batch, 1, latent=SHAPE)
    assert float(metrics["loss_per_step"][jnp.array(UNTOLD)].min()) > 0


def test_the_start_is_kept_for_a_teacher_that_is_not_told_everything():
    own = lambda **fields: load("zimage:random", {"teacher.told": "1,2"} | fields)
    assert registry.told(own()) == (1, 2) and registry.start(own()) == "off"
    assert registry.start(own(**{"lora.init_from": "x.safetensors"})) == "copy"
    assert registry.start(own(**{"train": "full", "teacher.weights": "frozen"})) == "teacher"
    assert registry.start(own(method="sft")) == "" and registry.told(own(method="sft")) == "all"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (4, 1, 3, 1)),  # backward, forward, teacher_forward, captions
        ({"loss_steps": "0,1"}, (2, 3, 1, 1)),
        ({"loss_steps": "random:1"}, (1, 3.25, 0.75, 1)),
        ({"method": "offpolicy"}, (4, 1, 3, 1)),
        ({"method": "offpolicy", "teacher.told": "all"}, (4, 0, 4, 0)),
    ],
)
def test_passes_of_a_teacher_that_is_told_at_three_nodes(fields, expected):
    config = load("zimage:random", {"teacher.told": "1,2,3"} | fields)
    found, _ = registry.passes(config, GRID)
    assert (found.backward, found.forward, found.teacher_forward, found.captions) == expected


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ((4,), r"teacher.told: 4 must name some of the steps 0 to 3"),
        ((0.5,), r"teacher.told: 0.5 must name some of the steps"),
        ("first", "teacher.told: 'first' is not all, or a list of step numbers"),
        ((0,), r"teacher.told: none of the steps 0 is in config.loss_steps, 1,2,"),
    ],
)
def test_told_nodes_that_cannot_be(told, message):
    with pytest.raises(UserError, match=message):
        some_nodes((1, 2), told)
