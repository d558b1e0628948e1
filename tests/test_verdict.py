"""The sentence about a tuned model, from scores that are set."""

import numpy as np
import pytest

from dopsd_jax.evaluation import results
from dopsd_jax.evaluation.statistics import Estimate
from dopsd_jax.evaluation.verdict import BOUNDS, Findings, Likeness, Reading, findings, sentence
from dopsd_jax.miniature.exam import ModelScores
from dopsd_jax.miniature.exam import findings as of_run

LEARNED = Likeness("identity", 0.74, 0.10, 0.81)
GOOD = {
    "crispness": [Reading(0.98, of="base's")],
    "contrast": [Reading(0.99, of="base's")],
    "retention": [Reading(1.0, of="base's")],
}


def said(likeness=LEARNED, **readings):
    as_name = {name.replace("_", " "): value for name, value in readings.items()}
    return sentence(Findings(likeness, GOOD | {k: [Reading(*v)] for k, v in as_name.items()}))


def test_what_is_all_good():
    assert said() == (
        "Learned the concept (identity 0.74, teacher 0.81), kept its few steps (crispness 0.98 of "
        "the base's, contrast 0.99 of the base's) and kept the rest (retention 1.00 of the base's)."
    )


@pytest.mark.parametrize(
    ("readings", "start", "part"),
    [
        ({"crispness": (0.63,)}, "Blurred: learned", "lost sharpness (crispness 0.63)"),
        ({"contrast": (0.7,)}, "Hazy: learned", "lost contrast (contrast 0.70)"),
        ({"retention": (0.5,)}, "Forgot: learned", "forgot ordinary things (retention 0.50)"),
        ({"composition_kept": (0.2,)}, "Redrawn: ", "other pictures from the same noise"),
        ({"spread": (0.06,)}, "Narrow: ", "at the same place always (spread 0.06)"),
        ({"leak": (-0.4,)}, "Leaks: ", "other new words (leak +0.40 over the base)"),
        ({"crispness": (0.6,), "contrast": (0.7,), "retention": (0.2,)},
         "Blurred, hazy and forgot: ", "lost contrast"),
    ],
)  # fmt: skip
def test_each_fault_is_called_by_its_name(readings, start, part):
    text = said(**readings)
    assert text.startswith(start) and part in text
    steps = bool({"crispness", "contrast"} & readings.keys())
    rest = bool(readings.keys() - {"crispness", "contrast"})
    assert ("kept its few steps" in text) != steps and ("kept the rest" in text) != rest


def test_what_is_kept_beside_a_fault_is_said():
    assert said(leak=(-0.4,)).endswith(
        "kept ordinary things (retention 1.00 of the base's) and draws the concept for other new "
        "words (leak +0.40 over the base)."
    )


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_is_missed_surely_only_beyond_the_interval(name):
    least = BOUNDS[name].least
    key = name.replace(" ", "_")
    head = BOUNDS[name].head
    assert head not in said(**{key: (least, 0.1)}).lower()
    assert said(**{key: (least - 0.05, 0.1)}).startswith(f"Perhaps {head}: ")
    assert said(**{key: (least - 0.05, 0.01)}).lower().startswith(f"{head}: ")


@pytest.mark.parametrize(
    ("tuned", "start"),
    [(0.1, "Did not learn: the concept is not there (identity 0.10, teacher 0.81)"),
     (0.30, "Did not learn"), (0.33, "Learned in part"),  # of the way 0.28, 0.32
     (0.45, "Learned in part: the concept is there in part"), (0.65, "Learned the concept"),
     (0.58, "Learned in part"), (0.61, "Learned the concept")],  # 0.68, 0.72
)  # fmt: skip
def test_learning_is_the_part_of_the_way_to_the_teacher(tuned, start):
    assert said(Likeness("identity", tuned, 0.1, 0.81)).startswith(start)
    lower = Likeness("DINO-D", 1 - tuned, 0.9, 0.19, "lower")
    assert said(lower).split(":")[0].split(" (")[0] == start.split(":")[0]


@pytest.mark.parametrize(
    ("tuned", "half", "start"),
    [(0.2, 0.01, "Did not learn"), (0.2, 0.3, "Perhaps did not learn: the concept is perhaps not"),
     (0.5, 0.01, "Learned in part"), (0.5, 0.2, "Learned perhaps only in part"),
     (0.7, 0.5, "Learned the concept")],
)  # fmt: skip
def test_learning_is_sure_only_beyond_its_interval(tuned, half, start):
    assert said(Likeness("identity", tuned, 0.1, 0.81, half=half)).startswith(start)
    lower = Likeness("DINO-D", 1 - tuned, 0.9, 0.19, "lower", half)
    assert said(lower).startswith(start)


@pytest.mark.parametrize(("half", "start"), [(0.015, "Perhaps did not"), (0.005, "Did not")])
def test_the_interval_is_taken_on_the_way_to_the_teacher(half, start):
    """0.25 of the way, which is 0.2 long: 0.01 of a score is a twentieth of it."""
    assert said(Likeness("identity", 0.15, 0.1, 0.3, half=half)).startswith(start)
    assert said(Likeness("DINO-D", 0.85, 0.9, 0.7, "lower", half)).startswith(start)


def test_a_score_beside_anothers_is_a_part_of_it_with_its_interval():
    """Whatever the other's size is: only a teacher above 1 is replaced. Of 0 there is no part."""
    rng = np.random.default_rng(0)
    base, tuned = 4.0 + rng.normal(0, 0.1, (8, 2)), 3.2 + rng.normal(0, 0.1, (8, 2))
    score = results.score(Named("ordinary crispness"), {"base": base, "tuned": tuned})
    (reading,) = findings([score]).readings["crispness"]
    gap, whole = score.differences["tuned", "base"], score.arms["base"].value
    assert reading == Reading(1 + gap.value / whole, gap.half / whole, "base's")
    assert reading.value == pytest.approx(0.8, abs=0.02)
    nothing = results.score(Named("retention"), {"base": 0 * base, "tuned": tuned})
    assert findings([nothing]) == Findings(None, {})


def test_a_teacher_above_true_pictures_is_no_measure():
    column = lambda mean: np.full((8, 2), mean) + np.random.default_rng(0).normal(0, 0.001, (8, 2))
    arms = {"base": 0.9, "teacher": 1.3, "tuned": 1.05}
    score = results.score(Named("concept contrast"), {k: column(v) for k, v in arms.items()})
    (reading,) = findings([score]).readings["contrast"]
    assert reading.value == pytest.approx(1.05, abs=0.01) and reading.of == "true pictures'"


def test_a_teacher_that_is_no_better_has_nothing_to_teach():
    for like in (Likeness("identity", 0.5, 0.4, 0.4), Likeness("d", 0.5, 0.2, 0.4, "lower")):
        assert said(like).startswith("Nothing to learn: the teacher is no more like the targets")


def test_nothing_measured_is_nothing_said():
    assert sentence(Findings(None, {})) == ""
    assert sentence(Findings(None, {"crispness": [Reading(1.0)]})) == (
        "Kept its few steps (crispness 1.00)."
    )


class Named:
    better, kinds, identity = "higher", (), "1"

    def __init__(self, name):
        self.name = name


def test_an_evaluation_is_read_with_its_intervals():
    """Crispness beside the teacher's for the concept, beside the base's elsewhere: the worst."""
    rng = np.random.default_rng(0)
    column = lambda mean: mean + rng.normal(0, 0.001, (8, 2))
    of = lambda name, **arms: results.score(Named(name), {k: column(v) for k, v in arms.items()})
    scores = [
        of("identity", base=0.1, teacher=0.8, tuned=0.7),
        of("concept crispness", base=0.2, teacher=0.9, tuned=0.45),
        of("ordinary crispness", base=1.0, tuned=0.99),
        of("retention", base=0.5, tuned=0.5),
        of("spread", base=0.8, teacher=0.7, tuned=0.72),
        of("leaked concept", base=0.15, tuned=0.65),
        of("composition kept", teacher=0.3, tuned=0.9),
        of("brightness", base=0.3, tuned=0.9),
    ]
    found = findings(scores)
    assert found.likeness.learned == pytest.approx(0.857, abs=0.01)
    values = {name: [r.value for r in own] for name, own in found.readings.items()}
    assert values["crispness"] == pytest.approx([0.99, 0.5], abs=0.01)
    assert values["spread"] == pytest.approx([0.9], abs=0.01)
    assert values["leak"] == pytest.approx([-0.5], abs=0.01)
    assert all(0 < r.half < 0.02 for own in found.readings.values() for r in own)
    text = sentence(found)
    assert text.startswith("Blurred and leaks: learned the concept")
    assert (
        "crispness 0.50 of the teacher's" in text and "kept ordinary things (retention 1.00" in text
    )
    assert findings(scores[-1:]) == Findings(None, {})
    assert findings([of("crispness", base=0.2, teacher=0.3)]) == Findings(None, {}), "no tuned"


def test_the_table_of_a_run_has_a_verdict():
    """From few prompts, so without `perhaps`."""
    base, teacher = (
        ModelScores("base", 0.1, 0.1, 0.9, 1.3, 1.0),
        ModelScores("teacher", 0.8, 0.8, 0.9, 1.0, None),
    )
    of = lambda *values: sentence(of_run(base, teacher, ModelScores("tuned", *values)))
    assert of(0.75, 0.7, 0.88, 0.98, 1.0).startswith("Learned the concept (identity 0.75")
    assert of(0.75, 0.7, 0.5, 0.6, 0.5).startswith("Blurred, hazy and forgot: learned the concept")
    assert "contrast 0.98 of the teacher's" in of(0.75, 0.7, 0.88, 0.98, 1.0)
    # A teacher beyond the true pictures is no measure: who is like them has lost nothing.
    glaring = teacher._replace(contrast=1.2)
    said = sentence(of_run(base, glaring, ModelScores("tuned", 0.75, 0.7, 0.88, 0.98, 1.0)))
    assert "contrast 0.98 of the true pictures'" in said and "azy" not in said


def test_differences_are_marked_where_the_interval_leaves_out_zero():
    gaps = {
        "clearly more": (0.3, 0.1),
        "clearly less": (-0.3, 0.1),
        "perhaps": (0.1, 0.1),
        "one": (1, None),
    }
    for better, more in (("higher", "good"), ("lower", "bad")):
        less = {"good": "bad", "bad": "good"}[more]
        expected = {"clearly more": more, "clearly less": less, "perhaps": "", "one": ""}
        for name, (value, half) in gaps.items():
            own = results.Score("s", better, (), "")
            own.differences = {("tuned", "base"): Estimate(value, half, 2)}
            cells, tones = (f([own], ["base", "tuned"]) for f in (results.table, results.tones))
            assert [len(row) for row in tones] == [len(row) for row in cells]
            assert tones[1][-1] == expected[name] and not any(tones[0] + tones[1][:-1])
