"""What `check` says of a teacher: likeness, sharpness, and the advice that follows."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from PIL import Image
from test_dopsd import GRID, losses_and_gradient, nodes, toy_denoiser, world

from dopsd_jax import dopsd
from dopsd_jax.common.errors import UserError
from dopsd_jax.conditioning.padding import longest, padded_rows, shapes_of
from dopsd_jax.evaluation import teacher_traits as traits
from dopsd_jax.families.base import TEACHER

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (96, 128, 3), dtype=np.uint8) for _ in range(3)]


def test_likeness_is_one_for_equal_pictures_and_nothing_for_strangers():
    coarse = [
        np.asarray(Image.fromarray(p[:8, :8]).resize((128, 96), Image.Resampling.NEAREST))
        for p in PICTURES
    ]
    assert traits.likeness(coarse[0], coarse[0]) == pytest.approx(1)
    assert traits.likeness(coarse[0], 255 - coarse[0]) == pytest.approx(-1)
    assert abs(traits.likeness(coarse[0], coarse[1])) < 0.3
    assert traits.mutual([coarse[0]] * 3) == pytest.approx(1)
    assert traits.mutual(coarse[:2]) == traits.likeness(*coarse[:2])
    # Finer details than those of a small version do not count, nor does another size.
    larger = np.asarray(Image.fromarray(coarse[0]).resize((256, 192), Image.Resampling.NEAREST))
    assert traits.likeness(larger, coarse[0]) == pytest.approx(1)


def test_another_caption_may_be_longer_than_all_of_the_data_set():
    """Rows that a model takes are whole multiples, however long a caption is."""
    limit = jax.ShapeDtypeStruct((1504, 8), np.float32)
    pipe = SimpleNamespace(limits=lambda role: {"features": limit})
    own = lambda count: padded_rows([shapes_of({"features": np.zeros((count, 8))})], pipe, 0)
    rows = [longest({"features": 64}, own(count)) for count in (12, 64, 76)]
    assert [found["features"] for found in rows] == [64, 64, 96]


def test_a_copy_is_one_of_the_picture_that_the_teacher_is_shown(monkeypatch):
    """With teacher.context = other that is not the target."""
    drawn = lambda pipe, trained, wishes: [PICTURES[trained]] * len(wishes)
    monkeypatch.setattr(traits, "draw", drawn)
    walk = lambda self, sample, noise: (np.zeros(1), np.zeros((2, 1, 1, 2, 2, 1)))
    monkeypatch.setattr(traits.Measurement, "_walk", walk)
    pipe = SimpleNamespace(
        family=SimpleNamespace(denoiser=lambda graphdef: None),
        split=[None],
        decode=lambda latents: PICTURES,
    )
    measure = traits.Measurement(pipe, SimpleNamespace(rows=[{}, {}]), 0, 1, lambda *sides: [1, 0])
    sample = SimpleNamespace(
        noise=np.zeros((1, 2, 2, 1)), contexts=[None, None], target=PICTURES[0]
    )
    assert measure(sample).student_copies == 1 > measure(sample).copies + 0.5
    other = measure(sample, seen=PICTURES[1])
    assert other.copies == 1 > other.student_copies + 0.5


def test_each_role_has_its_own_traits(monkeypatch):
    """A teacher that copies, and is not moved; a student of as many pictures as noises."""
    still, others = PICTURES[0], [PICTURES[1], PICTURES[2], PICTURES[0]]
    grey = np.full_like(still, 90)
    drawn = lambda pipe, trained, wishes: [still] * 4 if trained else [*others, grey]
    monkeypatch.setattr(traits, "draw", drawn)
    by_role = np.zeros((2, 1, 1, 2, 2, 1))
    by_role[TEACHER] = 1.0
    walk = lambda self, sample, noise: (np.zeros(1), by_role)
    monkeypatch.setattr(traits.Measurement, "_walk", walk)
    pipe = SimpleNamespace(
        family=SimpleNamespace(denoiser=lambda graphdef: None, collate=lambda features, rows: None),
        split=[None],
        limits=lambda role: {},
        decode=lambda latents: [grey if latents.any() else PICTURES[1]],
    )
    measure = traits.Measurement(pipe, SimpleNamespace(rows=[{}, {}]), 0, 1, lambda *sides: [1, 0])
    sample = SimpleNamespace(noise=np.zeros((1, 2, 2, 1)), contexts=[None, None], target=still)
    found = measure(sample, traits.Other("", {}, {}))
    assert found.sharp == [0] and found.student_sharp == [1]
    assert found.copies == 1 > 0.6 > found.student_copies > 0.3
    assert found.alike == 1 > 0.5 > found.student_alike
    assert found.moved == 0 and found.student_moved == traits.distance(grey, PICTURES[1])


def test_gaps_and_clean_estimates_are_those_of_a_step_of_training():
    """Relative to the teacher's velocity; the student's last estimate is its finished picture."""
    base, student, teacher, contexts, noise = world()
    net, sigma = toy_denoiser(), jnp.array(GRID)
    networks = student, teacher, base, contexts, noise
    gap, estimates = jax.jit(functools.partial(traits._walk, net))(*networks, sigma)
    losses, _ = losses_and_gradient(*networks, nodes("velocity"))
    assert relative_error(gap, np.sqrt(losses.mse / losses.power[:, 1])) < 1e-5
    first, last = estimates[:, 0], estimates[:, -1]
    assert relative_error(jnp.mean((first[0] - first[1]) ** 2), losses.mse[0]) < 1e-5
    drawn = jax.jit(functools.partial(dopsd.rollout, net))(
        student, base, contexts.student, noise, sigma
    )
    assert relative_error(last[0], drawn) < 1e-5 and relative_error(last[1], drawn) > 1e-2


def test_one_colour_is_like_nothing():
    grey = np.full((96, 128, 3), 90, np.uint8)
    assert traits.likeness(grey, grey) == 0


def test_a_distance_is_the_root_mean_square_of_all_numbers():
    half = np.zeros((4, 4, 3), np.uint8)
    half[:2] = 200
    assert traits.distance(half, 0 * half) == traits.distance(0 * half, half)
    assert traits.distance(half, 0 * half) == pytest.approx(200 / 2**0.5)


def test_a_blur_is_less_sharp():
    blurred = Image.fromarray(PICTURES[0]).resize((32, 24), Image.Resampling.BOX)
    blurred = np.asarray(blurred.resize((128, 96), Image.Resampling.BICUBIC))
    assert traits.sharpness(blurred) < 0.3 * traits.sharpness(PICTURES[0])
    assert traits.sharpness(np.full((96, 128, 3), 90, np.uint8)) == 0


GOOD = traits.Traits(
    gap=np.full(4, 0.3),
    sharp=np.array([0.9, 1.0, 1.0, 1.0]),
    student_sharp=np.array([0.8, 0.9, 1.0, 1.0]),
    copies=0.7,
    student_copies=0.3,
    alike=0.5,
    student_alike=0.4,
    moved=45.0,
    student_moved=50.0,
)
BLURRED = np.array([0.2, 0.5, 0.9, 1.0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "the defaults suit"),
        ({"moved": None}, "the defaults suit"),
        ({"gap": np.full(4, 1e-5)}, "changes nothing"),
        ({"copies": 0.3}, "no more like the targets"),
        ({"student_sharp": BLURRED}, r"first clean estimate is a blur \(0.20"),
        ({"moved": 5.0}, r"hardly follows its caption \(0.10"),
        (
            {"copies": 0.95, "alike": 0.97},
            r"copies its picture \(likeness 0.95.*, or the captions say all",
        ),
        # Its pictures are all alike because the student's are: that is not the teacher's doing.
        ({"copies": 0.95, "alike": 0.97, "student_alike": 0.97}, "the defaults suit"),
    ],
)
def test_the_advice_follows_from_the_numbers(changes, words):
    rows = [GOOD._replace(**changes)] * 2
    assert re.search(words, traits.recommendation(rows))


def test_every_row_has_a_line():
    lines = traits.describe([GOOD, GOOD._replace(moved=None)])
    assert lines[0] == "teacher: relative gap by step, 0.300 0.300 0.300 0.300"
    assert "student 0.800 0.900 1.000 1.000, teacher 0.900" in lines[1]
    assert lines[2].startswith("row 1: ") and lines[2].endswith(
        "teacher 45.0, student 50.0 (rms of 255)"
    )
    assert lines[3].endswith("not asked")


def test_obedience_is_of_all_rows_together():
    """One whose student hardly moves does not decide."""
    still = GOOD._replace(moved=3.0, student_moved=0.01)
    assert traits.obedience([GOOD, still]) == pytest.approx(48 / 50.01)
    assert traits.obedience([GOOD._replace(moved=None)]) is None


def test_of_ordinary_prompts_the_first_that_the_model_takes_is_the_other_caption():
    def features(role, text, pictures, options):
        if len(text) > 5:
            raise UserError(f"{text}: too long")
        asked.append((role, text, len(pictures), options))
        return {"text": np.zeros((len(text), 1), np.float32)}

    asked = []
    take = lambda texts: traits._first_taken(
        SimpleNamespace(features=features), texts, (PICTURES[:1], PICTURES[:2]), ({}, {"said": 1})
    )
    found = take(["too long", "short", "other"])
    assert found.text == "short"
    assert asked == [(0, "short", 1, {}), (1, "short", 2, {"said": 1})]
    with pytest.raises(UserError, match="also long"):
        take(["too long", "also long"])
