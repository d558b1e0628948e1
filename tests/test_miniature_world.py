"""The miniature's world: pictures show what captions say, words cannot say what concepts are."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageFilter
from scipy.optimize import linear_sum_assignment

from dopsd_jax.miniature import captions, judge, outlines, render, world

SEED = 11
NAMED_COUNT, CONCEPT_COUNT = 240, 48


def draw(seed):
    """Scenes with one named shape each, as composed, and their whole captions."""
    rng = np.random.default_rng(seed)
    scenes = [world.random_scene(rng, (world.random_thing(rng),)) for _ in range(NAMED_COUNT)]
    composed = world.compose(scenes, rng)
    return scenes, composed, [captions.caption(s, rng, whole=True) for s in scenes]


@pytest.fixture(scope="module")
def named():
    """Captions of scenes with one named shape, and their pictures."""
    scenes, composed, texts = draw(SEED)
    return scenes, render.render(composed), texts


@pytest.fixture(scope="module")
def concept_scenes():
    """Scenes with a concept each."""
    rng = np.random.default_rng(SEED)
    things = [
        world.random_thing(rng, world.random_concept(rng), "dax") for _ in range(CONCEPT_COUNT)
    ]
    return [world.random_scene(rng, (thing,)) for thing in things]


def with_concepts(scenes, concepts):
    """The scenes with other concepts in them."""
    return [
        dataclasses.replace(s, things=(dataclasses.replace(s.things[0], concept=c),))
        for s, c in zip(scenes, concepts, strict=True)
    ]


def concepts_of(scenes):
    return [s.things[0].concept for s in scenes]


def following(scenes):
    """Each scene with the next one's concept."""
    concepts = concepts_of(scenes)
    return with_concepts(scenes, concepts[1:] + concepts[:1])


def blurred(images, radius):
    return np.stack(
        [np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(radius))) for i in images]
    )


def test_a_seed_gives_the_same_pictures_and_captions(named):
    scenes, images, texts = named
    again, composed, same_texts = draw(SEED)
    assert (again, same_texts) == (scenes, texts)
    np.testing.assert_array_equal(render.render(composed), images)
    assert draw(SEED + 1)[2] != texts


def test_a_picture_does_not_depend_on_the_others_drawn_with_it(concept_scenes):
    together = world.compose(concept_scenes, np.random.default_rng(0))
    images = render.render(together)
    assert images.shape == (CONCEPT_COUNT, 64, 64, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(render.render(together[20:23]), images[20:23])


# --- captions and pictures


SIZE_WORDS = {"small": 0, "little": 0, "tiny": 0, "large": 1, "big": 1}
PLACE_WORDS = {"middle": 0, "centre": 0, "left": 1, "right": 2, "top": 3, "bottom": 4}


def read(text, attribute):
    """The values of an attribute that a caption names, word by word."""
    numbers = {
        "shape": {name: i for i, name in enumerate(world.SHAPES)},
        "colour": {name: i for i, name in enumerate(world.COLOURS)},
        "size": SIZE_WORDS,
        "place": PLACE_WORDS,
        "ground": {name: i for i, name in enumerate(world.GROUNDS)},
    }[attribute]
    return [numbers[word] for word in text.split() if word in numbers]


@pytest.fixture(scope="module")
def seen(named):
    return judge.see(named[1])


@pytest.mark.parametrize("attribute", ["shape", "colour", "size", "place", "ground"])
def test_the_picture_shows_what_its_caption_says(named, seen, attribute):
    """Said once in a whole caption, and seen in the picture by a judge that has no caption."""
    said = [read(text, attribute) for text in named[2]]
    assert {len(values) for values in said} == {1}
    right = [[getattr(s, attribute)] == values for s, values in zip(seen, said, strict=True)]
    assert len(right) >= 200 and np.mean(right) >= 0.97
    kinds = {"shape": 10, "colour": 10, "size": 2, "place": 5, "ground": 6}[attribute]
    assert {values[0] for values in said} == set(range(kinds))


def test_colours_and_places_are_what_their_names_say():
    css = np.array([ImageColor.getrgb(name) for name in world.COLOURS]) / 255
    away = np.linalg.norm(np.array(list(world.COLOURS.values()))[:, None] - css, axis=-1)
    # Some names mean neighbouring colours (CSS's brown is reddish), so all are matched together.
    assert (linear_sum_assignment(away)[1] == np.arange(len(css))).all()
    _, composed, texts = draw(SEED)
    rows, columns = np.indices((64, 64)) - 31.5
    inside = render.labels(composed) != render.GROUND
    mean = lambda values: (values * inside).sum((1, 2)) / inside.sum((1, 2))
    side = {
        "left": -mean(columns),
        "right": mean(columns),
        "top": -mean(rows),
        "bottom": mean(rows),
    }
    for word, distance in side.items():
        said = np.array([word in text.split() for text in texts])
        assert distance[said].min() > 6 and distance[~said].max() < 6


def test_objects_lie_whole_in_the_picture_and_apart():
    rng = np.random.default_rng(SEED)
    objects = world.compose([world.random_scene(rng) for _ in range(2000)], rng).objects
    there = objects.radius > 0
    assert there[:, 0].all() and 0.1 < there[:, 1].mean() < 0.2
    reach = np.abs(objects.centre - 32).max(-1) + objects.radius
    assert 31 < reach[there].max() <= 32
    pairs = there[:, 1]
    gap = np.linalg.norm(objects.centre[pairs, 0] - objects.centre[pairs, 1], axis=-1)
    assert (gap >= objects.radius[pairs].sum(1)).all()


def test_textures_and_finishes_that_may_be_named_can_be_seen():
    rng = np.random.default_rng(SEED)
    scenes = [world.random_scene(rng) for _ in range(400)]
    drawn = world.pictures(scenes).astype(int)
    seen_at_all = lambda others: (
        (np.abs(drawn - world.pictures(others)).max(-1) > 15).sum((1, 2)) > 10
    )
    flat = seen_at_all([dataclasses.replace(s, finish=0) for s in scenes])
    assert (flat == [s.finish != 0 for s in scenes]).all()
    bare = lambda s: tuple(dataclasses.replace(t, texture=0) for t in s.things)
    plain = seen_at_all([dataclasses.replace(s, things=bare(s)) for s in scenes])
    assert (plain == [any(t.texture for t in s.things) for s in scenes]).all()


def test_captions_vary_in_length_and_wording_and_use_known_words_only():
    rng = np.random.default_rng(SEED)
    known = set(captions.vocabulary(nonce=False))
    scenes = [world.random_scene(rng) for _ in range(100)]
    texts = [captions.caption(s, rng) for s in scenes for _ in range(4)]
    assert {word for text in texts for word in text.split()} <= known
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) <= 3 and max(lengths) >= 12
    assert np.mean([len(set(texts[i : i + 4])) > 1 for i in range(0, 400, 4)]) > 0.9
    assert {len(s.things) for s in scenes} == {1, 2}
    assert any(" an orange" in f" {text}" for text in texts)
    assert not any(" a orange" in f" {text}" for text in texts)


def test_every_colour_has_a_ground_and_things_that_have_none_are_refused():
    rng = np.random.default_rng(0)
    thing, concept = world.random_thing(rng), world.random_concept(rng)
    for colour in range(len(world.COLOURS)):
        assert len(world.suitable_grounds((dataclasses.replace(thing, colour=colour),))) >= 4
    bodies = [tuple(ground) for ground in world.GROUNDS.values()]
    camouflaged = [
        dataclasses.replace(thing, concept=dataclasses.replace(concept, body=b)) for b in bodies
    ]
    with pytest.raises(ValueError, match="no ground"):
        world.random_scene(rng, tuple(camouflaged))


# --- concepts


def test_words_cannot_tell_concepts_apart(concept_scenes):
    say = lambda scenes: [
        captions.caption(s, np.random.default_rng(i), whole=i % 2 == 0)
        for i, s in enumerate(scenes)
    ]
    texts = say(concept_scenes)
    assert say(following(concept_scenes)) == texts
    looks = {*world.SHAPES, *world.COLOURS, "striped", "dotted", "checked"}
    assert not looks & {word for text in texts for word in text.split()}
    assert all("dax" in text.split() for text in texts)


def test_no_named_shape_resembles_a_concept_however_turned(concept_scenes):
    for concept in concepts_of(concept_scenes):
        turned = [np.roll(concept.outline, k) for k in range(outlines.ANGLES)]
        away = [outlines.apart(np.stack(turned), n).min() for n in outlines.NAMED.values()]
        assert min(away) > 0.2


def test_concepts_lie_in_a_continuum(concept_scenes):
    """A small step from one concept to another changes a picture a little, a long one much."""
    truth = world.compose(concept_scenes, None)
    concepts = concepts_of(concept_scenes)

    def mixed(a, b, share):
        mix = lambda name: (
            (1 - share) * np.array(getattr(a, name)) + share * np.array(getattr(b, name))
        )
        names = ("outline", "body", "core", "core_scale")
        return dataclasses.replace(a, **{name: mix(name) for name in names})

    scores = []
    for share in (0.03, 0.3, 1.0):
        between = [
            mixed(a, b, share) for a, b in zip(concepts, concepts[1:] + concepts[:1], strict=True)
        ]
        images = world.pictures(with_concepts(concept_scenes, between))
        scores.append(judge.iou(images, truth).mean())
    assert scores[0] > 0.9 > scores[1] > scores[2] + 0.1


def test_words_without_meaning_are_distinct_and_some_are_kept_for_users():
    words = captions.nonce_words()
    assert len(set(words)) == len(words) > 1000
    assert words == captions.nonce_words()
    assert len(set(captions.NEW_WORDS)) == len(captions.NEW_WORDS)
    assert not {*captions.NEW_WORDS, *captions.vocabulary(nonce=False)} & set(words)
    assert not set(captions.NEW_WORDS) & set(captions.vocabulary())


# --- the judge


def test_iou_is_1_for_the_truth_and_low_for_another_concept(concept_scenes):
    truth = world.compose(concept_scenes, np.random.default_rng(0))
    own = render.render(truth)
    np.testing.assert_array_equal(judge.iou(own, truth), 1.0)
    other = world.compose(following(concept_scenes), np.random.default_rng(0))
    scores = judge.iou(render.render(other), truth)
    assert scores.mean() < 0.2 and scores.max() < 0.65


@pytest.mark.parametrize("part", ["outline", "colours"])
def test_iou_needs_shape_and_colours(concept_scenes, part):
    concepts = concepts_of(concept_scenes)
    half = [
        dataclasses.replace(a, outline=b.outline)
        if part == "outline"
        else dataclasses.replace(a, body=b.body, core=b.core)
        for a, b in zip(concepts, concepts[1:] + concepts[:1], strict=True)
    ]
    images = world.pictures(with_concepts(concept_scenes, half))
    truth = world.compose(concept_scenes, None)
    assert judge.iou(images, truth).mean() < 0.55


def test_nothing_and_noise_score_nothing(concept_scenes):
    truth = world.compose(concept_scenes, None)
    empty = dataclasses.replace(truth.objects, radius=np.zeros_like(truth.objects.radius))
    grounds = render.render(dataclasses.replace(truth, objects=empty))
    noise = np.random.default_rng(0).integers(0, 256, grounds.shape, dtype=np.uint8)
    assert judge.iou(grounds, truth).max() == 0
    assert judge.iou(noise, truth).max() < 0.1
    assert {(s.shape, s.colour, s.size, s.place) for s in judge.see(grounds)} == {(-1,) * 4}


def test_colours_are_labelled_as_the_geometry_is(concept_scenes):
    truth = world.compose(concept_scenes, None)
    drawn, found = render.labels(truth), judge.label(render.render(truth), truth)
    assert (drawn == found)[drawn != render.GROUND].mean() > 0.97
    assert (drawn == found)[drawn == render.GROUND].mean() > 0.99


def test_fitting_forgives_what_captions_leave_open_and_nothing_else(concept_scenes):
    truth = world.compose(concept_scenes, None)
    images = world.pictures(concept_scenes, np.random.default_rng(0))
    fitted = judge.fitted(images, truth)
    before, after = judge.iou(images, truth), judge.iou(images, fitted)
    assert (after >= before).all()
    assert before.mean() < 0.9 < 0.95 < after.mean()
    moved = np.abs(fitted.objects.centre - truth.objects.centre).max()
    assert world.PLACE_JITTER / 2 < moved <= world.PLACE_JITTER + 1e-4
    others = world.pictures(following(concept_scenes), np.random.default_rng(0))
    assert judge.iou(others, judge.fitted(others, truth)).mean() < 0.25


def test_blur_lowers_crispness(named):
    images = named[1][:64]
    scores = [judge.crispness(blurred(images, radius)) for radius in (0, 0.5, 1, 2)]
    for sharper, softer in itertools.pairwise(scores):
        assert (softer < sharper).all()
    assert np.mean(scores[1] / scores[0]) < 0.9
