"""teacher.context = other: which picture of its concept a row's teacher is shown."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run_program
from etils import epath
from PIL import Image

from dopsd_jax.common.errors import UserError
from dopsd_jax.conditioning.cached import CachedFeatures
from dopsd_jax.conditioning.encoding import STUDENT, TEACHER, Encoder
from dopsd_jax.conditioning.features import check_prepared, prepared_settings
from dopsd_jax.config import schema
from dopsd_jax.config.loading import load
from dopsd_jax.data import holdout
from dopsd_jax.data.buckets import make_buckets
from dopsd_jax.data.concepts import other_pictures
from dopsd_jax.data.images import ImageInfo
from dopsd_jax.data.measure import measure
from dopsd_jax.data.prepared import Prepared
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.table import DataRow
from dopsd_jax.data.views import views_of
from dopsd_jax.evaluation import teacher_traits
from dopsd_jax.families.flux2_klein import family as klein
from dopsd_jax.families.pipeline import pipeline
from dopsd_jax.methods import registry
from dopsd_jax.run import data_set, prepared_folder


def data(*names, concepts=()):
    """Rows of pictures `folder/name`; the name is the digest too."""
    rows = [
        DataRow(Path(name), (("caption", "x"),), name, concept=concept)
        for name, concept in zip(names, concepts or [""] * len(names), strict=True)
    ]
    return rows, [ImageInfo(64, 64, Path(name).name, ()) for name in names]


def shown(names, seed=0, concepts=(), held=()):
    """The name of the picture that each row is shown."""
    rows = data(*names, concepts=concepts)
    return [other.digest for other in other_pictures(*rows, seed, "x", held)]


NAMES = [f"a/{n}" for n in "01234"] + [f"b/{n}" for n in "567"]


def test_every_picture_of_a_concept_is_shown_to_one_other_row():
    found = shown(NAMES)
    assert sorted(found[:5]) == list("01234") and sorted(found[5:]) == list("567")
    assert all(Path(name).name != other for name, other in zip(NAMES, found, strict=True))
    # One circle: following it visits all.
    at, seen = 0, set()
    while at not in seen:
        seen.add(at)
        at = int(found[at])
    assert len(seen) == 5


def test_the_order_is_that_of_the_seed_and_not_of_the_rows():
    assert len({tuple(shown(NAMES, seed)) for seed in range(4)}) > 1
    turned = dict(zip(NAMES[::-1], shown(NAMES[::-1]), strict=True))
    assert turned == dict(zip(NAMES, shown(NAMES), strict=True))


def test_rows_that_share_a_picture_are_shown_the_same_other_one():
    assert shown(["a/0", "a/0", "a/1"]) == ["1", "1", "0"]


@pytest.mark.parametrize("held", ["1", "36", "015"])
def test_no_teacher_is_shown_a_picture_that_is_held_out(held):
    """The circle is the same, without them."""
    whole = dict(zip(NAMES, shown(NAMES), strict=True))
    for name, other in zip(NAMES, shown(NAMES, held=set(held)), strict=True):
        expected = whole[name]
        while expected in held:
            expected = whole[f"{Path(name).parent}/{expected}"]
        assert other == expected and other not in held and other != Path(name).name


def test_a_concept_needs_two_pictures_that_are_trained_on_or_none():
    with pytest.raises(UserError, match=r"1 rows have the only one .* is trained on: a/4; lower"):
        shown(NAMES, held=set("0123"))
    assert sorted(shown(NAMES, held=set("567"))[5:]) == list("567")


def test_a_column_names_the_concepts():
    names = ["a/0", "b/1", "a/2", "b/3"]
    assert shown(names, concepts=["dog", "dog", "cat", "cat"]) == ["1", "0", "3", "2"]


def test_rows_without_a_second_picture_are_named_in_one_line():
    names = [f"{folder}/{folder}" for folder in "abcde"] + ["f/0", "f/1"]
    with pytest.raises(UserError) as caught:
        shown(names)
    (line,) = caught.value.problems
    assert "5 rows have the only one of theirs: a/a, b/b, c/c and 2 more; add pictures" in line
    with pytest.raises(UserError, match=r"'concept' is empty or missing in 1 rows .*: b/2; fill"):
        shown(["a/0", "a/1", "b/2"], concepts=["dog", "dog", ""])


# --- a data set


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Four pictures, of two concepts by a column; one of the values is no text."""
    folder = tmp_path_factory.mktemp("table")
    lines = []
    for n, concept in enumerate(["dog", 7, "dog", 7]):
        colour = np.full((64 + 32 * (n % 2), 64, 3), 50 * n, np.uint8)
        Image.fromarray(colour).save(folder / f"{n}.png")
        lines.append({"file_name": f"{n}.png", "text": f"picture {n}", "concept": concept})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def opened(table, context="other"):
    overrides = {"teacher.context": context, "data.path": str(table)}
    config = load("zimage:random", overrides)
    schema.check(config, ["teacher.context"])
    dataset = measure(load_rows(table), data_set.data_buckets(config, 16))
    if context == "other":
        others = other_pictures(dataset.rows, dataset.infos, config.seed, str(table))
        dataset = dataclasses.replace(dataset, others=others)
    return config, dataset


def test_the_concept_is_read_from_a_table(table):
    rows = load_rows(table)
    assert [row.concept for row in rows.rows] == ["dog", "7", "dog", "7"]
    assert rows.prompt_keys == ("text",)


def test_the_teacher_is_shown_it_in_the_rows_bucket_and_the_cache_knows(
    table, random_model, tmp_path
):
    pipe = pipeline(random_model)
    (config, dataset), (plain, alone) = opened(table), opened(table, "vlm")
    encoder = Encoder(pipe, dataset, config)
    for row in range(4):
        (picture,) = encoder.pictures(row, TEACHER)
        assert np.all(picture == 50 * ((row + 2) % 4))
        assert picture.shape == encoder.image(row).shape
        assert np.all(encoder.image(row) == 50 * row)
    seen = teacher_traits.shown_pictures(pipe, dataset, config, range(4))
    assert [int(picture.max()) for picture in seen] == [100, 150, 0, 50]
    assert teacher_traits.shown_pictures(pipe, alone, plain, range(4)) == [None] * 4
    own = CachedFeatures(pipe, alone, plain, tmp_path, registry.needs(plain))
    other = CachedFeatures(pipe, dataset, config, tmp_path, registry.needs(config))
    for row in range(4):
        assert own.key((row, 0), STUDENT) == other.key((row, 0), STUDENT)
        assert own.key((row, 0), TEACHER) != other.key((row, 0), TEACHER)


def test_the_cache_tells_another_picture_shown_whole_from_a_mirrored_one(
    table, random_model, tmp_path
):
    """A row is mirrored; the picture of another row, which its teacher is shown, is not."""
    pipe, keys = pipeline(random_model), {}
    for context in ("vlm", "other"):
        config, _ = opened(table, context)
        dataset = measure(load_rows(table, views=views_of(mirrored=True)), make_buckets(64))
        if context == "other":
            others = other_pictures(dataset.rows, dataset.infos, config.seed, str(table))
            dataset = dataclasses.replace(dataset, others=others)
        store = CachedFeatures(pipe, dataset, config, tmp_path, registry.needs(config))
        for row in range(len(dataset.rows)):
            picture, text = store.encoder.shown(row), dataset.rows[row].captions[0]
            known = text, picture.shape, picture.tobytes()
            assert keys.setdefault(store.key((row, 0), TEACHER), known) == known


@pytest.mark.parametrize(("made", "now"), [({}, "other"), ({"shown": "other"}, "vlm")])
def test_data_prepared_for_another_teacher_is_refused(table, random_model, tmp_path, made, now):
    config, _ = opened(table, now)
    prepared = SimpleNamespace(
        folder="set",
        manifest=SimpleNamespace(settings=made),
        shapes=lambda role: [{"features": (1, 1)}],
    )
    with pytest.raises(UserError, match="was prepared for a teacher that is shown the"):
        check_prepared(prepared, pipeline(random_model), config, tmp_path)


def test_a_run_shows_no_picture_that_it_holds_out(tmp_path, random_model):
    """Nor do the data that are prepared for it, which say so."""
    for n in range(4):
        Image.fromarray(np.full((64, 64, 3), 50 * n, np.uint8)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("a dog")
    _, dataset = opened(tmp_path, "vlm")
    fields = {"teacher.context": "other", "data.holdout": "2", "data.path": str(tmp_path)}
    config = load("zimage:random", fields)
    _, held = holdout.split(dataset, 2, config.seed)
    held = {dataset.infos[row].digest for rows in held.values() for row in rows.tolist()}
    others = data_set.with_others(config, dataset).others
    assert len(held) == 2 and not held & {other.digest for other in others}
    settings = lambda **own: prepared_settings(
        load("zimage:random", fields | own), pipeline(random_model), tmp_path / "memo.json"
    )
    whole = settings(**{"data.holdout": "0"})
    assert settings() == whole | {"held_out": [2, config.seed]}
    assert "held_out" not in settings(**{"teacher.context": "vlm"})


def test_it_is_not_for_rows_that_edit_pictures():
    config = load("flux2_klein:random", {"teacher.context": "other"})
    edits = SimpleNamespace(references=[1])
    with pytest.raises(UserError, match=r"other does not fit the rows of .*; use gt_ref or prompt"):
        data_set.check_references(config, klein, edits)
    data_set.check_references(config, klein, SimpleNamespace(references=()))


@pytest.mark.parametrize("program", ["train", "check"])
@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("zimage", "teacher.instruction=as shown"),
        ("flux2_klein", "teacher.min_pixels=4096"),
        ("flux2_klein", "teacher.vlm=/models/vlm"),
    ],
)
def test_fields_of_another_family_are_refused(tmp_path, program, family, field):
    """Every family has this context, so that it does not tell which fields belong to it."""
    words = f"--config.{field}", "--config.teacher.context=other", f"--workdir={tmp_path}"
    done = run_program(program, f"--config={family}:random", *words)
    assert done.returncode == 2
    name = field.partition("=")[0]
    told = f"config.{name}: has no effect with models of the family {family}; leave it out"
    assert done.stderr.strip() == f"error: {told}"


def test_every_shard_of_a_preparation_shows_what_a_run_shows(table, tmp_path):
    from_config = (f"--config={ROOT}/configs/zimage.py:random", "--config.teacher.context=other")
    common = (*from_config, f"--config.data.path={table}")
    common += (f"--workdir={tmp_path}", f"--out={tmp_path}/set", "--rows_per_part=1", "--shards=2")
    for shard in range(2):
        done = run_program("prepare", *common, f"--shard={shard}")
        assert done.returncode == 0, done.stderr
    config, dataset = opened(table)
    pipe = pipeline(tmp_path / "random_model")
    prepared = Prepared(tmp_path / "set")
    encoder = Encoder(pipe, dataset, config)
    folder = epath.Path(tmp_path / "set")
    outdated = lambda own: prepared_folder.outdated(
        folder, prepared.manifest, [0, 1, 2, 3], dataclasses.replace(dataset, others=own)
    )
    assert outdated(dataset.others) == []
    shown = list(dataset.others)
    assert outdated([shown[0], shown[1], shown[0], shown[3]]) == [2]  # whichever shard made it
    for caption, role, wanted in encoder.encode({(row, 0): (TEACHER,) for row in range(4)}):
        found = prepared.load(caption)[role]
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5)
