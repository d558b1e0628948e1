"""Laws of the baselines, on a denoiser small enough to differentiate in one piece."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from dopsd_jax import dopsd
from dopsd_jax.common import flow
from dopsd_jax.methods import baselines, flow_matching

GRID = (1.0, 0.75, 0.5, 0.0)
SHAPE = (3, 4, 5, 2)
LEVELS = flow_matching.Levels("logit_normal", 3, GRID, 3.0)


def toy_denoiser() -> dopsd.Denoiser:
    """Two layers over the channels; sigma is one number, or one for each sample."""

    def precompute(trainable, base, context):
        return jnp.tanh(context @ (base["c"] + trainable["c"]))

    def velocity(trainable, base, x, sigma, context, precomputed):
        time = jnp.broadcast_to(sigma, (len(x),))[:, None] + precomputed
        return jnp.tanh(x @ (base["w"] + trainable["w"]) + time[:, None, None]) @ base["v"]

    return dopsd.Denoiser(precompute, velocity)


NET = toy_denoiser()


@functools.lru_cache
def compiled(method, **static):
    return jax.jit(functools.partial(method, NET, **static))


def run(method, *args, **static):
    """A method on the toy, compiled; `static`: its options."""
    return compiled(method, **static)(*args)


def world(seed=0):
    """Base, student, teacher, batch, draws."""
    draw = lambda n, *shape: jax.random.normal(jax.random.key(100 * seed + n), shape)
    base = {"c": draw(0, 3, 8), "w": draw(1, 2, 8), "v": draw(2, 8, 2)}
    adapters = [{"c": 0.1 * draw(i, 3, 8), "w": 0.1 * draw(i + 1, 2, 8)} for i in (10, 20)]
    contexts = dopsd.Contexts(draw(3, 3, 3), draw(4, 3, 3))
    batch = flow_matching.Batch(contexts, draw(5, *SHAPE), draw(6, 3, 3))
    return base, *adapters, batch, flow_matching.draw(jax.random.key(seed), SHAPE)


def nodes(loss="velocity", loss_steps="all", grid=GRID):
    return dopsd.make_nodes(grid, loss, loss_steps, jax.random.key(0))


def velocity(trainable, base, x, sigma, context):
    return NET.velocity(
        trainable, base, x, sigma, context, NET.precompute(trainable, base, context)
    )


@functools.partial(jax.jit, static_argnames="grid")
def states(weights, base, context, noise, grid=GRID):
    """The states of a rollout, its end included."""
    found = [noise]
    for sigma, following in itertools.pairwise(grid):
        v = velocity(weights, base, found[-1], sigma, context)
        found.append(flow.euler(found[-1], v, sigma, following))
    return found


def agree(found, loss, student, tolerance=5e-6):
    """The losses and gradient of a method are those of a plain loss of the student."""
    losses, gradient = found
    value, expected = jax.jit(jax.value_and_grad(loss))(student)
    assert relative_error(losses.total, value) < tolerance
    for name in expected:
        assert relative_error(gradient[name], expected[name]) < tolerance


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- SFT and its relatives


def plain_loss(student, base, context, x0, keys, levels=LEVELS):
    """E mean( (v(x) - (noise - x0))^2 ), in a python loop."""
    sigma = levels.draw(flow_matching.folded(keys, 0))
    noise = flow_matching.normals(flow_matching.folded(keys, 1), levels.samples, x0)
    errors = []
    for s, n in zip(sigma, noise, strict=True):
        t = s.reshape(-1, 1, 1, 1)
        v = velocity(student, base, (1 - t) * x0 + t * n, s, context)
        errors.append(jnp.mean((v - (n - x0)) ** 2))
    return sum(errors) / len(errors)


def test_sft_is_the_gradient_of_flow_matching():
    base, student, _, batch, draws = world()
    found = run(baselines.sft, student, base, batch, draws, levels=LEVELS)
    loss = lambda s: plain_loss(s, base, batch.contexts.student, batch.target, draws.keys)
    agree(found, loss, student)
    assert relative_error(jnp.mean(found[0].per_step), found[0].total) < 1e-6
    equal(found[0].per_step, found[0].mse)


def test_sft_teacher_is_sft_on_the_end_of_the_teachers_rollout():
    base, student, teacher, batch, draws = world()
    both = student, teacher
    found = run(baselines.sft_teacher, *both, base, batch, draws, levels=LEVELS, grid=GRID)
    *_, x0 = states(teacher, base, batch.contexts.teacher, draws.start)
    loss = lambda s: plain_loss(s, base, batch.contexts.student, x0, draws.keys)
    agree(found, loss, student)
    assert not np.allclose(x0, batch.target)


def test_prior_preservation_adds_the_same_loss_on_pictures_of_the_start():
    base, student, start, batch, draws = world()
    data, options = (base, batch, draws), {"levels": LEVELS, "grid": GRID}
    *_, x0 = states(start, base, batch.prior, draws.start)
    own = lambda s: plain_loss(s, base, batch.contexts.student, batch.target, draws.keys)
    keys = flow_matching.folded(draws.keys, 2)
    prior = lambda s: plain_loss(s, base, batch.prior, x0, keys)
    found = run(baselines.dreambooth, student, start, *data, **options, weight=0.7)
    agree(found, lambda s: own(s) + 0.7 * prior(s), student)
    assert relative_error(jnp.mean(found[0].per_step), found[0].total) < 1e-6
    nothing = run(baselines.dreambooth, student, start, *data, **options, weight=0.0)
    equal(nothing, run(baselines.sft, student, *data, levels=LEVELS))


def test_noise_levels_are_distributed_as_they_say():
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = lambda sigma, samples=2: np.asarray(
        flow_matching.Levels(sigma, samples, GRID, 3.0).draw(keys)
    ).astype(float)
    for sigma in flow_matching.LEVELS:
        levels = draw(sigma)
        assert levels.shape == (2, 4000) and (levels[0] >= levels[1]).all()
        assert levels.min() >= 0 and levels.max() <= 1
    quantiles = lambda x: np.quantile(x, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quantiles(draw("uniform")), [0.25, 0.5, 0.75], atol=0.02)
    np.testing.assert_allclose(quantiles(draw("shifted")), [0.5, 0.75, 0.9], atol=0.02)
    logit = 1 / (1 + np.exp([0.6745, 0, -0.6745]))
    np.testing.assert_allclose(quantiles(draw("logit_normal")), logit, atol=0.02)
    values, counts = np.unique(draw("nodes"), return_counts=True)
    np.testing.assert_allclose(values, GRID[-2::-1], rtol=1e-6)
    np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.02)


# --- Off-policy distillation


@pytest.mark.parametrize(
    ("whose", "loss_steps"), [("teacher", "all"), ("teacher", (0, 2)), ("targets", (0, 2))]
)
def test_offpolicy_is_the_loss_on_states_that_are_not_the_students(whose, loss_steps):
    base, student, teacher, batch, draws = world()
    the_nodes, every = nodes("x0", loss_steps), loss_steps == "all"
    args = student, teacher, base, batch, draws, the_nodes
    found = run(baselines.offpolicy, *args, states=whose, every_step=every)
    context = batch.contexts.teacher
    if whose == "teacher":
        x = states(teacher, base, context, draws.start)
    else:
        noise = flow_matching.normals(draws.keys, len(GRID) - 1, batch.target)
        x = [(1 - s) * batch.target + s * n for s, n in zip(GRID[:-1], noise, strict=True)]
    with_loss = range(len(GRID) - 1) if every else loss_steps

    def loss(student):
        error = lambda k: jnp.mean(
            (
                velocity(student, base, x[k], GRID[k], batch.contexts.student)
                - velocity(teacher, base, x[k], GRID[k], context)
            )
            ** 2
        )
        return sum(GRID[k] ** 2 * error(k) for k in with_loss) / len(with_loss)

    agree(found, loss, student)
    assert np.isfinite(found[0].mse).nonzero()[0].tolist() == list(with_loss)


def test_on_and_off_policy_are_one_where_there_is_one_state():
    """With a grid of one step the only state is the noise that the rollout begins with."""
    base, student, teacher, batch, draws = world()
    one = nodes(grid=(1.0, 0.0))
    networks = student, teacher, base
    off = run(baselines.offpolicy, *networks, batch, draws, one, states="teacher")
    on = run(dopsd.loss_and_gradient, *networks, batch.contexts, draws.start, one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), off, on)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_off_policy():
    base, student, _, batch, draws = world()
    same = batch._replace(contexts=dopsd.Contexts(*(batch.contexts.student,) * 2))
    for whose in ("teacher", "targets"):
        args = student, student, base, same, draws, nodes()
        losses, gradient = run(baselines.offpolicy, *args, states=whose)
        assert losses.total < 1e-12
        assert all((abs(leaf) < 1e-6).all() for leaf in jax.tree.leaves(gradient))


def test_one_random_step_a_rollout_is_right_on_average():
    """random:1, as DanceOPD asks: over all steps it may be, loss and gradient are those of all."""
    base, student, teacher, batch, draws = world()
    args = student, teacher, base, batch.contexts, draws.start
    on = lambda steps: run(
        dopsd.loss_and_gradient, *args, nodes("x0", steps), every_step=steps == "all"
    )
    each = [on((k,)) for k in range(len(GRID) - 1)]
    (total, *_), gradient = on("all")
    assert relative_error(np.mean([losses.total for losses, _ in each]), total) < 2e-6
    mean = jax.tree.map(lambda *g: sum(g) / 3, *(g for _, g in each))
    for name in gradient:
        assert relative_error(mean[name], gradient[name]) < 5e-6
    drawn = np.stack([
        dopsd.draw_loss_mask("random:1", 3, key) for key in jax.random.split(jax.random.key(2), 400)
    ])  # fmt: skip
    assert (drawn.sum(1) == 1).all() and (np.abs(drawn.mean(0) - 1 / 3) < 0.08).all()


# --- Pairwise sample optimization


def preference(beta=5.0, kappa=0.8, prior=0.5, negatives="student"):
    return baselines.Preference(beta, kappa, prior, negatives)


def run_pso(world_, options, the_nodes=None, every=True, start=None):
    base, student, other, batch, draws = world_
    start = other if start is None else start
    the_nodes = nodes("x0") if the_nodes is None else the_nodes
    args = student, start, base, batch, draws, the_nodes
    return run(baselines.pso, *args, grid=GRID, options=options, every_step=every)


@pytest.mark.parametrize(("negatives", "loss_steps"), [("student", "all"), ("start", (1,))])
def test_pso_is_its_formula(negatives, loss_steps):
    base, student, start, batch, draws = world()
    options, context = preference(negatives=negatives), batch.contexts.student
    every = loss_steps == "all"
    found = run_pso(world(), options, nodes("x0", loss_steps), every)
    *_, lost = states(student if negatives == "student" else start, base, context, draws.start)
    noise = flow_matching.normals(draws.keys, 3, lost)

    def loss(student):
        total = []
        for k in range(len(GRID) - 1) if every else loss_steps:
            s, n = GRID[k], noise[k]

            def error(weights, x0, s=s, n=n):
                x = (1 - s) * x0 + s * n
                clean = x - s * velocity(weights, base, x, s, context)
                return jnp.mean((clean - x0) ** 2, axis=(1, 2, 3))

            won, lose = batch.target, lost
            delta = error(student, won) - options.kappa * error(student, lose)
            reference = error(start, won) - options.kappa * error(start, lose)
            logistic = 1 / (1 + jnp.exp(-options.beta * (reference - delta)))
            total.append(jnp.mean(-jnp.log(logistic) + options.prior * error(student, lose)))
        return sum(total) / len(total)

    agree(found, loss, student, 2e-5)


def test_pso_at_its_limits():
    base, student, start, batch, draws = world()
    # beta 0: every pair is a coin's throw; what is left to learn is the prior.
    losses, gradient = run_pso(world(), preference(beta=0.0, prior=0.0))
    assert losses.total == pytest.approx(np.log(2), abs=1e-6)
    assert all((abs(leaf) < 1e-7).all() for leaf in jax.tree.leaves(gradient))
    # A student that is the start prefers nothing yet.
    losses, gradient = run_pso(world(), preference(prior=0.0), start=student)
    assert losses.total == pytest.approx(np.log(2), abs=1e-6)
    assert any((abs(leaf) > 1e-3).any() for leaf in jax.tree.leaves(gradient))
    # The picture paired with itself: nothing to prefer, whatever the student has become.
    *_, own = states(student, base, batch.contexts.student, draws.start)
    same = base, student, start, batch._replace(target=own), draws
    losses, gradient = run_pso(same, preference(kappa=1.0, prior=0.0))
    assert losses.total == pytest.approx(np.log(2), abs=1e-5)
    assert all((abs(leaf) < 1e-5).all() for leaf in jax.tree.leaves(gradient))


# --- All of them


def test_what_is_drawn_for_a_sample_depends_on_no_other():
    """So a batch that is spread over devices learns as it does on one."""
    base, student, _, batch, draws = world()
    learn = lambda *data: run(baselines.sft, student, base, *data, levels=LEVELS)
    whole = learn(batch, draws)
    take = lambda tree, i: jax.tree.map(lambda x: x[i : i + 1], tree)
    each = [learn(take(batch, i), take(draws, i)) for i in range(3)]
    mean = jax.tree.map(lambda *parts: sum(parts) / 3, *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), mean, whole)
    assert len({float(losses.total) for losses, _ in each}) == 3


def test_memory_grows_by_latents_only():
    base, student, _, _, _ = world()
    image = jax.ShapeDtypeStruct((64, 32, 32, 2), jnp.float32)
    context = jax.ShapeDtypeStruct((64, 3), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 64))

    def temporaries(count):
        levels = flow_matching.Levels("uniform", count, GRID, 3.0)
        batch = flow_matching.Batch(dopsd.Contexts(context, None), image)
        step = compiled(baselines.sft, levels=levels)
        lowered = step.lower(student, base, batch, flow_matching.Draws(image, keys))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # What does grow: states, noise and velocities. With the toy's activations it would be 10.
    latent = 64 * 32 * 32 * 2 * 4
    assert temporaries(16) - temporaries(2) < 14 * 6.5 * latent
