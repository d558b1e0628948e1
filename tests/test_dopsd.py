"""Laws of the method and of the optimizer step, on a denoiser small enough to reason about."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_error

from dopsd_jax import dopsd
from dopsd_jax.common import flow
from dopsd_jax.common.errors import UserError
from dopsd_jax.families.zimage import family
from dopsd_jax.training import optimizers, state, train_step

GRID = family.grid("nodes4", 3.0)
SHAPE = (3, 4, 5, 2)
CONFIG = dict(
    learning_rate=0.1, warmup_steps=0, steps=10, lr_schedule="constant",
    optimizer="adamw", moments_dtype="float32", adam_b1=0.9,
    adam_b2=0.999, adam_eps=1e-8, weight_decay=0.0, grad_clip=1.0,
)  # fmt: skip


def toy_denoiser() -> dopsd.Denoiser:
    """Two layers over the channels; the context enters through a precomputed, trainable product."""

    def precompute(trainable, base, context):
        return jnp.tanh(context @ (base["c"] + trainable["c"]))

    def velocity(trainable, base, x, sigma, context, precomputed):
        hidden = jnp.tanh(x @ (base["w"] + trainable["w"]) + precomputed[:, None, None] + sigma)
        return hidden @ base["v"]

    return dopsd.Denoiser(precompute, velocity)


def world(seed=0):
    draw = lambda n, *shape: jax.random.normal(jax.random.key(100 * seed + n), shape)
    base = {"c": draw(0, 3, 8), "w": draw(1, 2, 8), "v": draw(2, 8, 2)}
    adapters = [{"c": 0.1 * draw(i, 3, 8), "w": 0.1 * draw(i + 1, 2, 8)} for i in (10, 20)]
    contexts = dopsd.Contexts(draw(3, 3, 3), draw(4, 3, 3))
    return base, *adapters, contexts, draw(5, *SHAPE)


def nodes(loss="x0", loss_steps="all", grid=GRID):
    return dopsd.make_nodes(grid, loss, loss_steps, jax.random.key(0))


@pytest.mark.parametrize(
    ("loss", "loss_steps", "fine"),
    [((0, 1, 1, 1), [0], False), ((0, 1, 1, 1), [0, 1], True), ((0, 1, 1, 1), "random:1", False),
     ((0, 1, 1, 1), "random:2", True), ((0, 0, 0, 1), "all", True)],
)  # fmt: skip
def test_some_step_with_a_loss_has_a_weight(loss, loss_steps, fine):
    if fine:
        assert nodes(loss, loss_steps).weight.tolist() == list(loss)
        return
    with pytest.raises(UserError, match=r"config\.loss: .* may have no weight at any step"):
        nodes(loss, loss_steps)


def losses_and_gradient(student, teacher, base, contexts, noise, the_nodes, every=True, **more):
    own = functools.partial(dopsd.loss_and_gradient, toy_denoiser(), every_step=every, **more)
    return jax.jit(own)(student, teacher, base, contexts, noise, the_nodes)


def whole_loss(student, teacher, base, contexts, noise, the_nodes, with_loss=None):
    """One loss over a python loop of steps, the state cut between them: the paper's algorithm."""
    net, x, total = toy_denoiser(), noise, 0.0
    with_loss = range(len(the_nodes.sigma)) if with_loss is None else with_loss
    for k, (sigma, following, weight) in enumerate(zip(*the_nodes[:3], strict=True)):
        run = lambda t, c, x=x, s=sigma: net.velocity(t, base, x, s, c, net.precompute(t, base, c))
        v, target = run(student, contexts.student), run(teacher, contexts.teacher)
        if k in with_loss:
            total += weight * jnp.mean((v - jax.lax.stop_gradient(target)) ** 2) / len(with_loss)
        x = jax.lax.stop_gradient(flow.euler(x, v, sigma, following))
    return total


def test_gradients_of_activations_in_bfloat16_are_summed_in_float32():
    """A sum of hundreds of nodes would stand still."""
    base, student, teacher, contexts, noise = world()
    precise, the_nodes = toy_denoiser(), nodes("velocity", grid=flow.shifted_grid(512, 3.0))
    rounded = dopsd.Denoiser(
        lambda *args: precise.precompute(*args).astype(jnp.bfloat16), precise.velocity
    )
    found = [
        jax.jit(functools.partial(dopsd.loss_and_gradient, net, every_step=True))(
            student, teacher, base, contexts, noise, the_nodes
        )[1]["c"]
        for net in (precise, rounded)
    ]
    norms = [float(jnp.linalg.norm(one)) for one in found]
    assert norms[1] / norms[0] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("loss", ["x0", "velocity", "step", (4.0, 3.0, 2.0, 1.0)])
def test_gradient_inside_the_scan_is_the_gradient_of_the_whole_loss(loss):
    base, student, teacher, contexts, noise = world()
    the_nodes = nodes(loss)
    losses, gradient = losses_and_gradient(student, teacher, base, contexts, noise, the_nodes)
    value, expected = jax.value_and_grad(whole_loss)(
        student, teacher, base, contexts, noise, the_nodes
    )
    assert relative_error(losses.total, value) < 2e-6
    assert relative_error(losses.per_step.mean(), value) < 2e-6
    for name in expected:
        assert relative_error(gradient[name], expected[name]) < 5e-6


@pytest.mark.parametrize("with_loss", [(0,), (1, 3), (0, 1, 2, 3)])
def test_only_the_draw_loss_mask_count_and_the_others_move_the_state(with_loss):
    base, student, teacher, contexts, noise = world()
    the_nodes = nodes("velocity", with_loss)
    losses, gradient = losses_and_gradient(
        student, teacher, base, contexts, noise, the_nodes, every=False
    )
    value, expected = jax.value_and_grad(whole_loss)(
        student, teacher, base, contexts, noise, the_nodes, with_loss
    )
    assert np.isfinite(losses.per_step).nonzero()[0].tolist() == list(with_loss)
    assert relative_error(losses.total, value) < 2e-6
    for name in expected:
        assert relative_error(gradient[name], expected[name]) < 5e-6


def test_random_steps_are_as_many_as_asked_and_all_get_their_turn():
    keys = jax.random.split(jax.random.key(1), 200)
    drawn = np.stack([dopsd.draw_loss_mask("random:2", 4, key) for key in keys])
    assert (drawn.sum(1) == 2).all()
    assert (np.abs(drawn.mean(0) - 0.5) < 0.12).all()


def test_x0_loss_is_the_velocity_loss_weighted_by_sigma_squared():
    base, student, teacher, contexts, noise = world()
    losses, _ = losses_and_gradient(student, teacher, base, contexts, noise, nodes("x0"))
    sigma = np.array(GRID[:-1])
    assert relative_error(losses.total, np.mean(sigma**2 * np.asarray(losses.mse))) < 1e-6
    x, v = noise, jax.random.normal(jax.random.key(9), SHAPE)
    difference = flow.x0_hat(x, v, 0.75) - flow.x0_hat(x, 0.5 * v, 0.75)
    assert relative_error(jnp.mean(difference**2), 0.75**2 * jnp.mean((0.5 * v) ** 2)) < 1e-6


def test_the_power_is_that_of_the_students_velocity_and_of_the_teachers():
    base, student, teacher, contexts, noise = world()
    losses, _ = losses_and_gradient(student, teacher, base, contexts, noise, nodes())
    x, net = noise, toy_denoiser()
    for k, (sigma, following) in enumerate(itertools.pairwise(GRID)):
        run = lambda t, c, x=x, s=sigma: net.velocity(t, base, x, s, c, net.precompute(t, base, c))
        v, target = run(student, contexts.student), run(teacher, contexts.teacher)
        assert relative_error(losses.power[k, 0], jnp.mean(v**2)) < 1e-5
        assert relative_error(losses.power[k, 1], jnp.mean(target**2)) < 1e-5
        x = flow.euler(x, v, sigma, following)


def test_equal_contexts_and_weights_give_no_loss_and_no_gradient():
    base, student, _, contexts, noise = world()
    same = dopsd.Contexts(contexts.student, contexts.student)
    losses, gradient = losses_and_gradient(student, student, base, same, noise, nodes())
    # Zero to rounding: the compiler may add up the two forward passes in different orders.
    assert losses.total < 1e-12
    assert all((abs(leaf) < 1e-6).all() for leaf in jax.tree.leaves(gradient))


def test_the_students_states_are_those_of_sampling():
    base, student, _, contexts, noise = world()
    net = toy_denoiser()
    final = dopsd.rollout(net, student, base, contexts.student, noise, GRID)
    x = noise
    for sigma, following in itertools.pairwise(GRID):
        precomputed = net.precompute(student, base, contexts.student)
        v = net.velocity(student, base, x, sigma, contexts.student, precomputed)
        x = flow.euler(x, v, sigma, following)
    assert relative_error(final, x) < 1e-6


def test_one_euler_step_along_the_true_velocity_returns_the_clean_latent():
    x0, noise = (jax.random.normal(jax.random.key(i), SHAPE) for i in (1, 2))
    for sigma in (1.0, 0.9, 0.3):
        x = (1 - sigma) * x0 + sigma * noise
        np.testing.assert_allclose(flow.euler(x, noise - x0, sigma, 0.0), x0, atol=2e-6)
        np.testing.assert_allclose(flow.x0_hat(x, noise - x0, sigma), x0, atol=2e-6)


def test_memory_does_not_grow_with_the_number_of_steps():
    base, student, teacher, contexts, _ = world()
    noise = jax.ShapeDtypeStruct((64, 32, 32, 2), jnp.float32)
    contexts = dopsd.Contexts(*(jnp.ones((64, 3)),) * 2)

    def temporaries(count):
        the_nodes = nodes(grid=flow.shifted_grid(count, 3.0))
        run = jax.jit(functools.partial(dopsd.loss_and_gradient, toy_denoiser()))
        lowered = run.lower(student, teacher, base, contexts, noise, the_nodes)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16) < 1.05 * temporaries(2)


def test_grids_have_the_known_nodes():
    np.testing.assert_allclose(
        family.grid("nodes8", 3.0), [1, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0], atol=1e-7
    )
    assert family.grid("nodes4", 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert family.grid("nodes4", 3.0) == pytest.approx(family.grid("nodes8", 3.0)[::2])
    # Upstream's 8-step list is what shift 6 and the scheduler's default minimum give.
    low = 6 * 0.001 / (1 + 5 * 0.001)
    sigma = np.linspace(1.0, low, 9)
    shifted = 6 * sigma / (1 + 5 * sigma)
    np.testing.assert_allclose(family.grid("legacy8", 3.0)[:-1], shifted[:8], atol=5e-5)
    assert shifted[8] == pytest.approx(0.0347826, abs=1e-6)
    assert family.grid([1, 0.5], 3.0) == (1.0, 0.5, 0.0)
    # Those with a name are of the model's shift.
    assert family.grid("nodes8", 1.0) == pytest.approx(np.linspace(1, 0, 9))
    assert family.grid("nodes4", 6.0) == pytest.approx(family.grid("nodes8", 6.0)[::2])


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: family.grid("nodes5", 3.0), "config.grid"),
        (lambda: family.grid([0.5, 0.9], 3.0), "config.grid"),
        (lambda: family.grid([1.2, 0.9], 3.0), "config.grid"),
        (lambda: family.grid([0.9, 0.5], 3.0), "config.grid"),
        (lambda: family.grid([1, 0.5, 0.5], 3.0), "config.grid"),
        (lambda: family.grid([], 3.0), "config.grid"),
        (lambda: nodes("l2"), "config.loss"),
        (lambda: nodes((1.0, 2.0)), "config.loss"),
        (lambda: nodes((0.0,) * 4), "config.loss"),
        (lambda: nodes((1.0, 1.0, -1.0, 1.0)), "config.loss"),
        (lambda: nodes((1.0, 1.0, float("nan"), 1.0)), "config.loss"),
        (lambda: nodes((1.0, 1.0, float("inf"), 1.0)), "config.loss"),
        (lambda: nodes("x0", "random:²"), "config.loss_steps"),
        (lambda: nodes("x0", "random:5"), "config.loss_steps"),
        (lambda: nodes("x0", "random:0"), "config.loss_steps"),
        (lambda: nodes("x0", "some"), "config.loss_steps"),
        (lambda: nodes("x0", (4,)), "config.loss_steps"),
        (lambda: nodes("x0", (-1,)), "config.loss_steps"),
        (lambda: nodes("x0", ()), "config.loss_steps"),
    ],
)
def test_wrong_settings_are_named(call, field):
    with pytest.raises(UserError, match=field):
        call()


def run_steps(teacher, count=5, config=CONFIG, micro=1, loss_steps="all", seed=3, tx=None):
    base, student, _, contexts, _ = world()
    tx, net = optimizers.optimizer(config) if tx is None else tx, toy_denoiser()

    def method(student, target, base, contexts, noise, key):
        the_nodes = dopsd.make_nodes(GRID, "x0", loss_steps, key)
        return dopsd.loss_and_gradient(net, student, target, base, contexts, noise, the_nodes)

    step = train_step.make_step(method, tx, teacher, optimizers.schedule(config), seed)
    batch = jax.tree.map(lambda x: jnp.stack([x] * micro), contexts)
    now, history = state.create(student, teacher, tx), []
    for _ in range(count):
        now, metrics = step(now, base, batch, latent=SHAPE)
        history.append(jax.tree.map(np.asarray, (now.student, now.teacher, metrics)))
    return student, history


def test_ema_has_its_closed_form_and_its_limits():
    start, history = run_steps(state.Teacher("ema", 0.9))
    expected = start
    for student, teacher, _ in history:
        expected = jax.tree.map(lambda e, s: 0.9 * e + 0.1 * s, expected, student)
        jax.tree.map(
            lambda t, e: np.testing.assert_allclose(t, e, rtol=2e-6, atol=1e-7), teacher, expected
        )
    for decay, weights in ((1.0, "ema"), (0.5, "frozen")):
        _, frozen = run_steps(state.Teacher(weights, decay))
        jax.tree.map(np.testing.assert_array_equal, frozen[-1][1], start)
    _, copied = run_steps(state.Teacher("ema", 0.0))
    jax.tree.map(
        lambda t, s: np.testing.assert_allclose(t, s, rtol=1e-6, atol=1e-7), *copied[-1][1::-1]
    )
    teacher = {"w": jnp.ones(())}
    for _ in range(2000):
        teacher = state.ema(teacher, {"w": jnp.zeros(())}, 1 - 0.9999)
    assert float(teacher["w"]) == pytest.approx(0.8187, abs=1e-4)


def test_ema_warms_up_with_its_own_decay():
    _, history = run_steps(state.Teacher("ema", 1.0, warmup_steps=2, warmup_decay=0.0), count=4)
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    close = lambda a, b: all(map(np.allclose, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert close(history[1][1], history[1][0])
    assert same(history[3][1], history[1][1])


def test_a_live_teacher_is_the_student_and_stores_nothing():
    _, live = run_steps(state.Teacher("live"), count=2)
    assert live[-1][1] is None
    _, copy = run_steps(state.Teacher("ema", 0.0), count=2)
    for name in ("loss", "grad_norm"):
        assert relative_error(live[1][2][name], copy[1][2][name]) < 1e-4


def test_accumulated_micro_batches_average_and_draw_their_own_noise():
    _, one = run_steps(state.Teacher("frozen"), count=1)
    _, two = run_steps(state.Teacher("frozen"), count=1, micro=2)
    assert one[0][2]["loss"] != two[0][2]["loss"]
    assert relative_error(two[0][2]["loss"], one[0][2]["loss"]) < 0.5


def test_the_figures_of_a_step_are_means_over_the_nodes_with_a_loss():
    """Of all micro-batches, and of the anchors by themselves; what is squared has its root."""
    nan, tx = np.nan, optax.sgd(0.0)
    rows = dopsd.Losses(
        jnp.array([1.0, 3.0]),
        jnp.array([[1.0, nan, 5.0], [3.0, nan, nan]]),
        jnp.array([[4.0, nan, 9.0], [14.0, nan, nan]]),
        jnp.array([[[1.0, 4], [nan, nan], [2, 4]], [[0, 40], [nan, nan], [nan, nan]]]),
    )
    method = lambda student, teacher, base, batch, noise, key: (batch, student)
    role, anchor = state.Teacher("frozen"), train_step.Anchor(method, 0.5)
    step = train_step.make_step(method, tx, role, lambda _: 0.0, 0, anchor=anchor)
    held = jax.tree.map(lambda x: x[..., None][:1], rows._replace(mse=4 * rows.mse))
    held = held._replace(total=jnp.array([[7.0]]))
    _, found = step(state.create(jnp.ones(2), role, tx), (), rows, None, held, latent=SHAPE)
    np.testing.assert_allclose(found["loss_per_step"], [2, nan, 5])
    assert [float(found[name]) for name in ("loss", "gap", "norm_ratio")] == [2, 3, 0.25]
    assert float(found["anchor_loss"]) == 7
    assert float(found["anchor_gap"]) == pytest.approx(26**0.5)


def test_noise_of_a_step_depends_on_seed_and_step_only():
    first = run_steps(state.Teacher("frozen"), count=3)[1]
    again = run_steps(state.Teacher("frozen"), count=2)[1]
    jax.tree.map(np.testing.assert_array_equal, first[:2], again)
    other = run_steps(state.Teacher("frozen"), count=1, seed=4)[1]
    assert abs(other[0][2]["loss"] / first[0][2]["loss"] - 1) > 1e-3
    one, two = run_steps(state.Teacher("frozen"), count=2, tx=optax.sgd(0.0))[1]
    jax.tree.map(np.testing.assert_array_equal, one[0], two[0])  # the step alone differs
    assert abs(one[2]["loss"] / two[2]["loss"] - 1) > 1e-3


def test_learning_rate_schedules():
    at = lambda step, **kw: float(optimizers.schedule(CONFIG | kw)(step))
    assert at(7) == pytest.approx(0.1)
    assert [at(s, warmup_steps=4) for s in range(5)] == pytest.approx(
        [0.025, 0.05, 0.075, 0.1, 0.1]
    )
    assert at(0, lr_schedule="linear") == pytest.approx(0.1)
    assert at(5, lr_schedule="linear") == pytest.approx(0.05)
    assert at(10, lr_schedule="cosine") == pytest.approx(0.0, abs=1e-9)
    assert at(0, warmup_steps=1) == pytest.approx(0.1)
    for falling in ("linear", "cosine"):  # from the end of the warm-up to the last step
        after = [at(s, warmup_steps=4, lr_schedule=falling) for s in (3, 4, 7, 10)]
        assert after == pytest.approx([0.1, 0.1, 0.05, 0.0], abs=1e-8)
    with pytest.raises(UserError, match="lr_schedule"):
        at(0, lr_schedule="step")
