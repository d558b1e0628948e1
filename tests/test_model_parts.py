"""Every part of a model folder that determines a result must be there, and is in cache keys."""

import json
import shutil

import pytest
from weights_helpers import SMALL

from dopsd_jax import families
from dopsd_jax.common.errors import UserError
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.conversion.inspection import inspect
from dopsd_jax.random_model import write_random_model


def open_pipeline(folder):
    family = families.load("zimage")
    return family.Pipeline(family, folder)


@pytest.fixture
def model(tmp_path):
    return write_random_model(tmp_path / "model", size=SMALL)


@pytest.mark.parametrize(
    "part",
    [
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
        "vlm/preprocessor_config.json",
    ],
)
def test_a_part_that_is_missing_is_named_before_anything_is_written(model, tmp_path, part):
    (model / part).unlink()
    with pytest.raises(UserError) as caught:
        import_model(model, tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{model / part}: no such file")
    assert not (tmp_path / "out").exists()
    assert any(part in line for line in inspect(model))


def test_no_tokenizer_is_made_up(model):
    (model / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        _ = open_pipeline(model).tokenizer
    shutil.rmtree(model / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        _ = open_pipeline(model).tokenizer


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {"type": "BPE"}}', "<html>", ""])
def test_a_broken_tokenizer_is_one_line(model, content):
    (model / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer") as caught:
        _ = open_pipeline(model).tokenizer
    assert len(caught.value.problems) == 1


def test_a_tokenizer_beyond_the_encoders_vocabulary_is_refused(model):
    path = model / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 300}))
    with pytest.raises(UserError, match=r"ids up to .*; the text encoder knows"):
        _ = open_pipeline(model).tokenizer


def test_what_is_cached_depends_on_tokenizer_and_picture_settings(model, tmp_path):
    digest = lambda name: open_pipeline(model).part_digest(name, tmp_path / "memo.json")
    before = {name: digest(name) for name in ("text_encoder", "vlm", "vae")}
    path = model / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"further": 1}))
    assert digest("text_encoder") != before["text_encoder"]
    assert digest("vae") == before["vae"]
    path = model / "vlm" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    assert digest("vlm") != before["vlm"]
