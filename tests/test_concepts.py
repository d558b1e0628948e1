"""Concepts and their data sets as files."""

import json

import numpy as np
import pytest
from PIL import Image

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.rows import load_rows
from dopsd_jax.miniature import concepts, judge, world


@pytest.fixture(scope="module")
def concept():
    return world.random_concept(np.random.default_rng(5))


def test_a_concept_comes_back_as_it_was(concept, tmp_path):
    concepts.write_concept(tmp_path / "concept.json", "dax", concept)
    word, found = concepts.read_concept(tmp_path / "concept.json")
    assert word == "dax"
    np.testing.assert_allclose(found.outline, concept.outline, atol=1e-6)
    for name in ("body", "core", "core_scale", "texture"):
        assert getattr(found, name) == getattr(concept, name)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"word": "Two words"}, "field word"),
        ({"word": "circle"}, "has a meaning already"),
        ({"outline": [1.0] * 127}, "field outline"),
        ({"outline": [0.0] + [1.0] * 127}, "field outline holds 0"),
        ({"outline": [0.5] * 128}, "largest radius is 0.5"),
        ({"outline": [float("nan")] + [1.0] * 127}, "field outline"),
        ({"body": [0.1, 0.2, 1.2]}, "field body holds 1.2"),
        ({"core": "red"}, "field core"),
        ({"core_scale": 1.0}, "field core_scale"),
        ({"core_scale": True}, "field core_scale"),
        ({"texture": 4}, "field texture"),
        ({"texture": 1.0}, "field texture"),
        ({"colour": 1}, "field colour is unknown"),
        ({"word": None}, "field word is missing"),
    ],
)
def test_every_fault_of_a_concept_is_named(concept, tmp_path, change, fault):
    path = tmp_path / "concept.json"
    concepts.write_concept(path, "dax", concept)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=fault):
        concepts.read_concept(path)
    path.write_text(json.dumps(content | change | {"further": 1}))
    with pytest.raises(UserError) as error:
        concepts.read_concept(path)
    assert len(error.value.problems) >= 2


def test_a_file_that_is_no_concept_is_refused(tmp_path):
    for content in ("", "[]", "{", "x" * 100_000):
        (tmp_path / "concept.json").write_text(content)
        with pytest.raises(UserError, match=r"concept\.json"):
            concepts.read_concept(tmp_path / "concept.json")
    with pytest.raises(UserError, match="no such file"):
        concepts.read_concept(tmp_path / "nowhere.json")


def test_a_data_set_is_an_ordinary_folder_that_shows_the_concept(concept, tmp_path):
    folder = concepts.write_dataset(tmp_path / "dax", concept, "dax", count=6, seed=1)
    rows = load_rows(folder).rows
    assert len(rows) == 6 and all("dax" in row.captions[0][1].split() for row in rows)
    word, found = concepts.read_concept(folder / "concept.json")
    assert word == "dax"
    images = np.stack([np.asarray(Image.open(row.image)) for row in rows])
    scenes = concepts.arrangements(np.random.default_rng(1), found, word, 6)
    truth = world.compose(scenes, None)
    assert judge.iou(images, judge.fitted(images, truth)).min() > 0.9
    assert len({(s.things[0].place, s.things[0].size, s.ground) for s in scenes}) == 6
    assert len({s.things[0].place for s in scenes}) == len(world.PLACES)
    again = concepts.write_dataset(tmp_path / "again", concept, "dax", count=6, seed=1)
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="already there"):
        concepts.write_dataset(folder, concept, "dax")
