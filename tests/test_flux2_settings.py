"""FLUX.2-klein's settings: presets, adapted layers, sizes and what files say of them, work."""

import json

import pytest
from conftest import problems_of

from dopsd_jax.adapters import attach
from dopsd_jax.common.errors import UserError
from dopsd_jax.config import loading, schema
from dopsd_jax.config.fields import defaults
from dopsd_jax.families.flux2_klein import family
from dopsd_jax.families.pipeline import pipeline
from dopsd_jax.models.flux2_config import Flux2Config
from dopsd_jax.run import build
from dopsd_jax.run.origin import header_strings
from dopsd_jax.weights.lora_settings import EDITS

KLEIN_4B = Flux2Config()
KLEIN_9B = Flux2Config(heads=32, double_layers=8, single_layers=24, text_dim=12288)
TASKS = {"identity": "edit_ref", "edit": "gt_ref", "prompt": "prompt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return family.write_random_model(tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline(folder)


def test_a_base_model_is_told_of_and_nothing_else(folder, pipe, tmp_path):
    assert pipe.notes() == []
    index = json.loads((folder / "model_index.json").read_text())
    del index["is_distilled"]  # as in the published base models
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    base = pipeline(tmp_path)
    (note,) = base.notes()
    assert note.startswith(f"warning: {tmp_path}/model_index.json: is of a base model")
    config = loading.load("flux2_klein:random")
    assert build.notes(config, base) == [note]
    config.method = "sft"  # a base model is what this is for
    assert build.notes(config, base) == []


def test_every_preset_is_a_right_configuration():
    config = lambda name: loading.load(f"flux2_klein:{name}", {"data.path": "/data"})
    names = [f"{s}_{t}_{w}" for s in ("4b", "9b") for t in TASKS for w in ("lora", "full")]
    for name in names:
        schema.check(config(name))
        size, task, what = name.split("_")
        assert config(name).model.endswith(f"klein-{size.upper()}")
        assert (config(name).teacher.context, config(name).train) == (TASKS[task], what)
    assert config("4b") == config("4b_identity_lora") and config("9b") == config("9b_identity_lora")
    with pytest.raises(UserError, match="'4b_full' is not one of 4b, 9b, 4b_identity_lora, "):
        config("4b_full")


@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        ("blocks", (100, 144)),
        ("klein_upstream", (40, 64)),
        ("single", (40, 48)),
        ("double", (60, 96)),
    ],
)
def test_presets_adapt_the_layers_they_name(preset, counts):
    for size, count in zip((KLEIN_4B, KLEIN_9B), counts, strict=True):
        slots = attach.slots(family.NETWORKS["transformer"].names(size))
        chosen = attach.select(slots, preset, family.LORA_PRESETS)
        assert len(chosen) == count and not any("norm_out" in name for name in chosen)


def test_without_a_teacher_its_context_may_be_that_of_another_family(folder, tmp_path):
    """The command line cannot set it: it has no effect then."""
    fields = {"model": str(folder), "data.path": "x"}
    for method in ("sft", "pso"):
        config = loading.load("zimage:random", fields | {"method": method})
        with pytest.raises(UserError, match=r"context: has no effect with config\.method"):
            schema.check(config, ["teacher.context"])
        pipe, _ = build.open_pipeline(config, tmp_path)
        assert pipe.family is family
        with pytest.raises(UserError, match=r"context: 'vlm' is not one of edit_ref"):
            build.open_pipeline(config, tmp_path, shown=True)
    with pytest.raises(UserError, match=r"context: 'vlm' is not one of edit_ref"):
        build.open_pipeline(loading.load("zimage:random", fields), tmp_path)


def test_a_lora_file_says_that_it_edits(pipe, tmp_path):
    config = defaults()
    config.model, config.data.path = str(pipe.folder), "after"
    said = [header_strings(config, pipe, tmp_path, 3, edits, "d", None) for edits in (True, False)]
    assert said[0].keys() - said[1].keys() == {EDITS}


@pytest.mark.parametrize(
    ("field", "value", "size"),
    [
        ("resolution", (512, 768), "768x768"),
        ("buckets", "512x512,768x512,256x1024", "768x512"),
        ("buckets", ((32, 64),), "32x64"),
    ],
)
def test_a_lora_file_says_the_largest_size_that_it_was_trained_at(
    pipe, tmp_path, field, value, size
):
    config = defaults()
    config.model, config.data.path = str(pipe.folder), "after"
    config.data[field] = value
    said = header_strings(config, pipe, tmp_path, 3, False, "d", None)
    assert said["modelspec.resolution"] == size
    assert said["ss_resolution"] == f"({size.replace('x', ', ')})"


@pytest.mark.parametrize(
    ("buckets", "told"),
    [
        ("0x64", "0 is not a multiple of 16; use 16 or more"),
        ("64x64,100x64", "100 is not a multiple of 16; use 96 or 112"),
    ],
)
def test_a_size_that_the_model_cannot_draw_is_told_with_the_next_that_it_can(pipe, buckets, told):
    config = defaults()
    config.family, config.data.buckets = family.NAME, buckets
    (line,) = problems_of(build.check_method, config, pipe)
    assert line == f"data.buckets: {buckets.split(',')[-1]}: {told}"


@pytest.mark.parametrize(
    ("size", "expected"), [(KLEIN_4B, (34.8, 76.7, 128.9)), (KLEIN_9B, (75.5, 161.2, 264.6))]
)
def test_work_of_a_forward_is_the_count_of_its_products(size, expected):
    """At 1024 x 1024 with no, one and two references of that size, in TFLOP, contexts embedded."""
    for references, tera in enumerate(expected):
        rows = 512 + 4096 * references
        work = family.velocity_work(size, 64, 64, rows, {}, lambda slot: 0)
        assert work.forward / 1e12 == pytest.approx(tera, abs=0.06)
