"""Mirrored and cropped pictures: rows of their own, decided by the data alone."""

import numpy as np
import pytest
from conftest import problems_of
from PIL import Image

from dopsd_jax.config.fields import declared, defaults
from dopsd_jax.data import measure as measure_module
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.dataset import describe
from dopsd_jax.data.images import crop_name, fit
from dopsd_jax.data.measure import measure
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.table import WHOLE, Table, View
from dopsd_jax.data.views import crop_box, cut, view_name, views_of
from dopsd_jax.run import data_set

SIZE, DIGEST = Bucket(64, 48), "5a" * 32
BOX = (4.044352585, 6.233602544, 136.988489364, 105.941705128)


def gradient(width=200, height=120):
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 0 * x], -1).astype(np.uint8)


def test_views_are_crops_and_each_mirrored():
    assert views_of() == (WHOLE,)
    assert views_of(2, True) == tuple(View(crop, side) for crop in (0, 1) for side in (False, True))
    assert views_of(levels=2) == (WHOLE, View(level=1))


def test_a_picture_is_used_at_every_resolution_that_it_fills(tmp_path):
    for name, size in (
        ("large", (200, 120)), ("middle", (100, 60)), ("small", (40, 36)), ("square", (64, 64)),
    ):  # fmt: skip
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    config = defaults()
    config.data.path, config.data.resolution = str(tmp_path), (64, 48, 96)
    levels = data_set.data_levels(config, 16)
    assert [max(own, key=lambda b: b.width * b.height) for own in levels] == [
        (48, 48), (64, 64), (96, 96)
    ]  # fmt: skip
    rows = load_rows(tmp_path, views=data_set.picture_views(config))
    dataset = measure(rows, data_set.data_buckets(config, 16), levels=levels)
    found = [next(i for i, own in enumerate(levels) if b in own) for b in dataset.buckets]
    assert found == [0, 1, 2, 0, 1, 1, 0, 0, 0, 0, 1, 1]  # of large, middle, small and square
    config.data.buckets = "64x64"
    assert "beside several numbers" in problems_of(data_set.data_levels, config, 16)[0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [("64,x", "whole number"), ("64,64", "twice"), ("64,0", "at least 1"), ("", "must be of kind")],
)
def test_a_list_of_resolutions_is_of_whole_numbers(text, fault):
    field = declared()["data.resolution"]
    assert field.parse("64, 96") == (64, 96) and field.parse("64") == 64
    assert field.fault([64, 96]) is None and field.fault(64) is None
    with pytest.raises(ValueError, match=fault):
        raise ValueError(field.fault(field.parse(text)))


def test_the_whole_picture_is_what_it_was_and_has_its_old_name():
    np.testing.assert_array_equal(cut(gradient(), SIZE, WHOLE, DIGEST), fit(gradient(), *SIZE))
    assert view_name(SIZE, WHOLE) == crop_name(*SIZE)
    names = {view_name(SIZE, view) for view in views_of(3, True)}
    assert len(names) == 6


@pytest.mark.parametrize("crop", [0, 1])
def test_a_mirrored_view_is_the_mirror_image(crop):
    one, other = (cut(gradient(), SIZE, View(crop, side), DIGEST) for side in (False, True))
    np.testing.assert_array_equal(one[:, ::-1], other)
    assert other.flags.c_contiguous and other.shape == (48, 64, 3)


def test_crops_are_at_many_places_and_always_the_same_ones():
    boxes = [crop_box(200, 120, SIZE, crop, DIGEST) for crop in range(1, 50)]
    assert boxes[0] == pytest.approx(BOX, abs=1e-9)  # must never change: caches have it
    assert len(set(boxes)) == 49
    assert boxes[0] != crop_box(200, 120, SIZE, 1, "5b" * 32)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 120
        assert (right - left) / (bottom - top) == pytest.approx(64 / 48)
        assert 0.8 * 120 - 1e-6 <= bottom - top <= 120
    image = cut(gradient(), SIZE, View(1), DIGEST)
    left, top, right, bottom = boxes[0]
    middle = (left + right) / 2 / 200 * 255, (top + bottom) / 2 / 120 * 255
    np.testing.assert_allclose(image.mean((0, 1))[:2], middle, atol=2)


@pytest.mark.parametrize("size", [(70, 50), (64, 48), (40, 32), (64, 500)])
def test_a_crop_has_the_bucket_s_pixels_where_the_picture_has_them(size):
    for crop in range(1, 20):
        left, _, right, _ = crop_box(*size, SIZE, crop, DIGEST)
        assert right - left >= min(64, size[0], size[1] * 4 / 3) - 1e-6
        assert cut(gradient(*size), SIZE, View(crop), DIGEST).shape == (48, 64, 3)


def test_every_view_is_a_row_and_a_picture_is_opened_once(tmp_path, monkeypatch):
    for name, text in (("a", "a mug on the left"), ("b", "a leftover")):
        Image.fromarray(gradient()).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    rows, plain = load_rows(tmp_path, views=views_of(2, True)), load_rows(tmp_path)
    assert [row.view for row in rows.rows] == [*views_of(2, True)] * 2
    assert [row.image.name for row in rows.rows] == ["a.png"] * 4 + ["b.png"] * 4
    assert any("captions of 1 rows name left or right" in note for note in rows.notes)
    looked, inspect = [], measure_module.inspect_image
    look = lambda picture, *args, **options: (
        looked.append(picture) or inspect(picture, *args, **options)
    )
    monkeypatch.setattr(measure_module, "inspect_image", look)
    dataset = measure(rows, [SIZE])
    assert len(looked) == 2 and len(dataset.buckets) == 8
    assert dataset.digest() != measure(plain, [SIZE]).digest()
    assert not any("share a picture" in line for line in describe(dataset, 1))
    (tmp_path / "b.png").write_bytes(b"x")
    assert len(problems_of(measure, rows, [SIZE])) == 1


def test_tables_keep_views():
    table = Table(("caption", "other"))
    for view in views_of(2, True):
        table.append("a.png", [("caption", "a"), ("other", "b")], view=view)
    assert [row.view for row in table] == [row.view for row in table.only(["other"])]
    assert [row.view for row in table] == [*views_of(2, True)]


def test_rows_that_edit_have_no_views():
    config = defaults()
    config.data.references, config.data.flip, config.data.crops = "auto", True, 2
    problems = problems_of(data_set.picture_views, config)
    assert len(problems) == 2 and "config.data.flip: is for rows that edit no" in problems[0]
