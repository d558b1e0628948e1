"""Masks: only what is white counts, wherever the picture goes, with every method."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import problems_of, relative_error
from methods_step import CASE, GET_CONFIG
from PIL import Image
from test_baselines import GRID, LEVELS, NET, SHAPE, equal, nodes, world

from dopsd_jax import dopsd
from dopsd_jax.data.buckets import Bucket, make_buckets
from dopsd_jax.data.dataset import describe
from dopsd_jax.data.masks import cut_mask, open_mask, region
from dopsd_jax.data.measure import measure
from dopsd_jax.data.picture_index import PictureIndex
from dopsd_jax.data.rows import load_rows, load_sets
from dopsd_jax.data.table import View
from dopsd_jax.data.views import cut
from dopsd_jax.estimation.abstract_step import make_program
from dopsd_jax.methods import baselines, flow_matching
from dopsd_jax.methods.distance import Decoupled
from dopsd_jax.methods.method import Teacher
from dopsd_jax.parallel import sharding
from dopsd_jax.training import state, train_step

SIZE, DIGEST = Bucket(64, 48), "5a" * 32
PREFERENCE = baselines.Preference(5.0, 1.0, 0.5, "student")
HALF = np.zeros((*SHAPE[:3], 1), np.float32)
HALF[:, :2] = 2.0  # the upper half of a frame counts


class Draws(NamedTuple):
    """Of D-OPSD: where a rollout starts."""

    start: jax.Array


def dopsd_loss(distance, student, teacher, base, batch, draws):
    return dopsd.loss_and_gradient(
        NET, student, teacher, base, batch.contexts, draws.start, nodes(), distance=distance,
        region=batch.region,
    )  # fmt: skip


METHODS = {
    "dopsd": functools.partial(dopsd_loss, dopsd.mean_square),
    "decoupled": functools.partial(dopsd_loss, Decoupled(0.5, 0.3)),
    "sft": lambda s, t, base, *rest: baselines.sft(NET, s, base, *rest, LEVELS),
    "sft_teacher": lambda *args: baselines.sft_teacher(NET, *args, LEVELS, GRID),
    "dreambooth": lambda *args: baselines.dreambooth(NET, *args, LEVELS, GRID, 0.7),
    "offpolicy": lambda *args: baselines.offpolicy(NET, *args, nodes(), "teacher"),
    "targets": lambda *args: baselines.offpolicy(NET, *args, nodes(), "targets"),
    "pso": lambda *args: baselines.pso(NET, *args, nodes(), GRID, PREFERENCE),
}


def run(name, region, seed=0, target=None):
    base, student, teacher, batch, draws = world(seed)
    batch = batch._replace(region=region, target=batch.target if target is None else target)
    return jax.jit(METHODS[name])(student, teacher, base, batch, draws)


@pytest.mark.parametrize("name", METHODS)
def test_a_white_mask_changes_nothing_and_another_one_does(name):
    plain, white = run(name, None), run(name, np.ones((*SHAPE[:3], 1), np.float32))
    for own, other in zip(jax.tree.leaves(plain), jax.tree.leaves(white), strict=True):
        assert relative_error(own, other) < 1e-6  # programs round differently
    assert relative_error(run(name, HALF)[0].total, plain[0].total) > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_the_gap_is_the_mean_over_rows_that_count(name):
    """As the batches of held-out rows say it, which are filled up."""
    weights = 3 * np.eye(3, dtype=np.float32)[..., None, None, None]
    alone = [run(name, own * np.ones((*SHAPE[:3], 1), np.float32))[0].mse for own in weights]
    assert relative_error(np.mean(alone, 0), run(name, None)[0].mse) < 1e-6
    assert np.std(alone, 0).min() > 1e-3


def test_what_is_black_has_no_gradient():
    target = np.array(world()[3].target)
    target[:, 2:] += 5.0  # noised, it changes no state where the mask is white: the toy is local
    (one, of_one), (other, of_other) = run("sft", HALF), run("sft", HALF, target=target)
    equal(of_one, of_other)
    equal(one.total, other.total)
    assert relative_error(run("sft", None, target=target)[0].total, one.total) > 0.1


def test_micro_batches_keep_their_own_masks():
    """A step of rate 1 takes away the mean of their gradients."""
    base, student, _, batch, _ = world()
    own = lambda *args: dopsd_loss(dopsd.mean_square, *args)
    loss = lambda s, t, base, batch, noise, key: own(s, t, base, batch, Draws(noise))
    tx, teacher, start = optax.sgd(1.0), Teacher("frozen"), jax.tree.map(jnp.copy, student)
    step = train_step.make_step(loss, tx, teacher, lambda _: 1.0, 0)
    alone = [batch._replace(region=region) for region in (HALF, HALF[:, ::-1])]
    stacked = jax.tree.map(lambda *own: jnp.stack(own), *alone)
    now, metrics = step(state.create(student, teacher, tx), base, stacked, latent=SHAPE)
    found = []
    for number, one in enumerate(alone):
        key = jax.random.fold_in(state.step_key(0, 0), number)
        noise = flow_matching.start_noise(jax.random.split(key)[0], SHAPE)
        found.append(loss(start, start, base, one, noise, None))
    (first, of_first), (second, of_second) = found
    assert relative_error(metrics["loss"], (first.total + second.total) / 2) < 1e-5
    for name, old in start.items():
        mean = (of_first[name] + of_second[name]) / 2
        assert relative_error(old - now.student[name], mean) < 1e-4
        assert relative_error(of_first[name], of_second[name]) > 0.1


@pytest.mark.parametrize("distance", [dopsd.mean_square, Decoupled(), Decoupled(0.5, 0.3)])
def test_a_black_half_is_as_if_the_frame_ended_there(distance):
    p, t = (jax.random.normal(jax.random.key(i), SHAPE) for i in (0, 1))
    cut_off = distance(p[:, :2], t[:, :2])
    assert relative_error(distance(p, t, HALF), cut_off) < 1e-5


def test_the_loss_is_the_mean_with_the_masks_weights():
    cells = np.array([[255, 255, 51, 0]], np.uint8)
    weights = np.array([1, 1, 0.2 + 0.8 * 0.0, 0])
    np.testing.assert_allclose(
        region(cells, 0.0)[0, :, 0], [4 / 2.2, 4 / 2.2, 0.8 / 2.2, 0], rtol=1e-6
    )
    weights = np.array([1, 1, 0.5 + 0.5 * 0.2, 0.5])
    found = region(cells, 0.5)
    np.testing.assert_allclose(found[0, :, 0], weights / weights.mean(), rtol=1e-6)
    p, t = (jax.random.normal(jax.random.key(i), (1, 1, 4, 3)) for i in (0, 1))
    by_hand = np.average(np.mean((p - t) ** 2, -1)[0, 0], weights=weights)
    assert relative_error(dopsd.mean_square(p, t, found[None]), by_hand) < 1e-6
    assert not region(np.zeros((2, 2), np.uint8), 0.5).any()


@pytest.mark.parametrize("view", [View(), View(mirrored=True), View(1), View(2, True)])
def test_a_mask_goes_where_its_picture_goes(view):
    brightness = np.random.default_rng(0).integers(0, 256, (15, 25)).astype(np.uint8)
    brightness = np.kron(brightness, np.ones((8, 8), np.uint8))
    picture = cut(np.stack([brightness] * 3, -1), SIZE, view, DIGEST)[..., 0]
    found = cut_mask(brightness, SIZE, view, DIGEST, 8)
    expected = picture.reshape(6, 8, 8, 8).mean((1, 3))
    np.testing.assert_allclose(found, expected, atol=0.51)
    assert expected.std() > 10


def folder(tmp_path, **masks):
    """Pictures a, b with captions; masks by file name: a number, or an array."""
    tmp_path.mkdir(exist_ok=True)
    for name in "ab":
        Image.new("RGB", (64, 48), (len(name), 9, 9)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name}")
    for name, values in masks.items():
        path = tmp_path / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return tmp_path


def left_half(height=48, width=64):
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return mask


def open_folder(path, kind="files", index=None):
    rows = load_rows(path, masks=kind == "files")
    return measure(rows, [SIZE], masked=kind, index=index)


@pytest.mark.parametrize("name", ["a_mask", "a-masklabel", "mask__a", "masks__a"])
def test_masks_are_found_and_are_no_pictures(tmp_path, name):
    folder(tmp_path, **{name: left_half()})
    file = tmp_path / f"{name.replace('__', '/')}.png"
    file.with_suffix(".txt").write_text("a mask, with a caption")
    data = open_folder(tmp_path)
    assert [row.mask for row in data.rows] == [file, None]
    assert data.masks[0] and not data.masks[1]
    assert not any("masks and condition pictures" in note for note in data.notes)
    assert any("masks: 1 of 2 rows have one; of 1 without" in line for line in describe(data, 1))
    np.testing.assert_array_equal(open_mask(data.rows[0]), left_half())


def test_another_mask_is_another_data_set(tmp_path):
    folder(tmp_path, a_mask=left_half())
    one = open_folder(tmp_path)
    Image.fromarray(left_half()[:, ::-1]).save(tmp_path / "a_mask.png")
    other = open_folder(tmp_path)
    assert one.masks != other.masks and one.digest() != other.digest()
    plain = measure(load_rows(tmp_path), [SIZE])
    assert plain.masks == () and plain.digest() not in (one.digest(), other.digest())


def test_transparency_is_a_mask(tmp_path):
    folder(tmp_path)
    rgba = np.full((48, 64, 4), 200, np.uint8)
    rgba[..., 3] = left_half()
    Image.fromarray(rgba).save(tmp_path / "a.png")
    data = open_folder(tmp_path, "alpha", PictureIndex(None))
    assert data.masks[0] and not data.masks[1]
    np.testing.assert_array_equal(open_mask(data.rows[0]), left_half())


def test_all_faulty_masks_are_named_at_once(tmp_path):
    folder(tmp_path, a_mask=np.zeros((48, 64)), b_mask=left_half(40))
    problems = problems_of(open_folder, tmp_path)
    assert len(problems) == 2
    assert "a_mask.png: is black everywhere" in problems[0]
    assert "b_mask.png: is 64x40, and its picture" in problems[1] and "64x48" in problems[1]
    (tmp_path / "a_mask.png").write_bytes(b"no picture")
    coloured = np.zeros((48, 64, 3), np.uint8)
    coloured[..., 0] = 255
    Image.fromarray(coloured).save(tmp_path / "b_mask.png")
    unreadable, with_colours = problems_of(open_folder, tmp_path)
    assert "a_mask.png: is not a picture" in unreadable
    assert "b_mask.png: has colours" in with_colours


def test_masks_that_are_not_there_or_there_twice(tmp_path):
    folder(tmp_path)
    assert "no picture has a mask" in problems_of(load_rows, tmp_path, masks=True)[0]
    folder(tmp_path, a_mask=left_half(), masks__a=left_half())
    assert "has several masks" in problems_of(load_rows, tmp_path, masks=True)[0]


def test_one_of_several_sets_may_have_no_masks(tmp_path):
    """All of its pictures count."""
    folder(tmp_path / "a", a_mask=left_half())
    folder(tmp_path / "b")
    paths = [str(tmp_path / name) for name in "ab"]
    found = load_sets(paths, (), masks=True)
    data = measure(found, make_buckets(64), masked="files")
    assert [bool(mask) for mask in data.masks] == [True, False, False, False]
    (problem,) = problems_of(load_sets, paths[1:], (), masks=True)
    assert f"{paths[1]}: config.data.masks = files, and no picture has a mask" in problem
    folder(tmp_path / "c")
    (problem,) = problems_of(load_sets, [paths[1], str(tmp_path / "c")], (), masks=True)
    assert f"{paths[1]}, {tmp_path / 'c'}: config.data.masks" in problem


def test_a_step_without_masks_is_given_no_arrays_for_them():
    found = []
    for kind in ("off", "files"):
        config = GET_CONFIG("random")
        config.data.masks = kind
        mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
        with jax.set_mesh(mesh):
            found.append(make_program(config, CASE, mesh, "cpu").batch.region)
    assert found[0] is None
    assert found[1].shape == (config.accumulate, config.batch_size, *CASE.latent, 1)
