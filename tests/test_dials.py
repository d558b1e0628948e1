"""The teacher's dials: laws on arrays small enough to reason about."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from test_dopsd import losses_and_gradient, nodes, world

from dopsd_jax import dopsd
from dopsd_jax.common.errors import UserError
from dopsd_jax.config import schema
from dopsd_jax.config.loading import load
from dopsd_jax.methods import distance, losses

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
