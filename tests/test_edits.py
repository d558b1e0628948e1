"""Rows that edit pictures: read from tables and folders, put into batches, given to both roles."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import problems_of
from PIL import Image

from dopsd_jax.common.errors import UserError
from dopsd_jax.config.fields import defaults
from dopsd_jax.data.buckets import Bucket, Shape, parse_buckets
from dopsd_jax.data.loader import Batches
from dopsd_jax.data.measure import measure
from dopsd_jax.data.rows import load_rows
from dopsd_jax.families.flux2_klein import family as klein
from dopsd_jax.families.flux2_klein.references import reference_size
from dopsd_jax.families.zimage import family as zimage
from dopsd_jax.run import data_set

BUCKETS = parse_buckets(["96x96", "128x64"])


def picture(path, width=96, height=96):
    path.parent.mkdir(parents=True, exist_ok=True)
    number = sum(path.name.encode())
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def table(folder, rows):
    path = folder / "edits.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def names(rows):
    return [(row.image.name, [path.name for path in row.references]) for row in rows.rows]


def size_of(bucket, height, width, where):
    height, width = reference_size(height, width, 1024 * 1024, 16, where)
    return Bucket(width, height)


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("row", "references", "expected"),
    [
        ({"local_path_list": ["a.png", "b.png", "c.png"]}, ["auto"], ["a.png", "b.png"]),
        ({"target_image": "c.png", "source_images": ["b.png", "a.png"]}, ["auto"],
         ["b.png", "a.png"]),
        ({"image": "c.png", "edit_image": "a.png"}, ["auto"], ["a.png"]),
        ({"image": "c.png", "control_path_1": "b.png", "control_path_0": "a.png"}, ["auto"],
         ["a.png", "b.png"]),
        ({"image": "c.png", "mine": ["a.png"], "other": "b.png"}, ["other", "mine"],
         ["b.png", "a.png"]),
    ],
)  # fmt: skip
def test_the_columns_of_a_table(pictures, row, references, expected):
    path = table(pictures, [row | {"prompt": "put a hat on it"}])
    rows = load_rows(path, references=references)
    assert names(rows) == [("c.png", expected)]
    # Without the option the same rows are no edits, and of a list the first one is the picture.
    (own,) = load_rows(path).rows
    assert own.references == () and own.image.name == row.get("local_path_list", ["c.png"])[0]


def test_no_column_takes_the_place_of_another(pictures):
    rows = [
        {"image": "c.png", "mine": "a.png", "other": "b.png"},
        {"image": "c.png", "mine": "a.png"},
        {"image": "c.png", "mine": "", "other": "b.png"},
    ]
    path = table(pictures, [row | {"prompt": "x"} for row in rows])
    first, second = problems_of(load_rows, path, references=["mine", "other"])
    assert ":2: names no picture to edit in 'other'; give one, or leave the column out" in first
    assert ":3: names no picture to edit in 'mine'" in second


def test_the_target_is_the_first_of_a_list_unless_the_list_has_the_references(pictures):
    row = {"local_path_list": ["a.png", "b.png"], "mine": "c.png", "prompt": "x"}
    path = table(pictures, [row])
    assert names(load_rows(path, references=["mine"])) == [("a.png", ["c.png"])]
    assert names(load_rows(path, references=["auto"])) == [("b.png", ["a.png"])]


def test_every_row_without_its_pictures_is_told(pictures):
    rows = [
        {"local_path_list": ["c.png"], "prompt": "x"},
        {"local_path_list": ["gone.png", "c.png"], "prompt": "x"},
        {"local_path_list": [3, "c.png"], "prompt": "x"},
        {"local_path_list": ["a.png"] * 11 + ["c.png"], "prompt": "x"},
    ]
    path = table(pictures, rows)
    found = problems_of(load_rows, path, references=["auto"])
    assert [problem.partition(":")[0] for problem in found] == [str(path)] * 4
    for part, problem in zip(
        (":1: names no picture to edit before its picture", ":2: no such picture gone.png",
         ":3: names a number as a picture to edit", ":4: names 11 pictures to edit"),
        found, strict=True,
    ):  # fmt: skip
        assert part in problem
    assert "name its column in data.references" in found[0]
    (problem,) = problems_of(load_rows, path, references=[3])
    assert "data.references is 3; it must name columns or folders" in problem
    problem = problems_of(load_rows, path, references=["source"])[0]
    assert "names no picture to edit in 'source'" in problem


def test_folders_of_the_same_names(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        picture(tmp_path / "set" / name).with_suffix(".txt").write_text("put a hat on it")
    before = ("before/a.png", "before/b_1.png", "before/b_0.png", "before/sub/c.jpg")
    for name in (*before, "pose/a.png", "pose/b.png", "pose/sub/c.png"):
        picture(tmp_path / "set" / name)
    folders = [str(tmp_path / "set" / "before"), str(tmp_path / "set" / "pose")]
    rows = load_rows(tmp_path / "set", references=folders)
    assert names(rows) == [
        ("a.png", ["a.png", "a.png"]),
        ("b.png", ["b_0.png", "b_1.png", "b.png"]),
        ("c.png", ["c.jpg", "c.png"]),
    ]
    (tmp_path / "set" / "pose" / "a.png").unlink()
    (problem,) = problems_of(load_rows, tmp_path / "set", references=folders)
    assert "a.png: has no picture to edit in " in problem
    assert folders[1] in problem and folders[0] not in problem
    (tmp_path / "set" / "before" / "a.png").unlink()
    (problem,) = problems_of(load_rows, tmp_path / "set", references=folders)
    assert all(folder in problem for folder in folders)
    (problem,) = problems_of(load_rows, tmp_path / "set", references=["auto"])
    assert "data.references auto: no such folder" in problem


def test_a_missing_reference_is_not_made_up_from_those_of_others(tmp_path):
    for name in ("dog.png", "dog_1.png", "dog_2.png"):
        picture(tmp_path / "set" / name).with_suffix(".txt").write_text("put a hat on it")
        picture(tmp_path / "before" / name)
    load = lambda: load_rows(tmp_path / "set", references=[str(tmp_path / "before")])
    assert names(load()) == [(f"{name}.png", [f"{name}.png"]) for name in ("dog", "dog_1", "dog_2")]
    (tmp_path / "before" / "dog.png").unlink()
    problems = problems_of(load)
    assert all("to edit, which dog has too; put one of this" in p for p in problems), problems


def test_batches_hold_one_number_and_one_size_of_references(tmp_path):
    sizes = [[(96, 96)], [(96, 96)], [(100, 101)], [(96, 96), (64, 200)], [(64, 200), (96, 96)]] * 3
    rows = []
    for number, own in enumerate(sizes):
        paths = [picture(tmp_path / f"{number}_{k}.png", *size) for k, size in enumerate(own)]
        paths.append(picture(tmp_path / f"{number}.png"))
        rows.append({"local_path_list": [path.name for path in paths], "prompt": "x"})
    path = table(tmp_path, rows)
    data = measure(load_rows(path, references=["auto"]), BUCKETS, reference_size=size_of)
    square = Bucket(96, 96)
    # 100 x 101 is cut to 96 x 96.
    assert {shape.references: len(own) for shape, own in data.rows_by_shape().items()} == {
        (square,): 9, (square, Bucket(64, 192)): 3, (Bucket(64, 192), square): 3,
    }  # fmt: skip
    batches = Batches(data.rows_by_shape(), data.rows, data.prompt_keys, batch_size=4, seed=1)
    seen = set()
    for n in range(batches.per_epoch):
        batch = batches.batch(n)
        assert {data.shape(row) for row in batch.rows} == {batch.shape}
        seen |= set(batch.rows.tolist())
    assert seen == set(range(15))
    # Every picture counts for the digest, and the order of them.
    other = measure(load_rows(path), BUCKETS)
    assert other.shape(0) == Shape(square) and other.digest() != data.digest()
    turned = dataclasses.replace(data, references=[own[::-1] for own in data.references])
    assert turned.digest() != data.digest()


def test_references_that_the_model_cannot_take_are_all_told(tmp_path):
    picture(tmp_path / "small.png", 60, 96), picture(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:-900])
    rows = [
        {"local_path_list": [name, "a.png"], "prompt": "x"} for name in ("small.png", "broken.png")
    ]
    rows = load_rows(table(tmp_path, rows), references=["auto"])
    found = problems_of(measure, rows, BUCKETS, reference_size=size_of)
    assert "edits.jsonl:1: " in found[0] and "small.png: is 60x96" in found[0]
    assert "edits.jsonl:2: " in found[1] and "broken.png" in found[1] and len(found) == 2


@pytest.mark.parametrize(
    ("context", "other", "edits", "message"),
    [
        ("edit_ref", "gt_ref", True, "edit_ref does not fit .* which edit pictures; use gt_ref or"),
        (
            "gt_ref",
            "edit_ref",
            False,
            "gt_ref does not fit .* edit none .*; use edit_ref or other or prompt",
        ),
    ],
)
def test_rows_and_context_must_fit(pictures, context, other, edits, message):
    path = table(pictures, [{"local_path_list": ["a.png", "b.png"], "prompt": "x"}])
    references = ["auto"] if edits else []
    data = measure(load_rows(path, references=references), BUCKETS, reference_size=size_of)
    config = defaults()
    config.teacher.context, config.data.path = context, str(path)
    with pytest.raises(UserError, match=message):
        data_set.check_references(config, klein, data)
    config.teacher.context = other
    data_set.check_references(config, klein, data)
    config.anchor.share, config.anchor.edit = 0.5, True
    if not edits:
        with pytest.raises(UserError, match=r"anchor.edit: .* edit none .*; set it to false"):
            data_set.check_references(config, klein, data)
    else:
        data_set.check_references(config, klein, data)


def test_a_family_that_edits_nothing_takes_no_rows_that_do():
    config = defaults()
    config.data.references = "auto"
    with pytest.raises(UserError, match="the family zimage edit no pictures; unset it"):
        data_set.reference_size(config, SimpleNamespace(family=zimage))
