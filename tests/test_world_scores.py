"""The miniature's scorers on pictures whose scores are known: renderings, whole and spoilt."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageFilter

import dopsd_jax
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.flow import shifted_grid
from dopsd_jax.conditioning.encoding import STUDENT, TEACHER
from dopsd_jax.evaluation.drawing import Painter, Shot, without_adapters
from dopsd_jax.evaluation.scorer import PairScorer
from dopsd_jax.families.sampling import start_noise
from dopsd_jax.families.zimage import family
from dopsd_jax.miniature import captions, concepts, frechet, judge, world
from dopsd_jax.miniature import world_scorers as scores
from dopsd_jax.miniature.exam import Exam, table

COUNT, BATCH = 10, 4
LOOSE = {"bare": COUNT, "opened": COUNT}
TEACHER_OPTIONS = {"min_pixels": 64 * 64, "max_pixels": 128 * 128, "doubled_template": False}


@pytest.fixture(scope="module")
def concept():
    return world.random_concept(np.random.default_rng(3))


@pytest.fixture(scope="module")
def cases(concept):
    return scores.cases(concept, "dax", concepts=COUNT, ordinary=2 * COUNT, others=COUNT, **LOOSE)


def of_kind(cases, kind):
    return [case for case in cases if case.kind == kind]


def drawn(cases, scene=lambda s: s):
    """True pictures as a model draws them: places and sizes vary as captions leave them."""
    return list(world.pictures([scene(c.truth) for c in cases], np.random.default_rng(7)))


def blurred(images):
    blur = ImageFilter.GaussianBlur(1)
    return [np.asarray(Image.fromarray(image).filter(blur)) for image in images]


def recoloured(images):
    return [image[..., [1, 2, 0]] for image in images]


def score(name, images, cases):
    return float(np.mean(scores.scorers()[name]()(images, cases)))


def with_concept(concept):
    def change(scene):
        (thing,) = scene.things
        return dataclasses.replace(scene, things=(dataclasses.replace(thing, concept=concept),))

    return change


def test_the_true_rendering_has_full_marks(cases):
    for name, make in scores.scorers().items():
        scorer = make()
        own = of_kind(cases, scorer.kinds[0])
        if isinstance(scorer, PairScorer):
            features = scorer.features(drawn(own), own).reshape(COUNT // 2, 2, -1)
            np.testing.assert_array_equal(scorer.compare(features, features), 1)
            continue
        if name == "spread":
            assert scorer.distance(scorer.features(drawn(own), own), None) == pytest.approx(
                scorer.floor(own), rel=0.05
            )
            continue
        if name == "feature_FID":
            found = scorer.distance(scorer.features(drawn(own), own), scorer.reference(own))
            assert found < 1.5 * scorer.floor(own)
            continue
        assert score(name, drawn(own), own) == pytest.approx(1.0, abs=0.04), name


def test_iou_needs_shape_and_colours_and_sharp_edges_little(cases):
    own = of_kind(cases, "concept")
    other = with_concept(world.random_concept(np.random.default_rng(4)))
    assert score("concept_IoU", drawn(own, other), own) < 0.4
    assert score("concept_IoU", recoloured(drawn(own)), own) < 0.6
    assert score("concept_IoU", blurred(drawn(own)), own) > 0.85


@pytest.mark.parametrize("name", ["concept_crispness", "ordinary_crispness"])
def test_crispness_falls_with_blur_alone(cases, name):
    own = of_kind(cases, name.partition("_")[0])
    assert score(name, blurred(drawn(own)), own) < 0.75
    other = with_concept(world.random_concept(np.random.default_rng(4)))
    if name == "concept_crispness":
        assert score(name, drawn(own, other), own) > 0.75


@pytest.mark.parametrize("name", ["concept_contrast", "ordinary_contrast"])
def test_contrast_falls_with_haze_and_blur_costs_it_little(cases, name):
    own = of_kind(cases, name.partition("_")[0])
    haze = lambda image: np.round(0.6 * image + 0.4 * image.mean((0, 1))).astype(np.uint8)
    hazy = score(name, [haze(image) for image in drawn(own)], own)
    assert hazy == pytest.approx(0.6, abs=0.03)
    assert score(name, blurred(drawn(own)), own) > 0.85


def test_identity_does_not_ask_where_the_concept_stands(cases):
    """As `concept IoU` does; and it is the same under the bare word, which places nothing."""
    own = of_kind(cases, "concept")
    turn = lambda s: dataclasses.replace(
        s, things=(dataclasses.replace(s.things[0], place=(s.things[0].place + 1) % 5),)
    )
    assert score("identity", drawn(own, turn), own) > 0.95
    assert score("concept_IoU", drawn(own, turn), own) < 0.4
    bare = of_kind(cases, "bare")
    assert {case.prompt for case in bare} == {"a dax"}
    assert score("bare_identity", drawn(bare, turn), bare) > 0.95
    other = with_concept(world.random_concept(np.random.default_rng(4)))
    assert score("bare_identity", drawn(bare, other), bare) < 0.4


def test_place_kept_and_spread_see_places_alone(cases, concept):
    bare = of_kind(cases, "bare")
    at = lambda place: (
        lambda s: dataclasses.replace(s, things=(dataclasses.replace(s.things[0], place=place),))
    )
    kept, spread = scores.PlaceKept(), scores.Spread()
    features = lambda scorer, images: scorer.features(images, bare).reshape(COUNT, 1, -1)
    base = features(kept, drawn(bare))
    recoloured = features(
        kept, drawn(bare, with_concept(world.random_concept(np.random.default_rng(4))))
    )
    assert kept.compare(recoloured, base).mean() == 1
    same = [case.truth.things[0].place == 0 for case in bare]
    np.testing.assert_array_equal(
        kept.compare(features(kept, drawn(bare, at(0))), base)[:, 0], same
    )
    nothing = features(kept, [np.full((64, 64, 3), 230, np.uint8)] * COUNT)
    assert kept.compare(nothing, nothing).max() == 0
    assert spread.distance(spread.features(drawn(bare, at(0)), bare), None) < 0.1


def test_retention_asks_for_shape_and_colour_together(cases):
    own = of_kind(cases, "ordinary")
    images = drawn(own)
    half = [*recoloured(images[:COUNT]), *images[COUNT:]]
    assert score("retention", images, own) == 1
    assert score("named_shape", half, own) > 0.9
    assert score("retention", half, own) == score("named_colour", half, own) < 0.7


def test_a_short_caption_says_what_the_thing_is_alone(cases):
    for case in of_kind(cases, "open"):
        thing = case.truth.things[0]
        named = f"{list(world.COLOURS)[thing.colour]} {world.SHAPES[thing.shape]}"
        assert case.prompt == f"{'an' if named[0] == 'o' else 'a'} {named}"
        assert case.target is None


def test_named_attributes_are_told_apart(cases):
    """Another colour costs colour alone; the concept everywhere costs the shapes."""
    own = of_kind(cases, "ordinary")
    turn = lambda thing: dataclasses.replace(thing, colour=(thing.colour + 1) % 10, texture=0)
    other = lambda s: dataclasses.replace(s, things=(turn(s.things[0]),))
    assert score("named_colour", drawn(own, other), own) < 0.1
    assert score("named_shape", drawn(own, other), own) > 0.8
    concept = with_concept(world.random_concept(np.random.default_rng(3)))
    assert score("named_shape", drawn(own, concept), own) < 0.3  # of ten shapes one looks nearest


def test_a_leak_is_the_concept_under_another_word(cases):
    own = of_kind(cases, "other")
    assert all("dax" not in c.prompt.split() and c.target is None for c in own)
    assert len({c.prompt for c in own}) == len(own)
    known = {*captions.NEW_WORDS, *captions.nonce_words()}
    assert all(set(c.prompt.split()) & known for c in own)
    others = [world.random_concept(np.random.default_rng(s)) for s in range(20, 20 + COUNT)]
    images = [
        image
        for case, other in zip(own, others, strict=True)
        for image in drawn([case], with_concept(other))
    ]
    for name, most in (("leaked_colours", 0.5), ("leaked_concept", 0.35)):
        assert score(name, images, own) < most
        assert score(name, drawn(own), own) > 0.95


def test_fid_grows_with_every_kind_of_damage_and_with_how_many_are_damaged(cases):
    scorer = scores.FeatureFID()
    own = of_kind(cases, "ordinary")
    reference, floor = scorer.reference(own), scorer.floor(own)
    fid = lambda images: scorer.distance(scorer.features(images, own), reference)
    real = drawn(own)
    whole = fid(real)
    noisy = np.random.default_rng(0).normal(0, 12, np.shape(real)) + real
    absent = [np.full_like(image, image[0, 0]) for image in real]
    damage = {
        "blur": blurred(real),
        "hue": recoloured(real),
        "noise": list(noisy.clip(0, 255).astype(np.uint8)),
        "nothing there": absent,
        "all alike": [real[0]] * len(real),
    }
    for name, images in damage.items():
        half = [*images[: len(own) // 2], *real[len(own) // 2 :]]
        all_of_them = fid(images)
        assert floor * 2 < all_of_them, name
        assert whole < fid(half) < all_of_them, name


def test_frechet_is_the_formula():
    """Gaussians with commuting covariances: sum of squared differences of means and deviations."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, ddof=0)).T)
    turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    a = (x * [1, 2, 3, 4]) @ turn
    b = (x * [2, 2, 1, 5]) @ turn + 0.5
    assert frechet.frechet(a, b) == pytest.approx(4 * 0.25 + 1 + 0 + 4 + 1)
    assert frechet.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_no_test_arrangement_is_one_of_the_data_set(concept, tmp_path):
    folder = concepts.write_dataset(tmp_path / "dax", concept, "dax", count=6, seed=0)
    shown = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    arrangement = lambda s: (s.things[0].place, s.things[0].size, s.ground)
    made = concepts.arrangements(np.random.default_rng(0), concept, "dax", 6)
    grounds = len(world.suitable_grounds(made[0].things))
    every = scores.unseen(np.random.default_rng(1), concept, "dax", 10 * grounds - 6, shown)
    assert not set(map(arrangement, made)) & set(map(arrangement, every))
    with pytest.raises(UserError, match="are unseen; lower it"):
        scores.unseen(np.random.default_rng(1), concept, "dax", 500, shown)


def test_cases_follow_from_their_seed_and_say_all_that_is_judged(concept, cases):
    again = scores.cases(concept, "dax", concepts=COUNT, ordinary=2 * COUNT, others=COUNT, **LOOSE)
    assert [(c.prompt, c.seed) for c in again] == [(c.prompt, c.seed) for c in cases]
    other = scores.cases(concept, "dax", concepts=COUNT, ordinary=2 * COUNT, seed=1)
    assert [c.prompt for c in other] != [c.prompt for c in cases][: len(other)]
    assert len({c.seed for c in cases}) == len(cases)
    finish = {0: "flat", 1: "outline", 2: "shaded"}
    alone = scores.cases(concept, "dax", concepts=COUNT, ordinary=2 * COUNT, others=COUNT)
    assert [c.prompt for c in alone] == [c.prompt for c in cases][: len(alone)]
    for case in alone:
        assert finish[case.truth.finish] in case.prompt
        assert list(world.GROUNDS)[case.truth.ground] in case.prompt
        assert case.target is None or judge.iou(
            case.target[None], world.compose([case.truth], None)
        ) == [1.0]


# --- drawn by a model


@pytest.fixture(scope="module")
def pipe(random_model):
    return dopsd_jax.load_pipeline(str(random_model))


@pytest.mark.parametrize("role", [STUDENT, TEACHER])
def test_a_picture_is_the_pipelines_from_the_noise_of_its_seed(pipe, cases, role):
    """Whatever stands in the batch beside it."""
    painter = Painter(pipe, TEACHER_OPTIONS, BATCH)
    own = [cases[0], cases[COUNT], cases[1]]
    list(painter.encode(own, role))
    shots = [Shot(case, number) for case in own for number in (0, 1)][: BATCH + 1]
    found = list(painter.draw(pipe.split[1], shots, role))
    assert [shot for shot, _ in found] == shots
    if role == STUDENT:
        features = [pipe.features(STUDENT, s.case.prompt) for s in shots]
    else:
        bounds = {"min_pixels": 64 * 64, "max_pixels": 128 * 128}
        features = [pipe.features(TEACHER, s.case.prompt, [s.case.target], bounds) for s in shots]
    order = [4, 2, 0, 1]
    context = family.collate([features[i] for i in order], {"features": 64})
    noise = np.concatenate([start_noise(shots[i].seed, 1, (8, 8, 16)) for i in order])
    wanted = pipe.decode(pipe.sample(pipe.split[1], noise, context, shifted_grid(8, 3.0)))
    for i, image in zip(order, wanted, strict=True):
        assert np.abs(found[i][1].astype(int) - image).max() <= 1
    assert np.abs(found[0][1].astype(int) - found[1][1]).max() > 50, "the seed changes nothing"


def test_the_short_table_scores_any_weights_without_compiling_anew(pipe, concept):
    compiled = []
    listen = lambda event, seconds, **_: compiled.append(event) if "compile" in event else None
    asked = scores.cases(concept, "dax", concepts=BATCH, ordinary=2 * BATCH)
    exam = Exam(pipe, TEACHER_OPTIONS, asked)
    first = [exam.student("base", pipe.split[1]), exam.teacher("teacher", pipe.split[1])]
    jax.monitoring.register_event_duration_secs_listener(listen)
    again = [exam.student("tuned", pipe.split[1]), exam.teacher("teacher", pipe.split[1])]
    assert not compiled
    assert again[0][1:] == first[0][1:] and again[1] == first[1]
    assert again[1].retention is None and "-" in table(again)[2]


def test_without_adapters_nothing_of_them_is_left(random_model, lora_file):
    """Which makes a model the base, bit for bit (see test_lora.py); of whatever kind they are."""
    tuned = dopsd_jax.load_pipeline(str(random_model), lora=str(lora_file)).split[1]
    flat, off = (dict(nnx.to_flat_state(t)) for t in (tuned, without_adapters(tuned)))
    assert flat.keys() == off.keys() and {path[-1] for path in flat} == {"a", "b"}
    for path, leaf in flat.items():
        assert off[path][...].shape == leaf[...].shape and off[path][...].dtype == leaf[...].dtype
        assert np.asarray(leaf[...]).any() and not np.asarray(off[path][...]).any()
