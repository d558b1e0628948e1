"""Likeness with the arrangement factored out, on pictures whose likeness is known."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dopsd_jax.miniature import identity, judge, render, world

COUNT = 16


def arranged(rng, concepts):
    return [world.random_scene(rng, (world.random_thing(rng, c, "dax"),)) for c in concepts]


@pytest.fixture(scope="module")
def concepts():
    rng = np.random.default_rng(11)
    return [world.random_concept(rng) for _ in range(COUNT)]


@pytest.fixture(scope="module")
def asked(concepts):
    return world.compose(arranged(np.random.default_rng(1), concepts), None)


@pytest.fixture(scope="module")
def truth(concepts):
    """The same concepts, all elsewhere."""
    return world.compose(arranged(np.random.default_rng(2), concepts), np.random.default_rng(3))


@pytest.fixture(scope="module")
def images(truth):
    return render.render(truth)


def test_a_new_rendering_in_any_arrangement_is_the_concept(asked, truth, images):
    found = identity.find(images, asked)
    assert judge.iou(images, asked).mean() < 0.4, "the arrangements are not new"
    assert found.identity.mean() > 0.95 and found.identity.min() > 0.8
    # The shadings of the finishes shift the fit of small objects by part of a pixel.
    off = np.linalg.norm(found.scenes.objects.centre - truth.objects.centre, axis=-1)
    assert np.median(off) < 0.5 and off.max() < 1.5
    np.testing.assert_array_equal(found.scenes.ground, truth.ground)
    np.testing.assert_array_equal(found.scenes.ground_texture, truth.ground_texture)


def test_places_between_the_named_ones_cost_nothing(asked, truth):
    rng = np.random.default_rng(5)
    place = rng.uniform(20, 44, truth.objects.centre.shape).astype(np.float32)
    moved = dataclasses.replace(truth, objects=dataclasses.replace(truth.objects, centre=place))
    assert identity.find(render.render(moved), asked).identity.mean() > 0.95


def test_another_concept_is_far_below(asked, images):
    for shift in (1, 5):
        assert identity.find(np.roll(images, shift, 0), asked).identity.mean() < 0.3


@pytest.mark.parametrize(("part", "most"), [("outline", 0.65), ("colours", 0.4)])
def test_both_outline_and_colours_count(concepts, asked, part, most):
    rng = np.random.default_rng(4)
    half = [
        dataclasses.replace(a, outline=b.outline)
        if part == "outline"
        else dataclasses.replace(a, body=b.body, core=b.core)
        for a, b in zip(concepts, concepts[1:] + concepts[:1], strict=True)
    ]
    found = identity.find(world.pictures(arranged(rng, half)), asked)
    assert found.identity.mean() < most


def test_blur_costs_little_and_much_blur_much(asked, images):
    def blurred(radius):
        blur = ImageFilter.GaussianBlur(radius)
        return np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in images])

    little, much = (identity.find(blurred(r), asked).identity.mean() for r in (0.5, 3))
    assert little > 0.9 and much < 0.7


def test_a_second_thing_in_the_picture_is_a_fault(concepts, asked):
    rng = np.random.default_rng(6)
    left, right = list(world.PLACES).index("left"), list(world.PLACES).index("right")
    thing = lambda c, place: dataclasses.replace(
        world.random_thing(rng, c, "dax"), place=place, size=0
    )
    twice = [world.random_scene(rng, (thing(c, left), thing(c, right))) for c in concepts]
    found = identity.find(world.pictures(twice), asked).identity
    assert 0.35 < found.mean() < 0.6, "half of what is drawn is the concept"


def test_nothing_and_noise_are_no_concept(asked, images):
    nothing = render.render(identity.grounds(images))
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert identity.find(nothing, asked).identity.max() == 0
    assert identity.find(noise, asked).identity.max() < 0.1
    assert not identity.centres(nothing)[1].any()


def test_things_are_found_where_they_stand_whatever_they_are():
    rng = np.random.default_rng(8)
    scenes = [world.random_scene(rng, (world.random_thing(rng),)) for _ in range(48)]
    places, there = identity.centres(world.pictures(scenes, rng))
    assert there.all()
    wanted = np.array([scene.things[0].place for scene in scenes])
    np.testing.assert_array_equal(identity.named_places(places), wanted)
    true = identity.spread(world.CENTRES[wanted])
    assert identity.spread(places) == pytest.approx(true, rel=0.05)
    assert identity.spread(places[:1].repeat(4, 0)) == 0
