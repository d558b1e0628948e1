"""Means, differences and their intervals: closed forms, and how often they cover the truth."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from shape_checks import unchecked

from dopsd_jax.evaluation import results, statistics


def test_t_is_that_of_the_tables():
    found = [statistics.t_quantile(freedom) for freedom in (1, 2, 4, 30, 200)]
    assert found == pytest.approx([12.706, 4.303, 2.776, 2.042, 1.972], abs=5e-4)


def test_the_interval_is_students_over_prompts():
    values = np.random.default_rng(0).normal(size=(12, 3))
    found = statistics.mean(values)
    each = values.mean(1)
    low, high = stats.t.interval(0.95, 11, each.mean(), stats.sem(each))
    assert (found.value - found.half, found.value + found.half) == pytest.approx((low, high))
    assert found.prompts == 12


def test_seeds_within_a_prompt_are_no_new_prompts():
    """The same picture ten times over tells nothing more."""
    values = np.random.default_rng(0).normal(size=(8, 1))
    assert statistics.mean(np.repeat(values, 10, 1)) == pytest.approx(statistics.mean(values))


def test_one_prompt_has_no_interval():
    assert statistics.mean(np.ones((1, 5))) == (1.0, None, 1)


def test_a_difference_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(1)
    base = rng.normal(size=(20, 1)) * 5
    tuned = base + 0.3 + 0.1 * rng.normal(size=(20, 1))
    found = statistics.difference(tuned, base)
    paired = stats.ttest_rel(tuned[:, 0], base[:, 0]).confidence_interval(0.95)
    assert (found.value - found.half, found.value + found.half) == pytest.approx(tuple(paired))
    assert found.half < 0.05 * statistics.mean(tuned).half  # what prompts share cancels
    with pytest.raises(ValueError, match="not paired"), unchecked():
        statistics.difference(tuned, base[:5])


def test_95_of_100_intervals_hold_the_truth_where_seeds_depend_on_their_prompt():
    """One that takes every picture for independent holds it far too seldom."""
    rng = np.random.default_rng(2)
    covered, naive, runs = 0, 0, 2000
    for _ in range(runs):
        values = rng.normal(size=(10, 1)) + 0.5 * rng.normal(size=(10, 8))
        found = statistics.mean(values)
        covered += abs(found.value) < found.half
        found = statistics.mean(values.reshape(-1, 1))
        naive += abs(found.value) < found.half
    assert 0.935 < covered / runs < 0.965
    assert naive / runs < 0.7


def test_the_jackknife_of_a_mean_is_the_mean():
    values = np.random.default_rng(3).normal(size=(15, 2))
    found = statistics.jackknife(lambda keep: values[keep].mean(), 15)
    assert found == pytest.approx(statistics.mean(values))


def test_a_figure_of_a_set_is_compared_prompt_by_prompt():
    """A prompt is left out of pictures and reference together; of means it is the paired test."""
    scorer = SimpleNamespace(
        name="figure", better="lower", kinds=(), identity="1",
        distance=lambda own, there: float(own.mean() - there.mean()),
    )  # fmt: skip
    rng = np.random.default_rng(5)
    reference = 5 * rng.normal(size=(9, 1))
    features = {name: reference[:, None] + rng.normal(size=(9, 2, 1)) for name in ("base", "tuned")}
    found = results.set_score(scorer, features, reference, 0.5)
    off = {name: own[..., 0] - reference for name, own in features.items()}
    for name, own in off.items():
        assert found.arms[name] == pytest.approx(statistics.mean(own))
    gap = statistics.difference(off["tuned"], off["base"])
    assert found.differences == {("tuned", "base"): pytest.approx(gap)} and found.floor == 0.5


def test_the_jackknife_covers_a_figure_that_is_no_mean():
    """log of a variance, whose truth is known."""
    rng = np.random.default_rng(4)
    covered, runs = 0, 400
    for _ in range(runs):
        values = rng.normal(size=40)
        found = statistics.jackknife(lambda keep, v=values: np.log(v[keep].var(ddof=1)), 40)
        covered += abs(found.value) < found.half
    assert 0.91 < covered / runs < 0.98
