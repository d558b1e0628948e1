"""Grids show whole pictures in the right places, with their labels."""

import numpy as np
import pytest
from PIL import Image
from shape_checks import unchecked

from dopsd_jax.common.errors import UserError
from dopsd_jax.reporting import pictures
from dopsd_jax.reporting.pictures import (
    GridRow,
    grid,
    read_labels,
    sample_files,
    sample_path,
    save_grid,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(h, w, colour):
    return np.full((h, w, 3), colour, np.uint8)


def boxes(sheet, colour):
    """Left, top, width and height of the area with a colour (nearly: resampling rings)."""
    pixels = np.asarray(sheet).astype(int)
    ys, xs = np.nonzero(np.abs(pixels - colour).max(-1) < 8)
    return xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1


def test_pictures_keep_their_aspect_and_stand_in_their_columns():
    rows = [
        GridRow("first", [flat(64, 32, RED), flat(64, 64, GREEN)]),
        GridRow("second", [flat(20, 80, BLUE), None]),
    ]
    sheet = grid(["base", "target"], rows, cell=128)
    red, green, blue = (boxes(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert red[2:] == (64, 128) and green[2:] == (128, 128) and blue[2:] == (128, 32)
    assert red[0] == blue[0] + 32  # centred in its column
    assert green[0] == blue[0] + 128 + pictures.GAP
    assert red[1] == green[1] and blue[1] > red[1] + 128


def test_large_pictures_are_made_smaller_not_cropped():
    image = flat(600, 900, RED)
    image[:, :30] = GREEN
    image[:, -30:] = BLUE
    sheet = grid(["a"], [GridRow("", [image])], cell=150)
    assert boxes(sheet, GREEN)[2] >= 4 and boxes(sheet, BLUE)[2] >= 4
    x, _, _, h = boxes(sheet, GREEN)
    assert h == 100 and boxes(sheet, BLUE)[0] + boxes(sheet, BLUE)[2] - x == 150


def test_headers_title_and_captions_are_drawn():
    row = [flat(50, 50, RED)]
    ink = lambda sheet: int((np.asarray(sheet).max(-1) < 200).sum())
    bare = grid([""], [GridRow("", row)], cell=100)
    assert ink(bare) == 0
    assert ink(grid(["tuned"], [GridRow("", row)], cell=100)) > 20
    assert ink(grid([""], [GridRow("a red square", row)], cell=100)) > 20
    assert ink(grid([""], [GridRow("", row)], title="step 5", cell=100)) > 20
    assert ink(grid([""], [GridRow("", row)], notes=["identity 0.8"], cell=100)) > 20


def test_captions_take_two_lines_at_most_and_stay_inside():
    for caption in ("word " * 500, "x" * 500, "line\nbreaks\n" * 50):
        sheet = grid(["a", "b"], [GridRow(caption, [flat(9, 9, RED)] * 2)], cell=200)
        one = grid(["a", "b"], [GridRow("short", [flat(9, 9, RED)] * 2)], cell=200)
        assert sheet.height - one.height < 25 and sheet.width == one.width
        margin = np.asarray(sheet)[:, -pictures.MARGIN // 2 :]
        assert (margin == 255).all()
    lines = pictures._wrap("word " * 500, 300, 14)
    assert len(lines) == 2 and lines[0].endswith("word") and lines[1].endswith("...")
    assert pictures._wrap("", 300, 14) == [] and pictures._wrap("a b", 300, 14) == ["a b"]


def test_letters_that_no_font_has_are_not_drawn_as_boxes(monkeypatch):
    monkeypatch.setattr(pictures, "OTHER_FONTS", ("no such font.ttf",))
    assert pictures._typable("fox 狐狸 in snow") == "fox  in snow"
    assert "no installed font" in pictures._typable("一只红色的狐狸")
    assert pictures._typable("café naïve") == "cafe naive"


def test_files_carry_whole_labels(tmp_path):
    path = sample_path(tmp_path, 120)
    caption = "狐狸 <b> " + "long " * 300
    save_grid(path, ["base", "tuned"], [GridRow(caption, [flat(8, 8, RED)] * 2)], title="step 120")
    with Image.open(path) as image:
        labels = read_labels(image)
        assert image.format == "PNG"
    assert labels.title == "step 120" and labels.columns == ("base", "tuned")
    assert labels.captions == (caption,)
    assert [p.name for p in path.parent.iterdir()] == ["step_000120.png"]
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    with Image.open(tmp_path / "other.png") as image:
        assert read_labels(image) is None


def test_pictures_can_be_cut_out_again(tmp_path):
    """Enlarged ones as they were; others as the grid shows them."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    small, odd, large = noise[:64, :48], noise[:100, :77], flat(90, 300, RED)
    rows = [GridRow("first", [small, None]), GridRow("second", [large, odd])]
    save_grid(tmp_path / "grid.png", ["a", "b"], rows, title="t", cell=220)
    with Image.open(tmp_path / "grid.png") as sheet:
        (first, none), (second, third) = read_labels(sheet).cells
        assert none is None
        assert (np.asarray(first.cut(sheet)) == small).all()
        assert (np.asarray(third.cut(sheet)) == odd).all()
        made_smaller = np.asarray(second.cut(sheet))
    assert made_smaller.shape == (66, 220, 3) and (made_smaller == RED).all()


def test_sample_files_are_in_the_order_of_steps(tmp_path):
    assert sample_files(tmp_path) == []
    for step in (2_000_000, 5, 40):
        save_grid(sample_path(tmp_path, step), ["a"], [GridRow("", [flat(4, 4, RED)])], cell=16)
    (tmp_path / "samples" / "step_x.png").write_bytes(b"")
    assert [step for step, _ in sample_files(tmp_path)] == [5, 40, 2_000_000]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    save_grid(path, ["a"], [GridRow("", [flat(4, 4, RED)])], cell=16)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"grid\.png: the disk is full"):
        save_grid(path, ["a"], [GridRow("", [flat(4, 4, BLUE)])], cell=16)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "images",
    [[flat(4, 4, RED)], [flat(4, 4, RED).astype(float)] * 2, [flat(4, 4, RED)[..., 0]] * 2],
)
def test_wrong_pictures_are_refused(images):
    with pytest.raises(ValueError, match="row 0"), unchecked():
        grid(["a", "b"], [GridRow("", images)])


@pytest.mark.parametrize(
    "labels",
    ["", "[", "[]", "null", '{"title": 1}', '{"title": "", "columns": 3, "captions": []}',
     '{"title": "", "columns": ["a"], "captions": [null], "cells": [[null]]}',
     *(f'{{"title": "", "columns": ["a"], "captions": [""], "cells": {cells}}}' for cells in (
         "3", "[]", "[[]]", "[[3]]", "[[[0, 0, 9, 8, 1, 1]]]", "[[[0, 0, 0, 8, 1, 1]]]",
         "[[[0, 0, 4, 4, 1]]]", "[[[0, 0, 4, 4, 1, 0]]]", "[[[-1, 0, 4, 4, 1, 1]]]",
         "[[[0, 0, 4, 4.0, 1, 1]]]"))],
)  # fmt: skip
def test_labels_that_are_none_are_left_out(labels):
    image = Image.new("RGB", (8, 8))
    image.text = {pictures.LABELS: labels}
    assert read_labels(image) is None
