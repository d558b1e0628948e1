"""Several data sets as one: their rows, keys and faults, and the proportions they are drawn in."""

import json
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import problems_of
from etils import epath
from PIL import Image
from test_loader import KEYS, make, make_rows, same, split
from test_prepared import write

from dopsd_jax.common.config_fields import as_paths
from dopsd_jax.config.fields import defaults
from dopsd_jax.data import prepared_parts as parts
from dopsd_jax.data.buckets import Bucket, Shape, make_buckets
from dopsd_jax.data.dataset import describe
from dopsd_jax.data.loader import Batches
from dopsd_jax.data.measure import measure
from dopsd_jax.data.prepared_parts import names_prepared
from dopsd_jax.data.rows import load_sets
from dopsd_jax.data.sets import among, draws_per_epoch, parts_of, real_shares, shares_of
from dopsd_jax.data.sets import describe as describe_sets
from dopsd_jax.run import data_set, prepared_folder


def folder_of(path, count, caption="a mug"):
    path.mkdir()
    for i in range(count):
        Image.new("RGB", (64, 64), (i, count, 0)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"{caption} {i}")
    return str(path)


def table_of(path, keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(path.parent / "a.png")
    path.write_text(",".join(["image", *keys]) + "\n" + ",".join(["a.png", *keys]) + "\n")
    return str(path)


def test_a_list_of_paths_and_a_path_with_a_comma(tmp_path):
    assert as_paths("a, b/c,") == ("a", "b/c") and as_paths(["a,b", "c"]) == ("a,b", "c")
    path = folder_of(tmp_path / "cups, mugs", 1)
    assert as_paths(path) == (path,) and as_paths("photos [2]") == ("photos [2]",)


def test_rows_of_all_sets_follow_each_other(tmp_path):
    paths = [folder_of(tmp_path / "a", 3), folder_of(tmp_path / "b", 1, "a cup")]
    found = load_sets(paths, ())
    assert [row.captions[0][1] for row in found.rows] == [
        "a mug 0",
        "a mug 1",
        "a mug 2",
        "a cup 0",
    ]
    assert found.rows[-1].captions == (("caption", "a cup 0"),)
    assert [one.rows for one in found.sets] == [range(3), range(3, 4)]
    assert [one.times for one in load_sets(paths, ["1", 1]).sets] == [1, 3]
    dataset = measure(found, make_buckets(64))
    assert dataset.digest() != measure(load_sets(paths[::-1], ()), make_buckets(64)).digest()
    lines = describe(measure(load_sets(paths, [1, 1]), make_buckets(64)), 2)
    assert f"set {paths[1]}: 1 rows, each used 3 times an epoch, 0.5 of all draws" in lines
    assert "batches of 2: 3 an epoch" in lines


def test_keys_are_those_that_all_sets_have(tmp_path):
    one = table_of(tmp_path / "a/d.csv", ["short_en", "long", "caption"])
    two = table_of(tmp_path / "b/d.csv", ["caption", "text"])
    found = load_sets([one, two], ())
    assert found.prompt_keys == ("caption",)
    assert [row.captions for row in found.rows] == [(("caption", "caption"),)] * 2
    assert "prompt keys that all sets have: caption" in found.notes[0]
    three = table_of(tmp_path / "c/d.csv", ["short_zh"])
    (problem,) = problems_of(load_sets, [one, three], ())
    assert "no caption key in common" in problem and "d.csv has short_zh" in problem


@pytest.mark.parametrize("field", ["prompt_keys", "caption_key"])
def test_keys_are_told_by_the_field_that_names_them(tmp_path, field):
    folder, table = folder_of(tmp_path / "a", 1), table_of(tmp_path / "b/d.csv", ["caption"])
    prepared = str(write(tmp_path / "set"))
    config = defaults()
    config.data[field], config.data.buckets = "words", "64x64"
    told = []
    for config.data.path in (folder, table, prepared):
        read = data_set.open_data if names_prepared(config.data.path) else data_set.open_rows
        own = (
            config,
            tmp_path,
            *[SimpleNamespace(size_multiple=16)] * (config.data.path == prepared),
        )
        told += problems_of(read, *own)
    assert told[0].startswith(f"data.{field} words: a folder with caption files has only the key")
    assert f"write it, or leave the key out of data.{field}; the fields here are" in told[1]
    assert told[2].startswith(f"data.{field} words: {prepared} was prepared with short_en")


def test_the_faults_of_all_sets_are_told_at_once(tmp_path):
    paths = [str(tmp_path / "none"), folder_of(tmp_path / "a", 1), str(tmp_path / "nor")]
    problems = problems_of(load_sets, [*paths, paths[1]], ())
    assert "twice" in problems[0] and "none: no such" in problems[1] and "nor: no" in problems[2]


def test_an_option_that_one_of_the_sets_needs_is_not_refused(tmp_path):
    folder, table = folder_of(tmp_path / "a", 1), table_of(tmp_path / "b/d.csv", ["caption"])
    (tmp_path / "a/0.txt").write_text("a mug\na cup")
    first, _ = load_sets([folder, table], (), caption_lines=True).rows
    assert [text for _, text in first.captions] == ["a mug", "a cup"]
    load_sets([folder, table], (), image_key="image", data_root=tmp_path)
    others = folder_of(tmp_path / "c", 1), table_of(tmp_path / "d/d.csv", ["caption"])
    wrong = {"image_key": "image"}, {"caption_lines": True}
    for path, other, option in zip((folder, table), others, wrong, strict=True):
        (problem,) = problems_of(load_sets, [path, other], (), **option)
        assert f"{path} is read as" in problem and f"and {other} is read as" in problem
    (tmp_path / "e.parquet").touch()
    for name, value in (("references", ["auto"]), ("masks", True)):  # rows there would have none
        problems = problems_of(load_sets, [table, str(tmp_path / "e.parquet")], (), **{name: value})
        assert any(f"data.{name} is for" in p and "e.parquet is read as" in p for p in problems)


def test_a_set_is_the_same_by_any_path(tmp_path):
    path = folder_of(tmp_path / "a", 1)
    (tmp_path / "link").symlink_to(path)
    for other in (f"{path}/", f"{path}/../a", os.path.relpath(path), str(tmp_path / "link")):
        (problem,) = problems_of(load_sets, [path, other], ())
        assert problem.startswith(f"data.path: names {path} twice, also as {other}; give it a")


@pytest.mark.parametrize("weights", [["x", 1], [0, 1], [-1, 1], ["nan", 1], [1e9, 1], [1], [1] * 3])
def test_weights_are_a_number_above_0_for_each_set(weights):
    (problem,) = problems_of(shares_of, weights, 2)
    assert problem.startswith("data.weights: ")


def test_prepared_data_have_no_place_in_a_list(tmp_path):
    path = str(write(tmp_path / "set"))
    assert names_prepared(path) and names_prepared([path]) and not names_prepared("a,b")
    (problem,) = problems_of(names_prepared, f"{path},other")
    assert "is a prepared data set, which has no place in a list" in problem


def test_prepared_data_are_drawn_as_the_sets_they_were_made_from(tmp_path):
    manifest = parts.Manifest(5, 2, ("caption",), "f" * 64, {}, (("a", 2), ("b", 3)), ("3", "1"))
    parts.write_manifest(epath.Path(tmp_path), manifest)
    found = parts.read_manifest(epath.Path(tmp_path))
    assert found == manifest
    config = defaults()
    own = data_set.prepared_sets(config, found)
    assert own == parts_of(["a", "b"], [2, 3], shares_of([3, 1], 2))
    config.data.weights = "1,1"  # instead of those that it was prepared with
    assert [one.share for one in data_set.prepared_sets(config, found)] == [Fraction(1, 2)] * 2
    config.data.weights = "1,1,1"
    (problem,) = problems_of(data_set.prepared_sets, config, found)
    assert "has 3 numbers for the 2 data sets" in problem
    one = found._replace(sets=(), weights=())
    assert "sets" not in json.loads(one.text())  # older folders keep what their parts refer to
    config.data.weights = ""
    assert data_set.prepared_sets(config, one) == ()


@pytest.mark.parametrize(
    "wrong",
    [{"sets": [["a", 2], ["b", 2]]}, {"sets": [["a", 5, 1]]}, {"sets": [["a", 0], ["b", 5]]},
     {"sets": {"a": 5}}, {"weights": ["1"]}, {"weights": [1, 1]}, {"weights": ["x", "1"]}],
)  # fmt: skip
def test_a_damaged_list_of_sets_is_told(tmp_path, wrong):
    manifest = parts.Manifest(5, 2, ("caption",), "f" * 64, {}, (("a", 2), ("b", 3)), ("3", "1"))
    content = json.loads(manifest.text()) | wrong
    (tmp_path / parts.MANIFEST).write_text(json.dumps(content))
    (problem,) = problems_of(parts.read_manifest, epath.Path(tmp_path))
    assert "is damaged" in problem


def test_pictures_of_several_sets_are_named_with_their_set(tmp_path):
    one, two = folder_of(tmp_path / "a", 1), table_of(tmp_path / "b/d.csv", ["caption"])
    assert prepared_folder.name_roots([one]) == (tmp_path / "a",)
    roots = prepared_folder.name_roots([one, two])
    rows = load_sets([one, two], ()).rows
    assert [prepared_folder.picture_name(row.image, roots) for row in rows] == [
        "a/0.png",
        "b/a.png",
    ]


def test_a_configuration_names_several_sets(tmp_path):
    config = defaults()
    config.data.path = [folder_of(tmp_path / name, 2) for name in "ab"]
    config.data.weights = "3,1"
    assert [one.times for one in data_set.open_rows(config, tmp_path).sets] == [3, 1]
    assert data_set.data_paths(config, Path()) == tuple(config.data.path)


def test_rows_are_drawn_in_the_proportions_of_the_weights():
    shares = (Fraction(3, 4), Fraction(1, 4))  # of 8 and 12 rows in two buckets
    sets = parts_of("ab", (8, 12), shares)
    assert [one.times for one in sets] == [Fraction(9, 2), 1]
    batches = make(10, 10, batch_size=2, sets=sets)
    epochs = [range(e * batches.per_epoch, (e + 1) * batches.per_epoch) for e in range(6)]
    counts = [Counter(r for n in e for r in batches.batch(n).rows.tolist()) for e in epochs]
    for count in counts:
        assert set(count) == set(range(20))
        assert sum(count[row] for row in range(8)) == 36  # of 48
        assert all(count[row] in (4, 5) for row in range(8))
    assert len({tuple(count[row] for row in range(8)) for count in counts}) > 1  # in turn
    again = make(10, 10, batch_size=2, sets=sets)
    same(again.batch(31), batches.batch(31))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("weights", [(14, 10), (3, 1), (1, 1)])
def test_shares_hold_over_many_shapes_and_what_is_drawn_is_told(weights, batch_size):
    """One row of each set in every shape: rounded shape by shape, 1.4 draws would be 1."""
    sets = parts_of("ab", (10, 10), shares_of(weights, 2))
    rows = {Shape(Bucket(64 + 16 * i, 64)): np.array([i, 10 + i]) for i in range(10)}
    batches = Batches(rows, make_rows(20), KEYS, batch_size=batch_size, seed=0, sets=sets)
    epochs = 40 if batch_size > 1 else 1
    drawn = [batches.batch(n).rows < 10 for n in range(epochs * batches.per_epoch)]
    real = real_shares(draws_per_epoch(list(rows.values()), sets), batch_size)
    assert sum(real) == pytest.approx(1)
    assert np.mean(drawn) == pytest.approx(real[0], abs=0.03 if batch_size > 1 else 1e-9)
    wanted = weights[0] / sum(weights)
    lines = describe_sets(sets, list(rows.values()), batch_size)
    assert (abs(real[0] - wanted) > 0.01) == ("in batches of one shape" in lines[0])
    if batch_size == 1:
        assert real[0] == pytest.approx(wanted)


def test_weights_hold_for_the_rows_that_are_trained_on(tmp_path):
    """Most of the pictures that are held out may be of one set."""
    paths = [folder_of(tmp_path / "a", 8), folder_of(tmp_path / "b", 12)]
    dataset = measure(load_sets(paths, [3, 1]), make_buckets(64))
    config = defaults()
    for config.data.holdout in (0, 3, 9):
        own, rows, held = data_set.hold_out(config, dataset)
        assert sum(map(len, held.values())) == config.data.holdout
        left = [sum(len(one.of(ids)) for ids in rows.values()) for one in own.sets]
        assert sum(left) == 20 - config.data.holdout
        drawn = [one.draws([count])[0] for one, count in zip(own.sets, left, strict=True)]
        assert drawn[0] / sum(drawn) == pytest.approx(0.75, abs=0.5 / sum(drawn))
        assert min(one.times for one in own.sets) == 1
        batches = Batches(rows, make_rows(20), KEYS, batch_size=1, seed=0, sets=own.sets)
        line = f"batches of 1: {sum(drawn)} an epoch"
        assert batches.per_epoch == sum(drawn) and line in describe(own, 1, rows)[-1]
    held = dataset.sets[0].rows
    (problem,) = problems_of(among, dataset.sets, np.array([i for i in range(20) if i not in held]))
    assert f"gives {paths[0]} a share, and config.data.holdout leaves no row of it" in problem


def test_sets_without_weights_are_drawn_as_one():
    sets = parts_of("ab", (8, 12), ())
    joined = Batches(split(10, 10), make_rows(20), KEYS, batch_size=4, seed=0, sets=sets)
    for n in np.arange(12):
        same(joined.batch(int(n)), make(10, 10).batch(int(n)))
