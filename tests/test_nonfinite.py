"""What is not finite never enters the state; spikes are seen; the batch is written down."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.buckets import Bucket, Shape
from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.data.table import DataRow
from dopsd_jax.dopsd import Losses
from dopsd_jax.reporting.incidents import write_incident
from dopsd_jax.training import state, train_step
from dopsd_jax.training.nonfinite import (
    MAX_SKIPPED,
    SPIKE_MIN,
    SPIKE_WINDOW,
    Guard,
    Spikes,
    finite,
    nonfinite_parts,
)


def toy_step(skip, decay=0.5, rate=0.1, scale=1.0, tx=None, lr=lambda step: 0.1):
    """A step whose gradient is its batch, around two numbers; and the state before it."""

    def method(student, teacher, base, batch, noise, key):
        gradient = jnp.broadcast_to(batch, student.shape)
        return Losses(jnp.sum(batch * 0 + 1), jnp.ones(1), jnp.ones(1), jnp.ones((1, 2))), gradient

    tx = tx or optax.chain(optax.scale(scale), optax.adam(rate))
    teacher = state.Teacher(decay=decay)
    step = train_step.make_step(method, tx, teacher, lr, 0, skip=skip)
    return step, state.create(jnp.ones(2), teacher, tx)


def run(step, train, gradients, numbers=None):
    metrics = []
    for n, gradient in enumerate(gradients):
        batch = jnp.full((1, 1), gradient, jnp.float32)
        number = n if numbers is None else numbers[n]
        train, m = step(train, (), batch, number, latent=(1, 1, 1, 1))
        metrics.append({k: np.asarray(v) for k, v in m.items()})
    return jax.tree.map(np.asarray, train), metrics


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_records_that_are_of_no_step_are_one_line_each():
    good = {"step": 1, "loss": None, "grad_norm": 0.5}
    assert Guard([good]).skipped == 1
    with pytest.raises(UserError) as caught:
        Guard([good, {"step": 2}, good | {"step": 3, "loss": "x"}])
    assert len(caught.value.problems) == 3
    assert caught.value.problems[2].startswith("metrics.jsonl: step 3 has no number under 'loss'")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_refused_step_stops_the_state_where_it_was(bad):
    """Also for the steps that were on their way before anybody knew."""
    good, _ = run(*toy_step(False), [1.0, 2.0])
    stopped, metrics = run(*toy_step(False), [1.0, 2.0, bad, 3.0, 4.0])
    same(stopped, good)
    assert stopped.step == 2
    assert [finite(m) for m in metrics] == [True, True, False, True, True]


def test_a_skipped_step_changes_the_count_alone():
    step, start = toy_step(True)
    skipped, _ = run(step, start, [1.0, np.nan, 2.0])
    left_out, _ = run(*toy_step(True), [1.0, 2.0])
    assert skipped.step == 3
    same(skipped._replace(step=0), left_out._replace(step=0))


def test_the_learning_rate_told_is_the_one_that_moved_the_student():
    """A refused step does not move the schedule either."""
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    step, train = toy_step(True, tx=optax.sgd(schedule), lr=schedule)
    for number, gradient in enumerate([1.0, np.nan, 1.0, 1.0]):
        before = np.asarray(train.student)
        train, metrics = run(step, train, [gradient], [number])
        if np.isfinite(gradient):
            np.testing.assert_allclose(before - train.student, metrics[0]["lr"], rtol=1e-6)


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("student", {"rate": np.inf}),
        ("teacher", {"decay": np.nan}),
        ("optimizer", {"scale": 1e25}),  # its square is infinite: the second moment
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_makes_a_state_that_is_not_finite_is_refused(part, options, skip):
    """Loss and gradient are finite; the new state is not."""
    step, start = toy_step(skip, **options)
    before = jax.tree.map(np.array, start)
    after, (metrics,) = run(step, start, [1.0])
    found = nonfinite_parts(metrics)
    assert part in found and not {"loss", "gradient"} & set(found)
    assert after.step == skip
    same(after._replace(step=0), before._replace(step=0))
    record = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "nonfinite": found}
    guard = Guard([record])
    assert guard.skipped == guard.in_a_row == 1 and part in guard.fault(record)
    assert part in guard.advice(record, "stop", 0)


def test_without_faults_the_guard_changes_nothing():
    a, _ = run(*toy_step(False), [1.0, -2.0, 3.0])
    b, _ = run(*toy_step(True), [1.0, -2.0, 3.0], [None] * 3)
    same(a, b)


def record(step, loss, norm=1.0):
    return {"step": step, "loss": loss, "grad_norm": norm}


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run():
    guard = Guard([record(1, 1.0), record(2, None), record(3, 1.0), record(4, 1.0, None)])
    assert (guard.skipped, guard.in_a_row) == (2, 1)
    assert guard.must_stop("stop") and not guard.must_stop("skip")
    assert guard.look(record(5, 1.0)) == {"skipped": 2, "spike": False}
    assert guard.fault(record(5, 1.0) | {"spike": False}) is None and not guard.must_stop("stop")
    for n in range(MAX_SKIPPED):
        assert not guard.must_stop("skip")
        assert guard.look(record(6 + n, np.nan))["skipped"] == 3 + n
    assert guard.must_stop("skip")
    advice = guard.advice(record(15, np.nan), "skip", 14)
    assert "not finite" in advice and "step 14" in advice


def test_a_spike_is_far_above_the_losses_of_before():
    rng = np.random.default_rng(0)
    losses = np.exp(rng.normal(-3, 0.5, 400)).astype(np.float32)
    spikes = Spikes()
    assert not any(spikes.add(float(x)) for x in losses)  # noise over a decade is no spike
    assert spikes.add(float(losses.max()) * 1e3)
    assert not spikes.add(float(np.median(losses)))
    assert not Spikes().add(1e9)  # nothing to compare with
    assert not Spikes([None, float("nan"), 0.0] * SPIKE_MIN).add(1e9)


def test_a_spike_is_8_deviations_above_the_last_100_losses():
    """Of logarithms, by their median; a spike is one of the last, so a new level is soon usual."""
    about = lambda size, count: list(np.exp(size * (-1.0) ** np.arange(count)))
    deviation = 1.4826  # of logarithms that are 1 and -1 in turn
    for distance, expected in ((7.9, False), (8.1, True)):
        assert Spikes(about(1, SPIKE_MIN)).add(np.exp(distance * deviation)) == expected
    assert not Spikes(about(1, SPIKE_MIN - 1)).add(1e9)
    before, last = about(5, 1000), about(0.1, SPIKE_WINDOW)
    assert Spikes(before + last).add(np.exp(2)) and not Spikes(before + last[:30]).add(np.exp(2))
    spikes = Spikes(about(1, SPIKE_MIN))
    seen = [spikes.add(float(np.exp(20 + 0.1 * n))) for n in range(2 * SPIKE_MIN)]
    assert seen[0] and not seen[-1]


def test_a_resumed_run_sees_the_same_spikes():
    rng = np.random.default_rng(1)
    losses = [float(np.float32(x)) for x in np.exp(rng.standard_t(1.5, 300))]
    whole = Guard()
    seen = [whole.look(record(n, np.float32(x)))["spike"] for n, x in enumerate(losses)]
    assert any(seen)
    # As metrics.jsonl has them: shortest decimals.
    stored = [record(n, float(str(np.float32(x)))) for n, x in enumerate(losses)]
    resumed = Guard(stored[:150])
    again = [resumed.look(record(n, np.float32(losses[n])))["spike"] for n in range(150, 300)]
    assert again == seen[150:]


def test_the_batch_of_an_incident_is_named(tmp_path):
    rows = [
        DataRow(
            tmp_path / f"{n}.png", (("text", f"caption {n}"), ("long", f"long {n}")), f"file:{n}"
        )
        for n in range(3)
    ]
    shape = Shape(Bucket(64, 48))
    batch = BatchIndex(
        6, shape, np.array([2, 0]), ("long", "text"), np.array([1, 0]), (False, True)
    )
    metrics = record(7, np.float32("nan"))
    data, prompts = SimpleNamespace(rows=rows), ("a red boat",)
    path = write_incident(tmp_path, "it broke", metrics, batch, data, prompts)
    found = json.loads(path.read_text())
    assert path.name == "step_7.json" and found["why"] == "it broke"
    assert found["metrics"] == {"step": 7, "loss": None, "grad_norm": 1.0}
    assert found["size"] == [64, 48] and found["anchors"] == ["a red boat"]
    assert found["samples"] == [
        {
            "row": "file:2", "image": str(tmp_path / "2.png"), "prompt_key": "long",
            "caption": "long 2",
        },
        {
            "row": "file:0", "image": str(tmp_path / "0.png"), "prompt_key": "text",
            "caption": "caption 0", "student's caption": "",
        },
    ]  # fmt: skip
