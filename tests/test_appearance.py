"""What is measured of any picture: each damage lowers its own score."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dopsd_jax.evaluation import appearance
from dopsd_jax.evaluation.appearance import CompositionKept, contrast, crispness
from dopsd_jax.evaluation.prompts import ORDINARY
from dopsd_jax.evaluation.scorer import Case, PairScorer, Scorer, SetScorer

SIDE = 64


def pictures(seed, count, height=SIDE, width=SIDE):
    """Coloured discs somewhere on coloured grounds."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    found = []
    for _ in range(count):
        inside = np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width)) < height / 4
        colours = rng.integers(0, 256, (2, 1, 1, 3))
        found.append(np.where(inside[..., None], *colours).astype(np.uint8))
    return np.stack(found)


def blurred(images):
    blur = ImageFilter.GaussianBlur(1)
    return np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in images])


def hazy(images, share):
    """Mixed with their mean colours."""
    mean = images.mean((1, 2), keepdims=True)
    return np.round(images + share * (mean - images)).astype(np.uint8)


def test_blur_costs_edges_and_haze_contrast():
    images = pictures(0, 8)
    assert (crispness(blurred(images)) / crispness(images)).mean() < 0.8
    assert (contrast(blurred(images)) > 0.9 * contrast(images)).all()
    for share in (0.2, 0.5):
        ratio = contrast(hazy(images, share)) / contrast(images)
        np.testing.assert_allclose(ratio, 1 - share, atol=0.02)
    assert contrast(np.full((1, SIDE, SIDE, 3), 90, np.uint8)) == pytest.approx(0, abs=1e-4)


def test_contrast_is_the_root_mean_square_of_colour():
    halves = np.zeros((1, 8, 8, 3), np.uint8)
    halves[:, :4, :, 0] = 255
    assert contrast(halves) == pytest.approx(0.5)


def test_crispness_is_the_mean_change_at_the_steepest_of_twenty_pixels():
    """Red changes at one column, green at one row: 1 along both, and more where they cross."""
    image = np.zeros((1, 21, 21, 3), np.uint8)
    image[:, :, 9:, 0], image[:, 13:, :, 1] = 255, 255
    assert crispness(image) == pytest.approx((19 + 2**0.5) / 20)  # 20 of the 400 changes


def compared(own, base):
    """By prompt, as an evaluation does it."""
    scorer = CompositionKept()
    flat = lambda images: images.reshape(-1, *images.shape[2:])
    features = [scorer.features(list(flat(images)), []) for images in (own, base)]
    return scorer.compare(*(f.reshape(*own.shape[:2], -1) for f in features))


@pytest.fixture(scope="module")
def base():
    return pictures(1, 48).reshape(12, 4, SIDE, SIDE, 3)


def test_the_same_picture_is_1_and_another_0(base):
    np.testing.assert_allclose(compared(base, base), 1)
    other = pictures(2, 48).reshape(base.shape)
    assert compared(other, base).mean() == pytest.approx(0, abs=0.12)
    half = np.concatenate([base[:6], other[6:]])
    assert compared(half, base).mean() == pytest.approx(0.5, abs=0.1)


def test_other_noise_costs_composition_though_the_set_is_the_same(base):
    moved = np.roll(base, 1, axis=1)
    assert compared(moved, base).mean() < 0.05


def test_what_is_finer_than_a_cell_is_no_composition(base):
    soft = blurred(base.reshape(-1, SIDE, SIDE, 3)).reshape(base.shape)
    noise = np.random.default_rng(3).normal(0, 10, base.shape)
    rough = (base + noise).clip(0, 255).astype(np.uint8)
    assert compared(soft, base).min() > 0.9 and compared(rough, base).min() > 0.9


def test_a_base_without_variety_gives_a_number_still(base):
    alike = np.repeat(base[:, :1], 4, axis=1)
    np.testing.assert_allclose(compared(alike, alike), 1)
    assert np.isfinite(compared(base, alike)).all() and compared(base, alike).mean() < -1


def test_pictures_may_have_any_size():
    wide = list(pictures(5, 2, 48, 80))
    found = CompositionKept().features(wide, [])
    assert found.shape == (2, 3 * appearance.CELLS**2)
    np.testing.assert_allclose(found.mean(), np.mean(wide) / 255, atol=0.01)


def test_each_is_a_scorer_of_its_kind():
    made = {name: make() for name, make in appearance.scorers().items()}
    assert [type(scorer).__name__ for scorer in made.values()].count("OnePicture") == 2
    case = Case(ORDINARY, "a", "a", SIDE, SIDE, 0)
    for name in ("crispness", "contrast"):
        assert isinstance(made[name], Scorer) and not isinstance(made[name], SetScorer)
        assert len(made[name](list(pictures(0, 2)), [case] * 2)) == 2
    composition = made["composition"]
    assert isinstance(composition, PairScorer) and not isinstance(composition, SetScorer)
    assert composition.kinds == (ORDINARY,) and composition.least == 2
