"""Anchors of an editor: each edits the pictures of a row of its step."""

import jax
import numpy as np
import pytest
from conftest import ROOT, relative_error
from PIL import Image
from test_early_step import Run

from dopsd_jax.conditioning.features import Features
from dopsd_jax.data.images import open_image
from dopsd_jax.estimation import early_step
from dopsd_jax.miniature import edits
from dopsd_jax.parallel import sharding
from dopsd_jax.run import data_set

INSTRUCTIONS = ["make it green", "the same thing, but very much larger than it was before"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Rows with references of two sizes; four anchors in two micro-batches beside four rows."""
    folder = tmp_path_factory.mktemp("editing")
    rng = np.random.default_rng(0)
    for i in range(8):
        for part, size in (("after", (96, 96)), ("before", (96, 96) if i % 2 else (128, 64))):
            (folder / part).mkdir(exist_ok=True)
            pixels = rng.integers(0, 255, (*size[::-1], 3), np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{i}.png")
        (folder / "after" / f"{i}.txt").write_text("put a hat on it")
    (folder / "prompts.txt").write_text("\n".join(INSTRUCTIONS))
    fields = {"anchor.share": 0.5, "anchor.edit": True, "anchor.prompts": folder / "prompts.txt"}
    fields |= {"teacher.context": "gt_ref", "data.references": folder / "before"}
    size = {"batch_size": 2, "accumulate": 2, "data.buckets": "96x96"}
    return Run(folder / "after", folder, "flux2_klein:random", **fields, **size)


def test_what_a_step_will_be_given_is_known_before(run):
    run.features.survey()
    shapes = run.batches.shapes_between(0, run.batches.per_epoch)
    given = early_step.given(run.config, run.features, run.mesh, shapes)
    foreseen = dict(zip(shapes, given, strict=True))
    run.features.prepare()
    assert len(shapes) == 2
    for n in range(run.batches.per_epoch):
        shape, *found = run.given(n)
        assert sharding.abstract(found) == list(foreseen[shape][:2])


def test_an_anchor_is_its_instruction_with_the_pictures_of_a_row_of_its_step(run):
    run.features.prepare()
    anchors, limits = run.features.anchors, data_set.limits(run.config)
    seen = set()
    for n in range(2):
        index = run.batches.batch(n)
        _, _, found = run.given(n)
        texts = anchors.texts(n)
        assert len(texts) == len(index.rows) == 4
        for place, (text, row) in enumerate(zip(texts, index.rows.tolist(), strict=True)):
            (path,) = run.dataset.rows[row].references
            expected = run.pipe.encode_prompt([text], references=[open_image(path, limits)])
            own = jax.tree.map(lambda x, p=place: x[divmod(p, 2)][None], found)
            assert jax.tree.structure(own) == jax.tree.structure(expected)
            for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
                assert relative_error(a, b) < 1e-5
            seen.add((text, row))
    assert {text for text, _ in seen} == set(INSTRUCTIONS) and len({row for _, row in seen}) == 8


def test_a_process_loads_its_own_anchors_alone(run):
    run.features.prepare()
    anchors, index = run.features.anchors, run.batches.batch(1)
    whole = anchors.batch(index, np.arange(2))
    part = anchors.batch(index, np.array([1]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 1:], b), whole, part)


def test_without_the_field_the_same_rows_have_anchors_without_pictures(run, tmp_path):
    config = run.config.copy_and_resolve_references()
    config.anchor.edit = False
    features = Features(run.pipe, run.dataset, config, tmp_path)
    features.prepare()
    assert features.anchors.batch(run.batches.batch(0), np.arange(2)).references == ()


def test_the_miniatures_instructions_are_those_of_its_edits():
    shipped = (ROOT / "examples" / "klein_miniature" / "edits.txt").read_text().splitlines()
    assert shipped == edits.instructions(96) and len(set(shipped)) == 96
