"""Settings arrive where they act: in a run whose steps compute nothing and all are refused."""

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath
from test_written_previews import configured

from dopsd_jax import train
from dopsd_jax.config.loading import load
from dopsd_jax.data.varied import CaptionVariants
from dopsd_jax.run import data_set
from dopsd_jax.training import train_step
from dopsd_jax.training.nonfinite import PARTS

REFUSED = {
    "loss": np.nan,
    "loss_per_step": np.full(2, np.nan),
    "gap": np.nan,
    "norm_ratio": np.nan,
    "grad_norm": np.nan,
    "lr": np.float32(1e-3),
    "finite": np.zeros(len(PARTS), bool),
}


@pytest.fixture
def seen(monkeypatch):
    """What a run hands on, by name of the parameter; it draws no pictures."""
    found = {}

    def record(place, name, instead=None):
        own = getattr(place, name)

        def call(*args, **named):
            found[name] = inspect.signature(own).bind(*args, **named).arguments
            return own(*args, **named) if instead is None else instead

        monkeypatch.setattr(place, name, call)

    def step(state, *given, latent):
        return state._replace(step=state.step + 1), dict(REFUSED)

    record(train, "Batches")
    record(train, "Checkpoints")
    record(train_step, "make_step", step)
    record(train, "EarlyStep", SimpleNamespace(plan=None, saved=0.0, finish=lambda: None))
    record(train, "Previews", SimpleNamespace(write=lambda *given: None))
    record(train, "write_training_pictures", ())
    return found


def test_settings_of_a_run(random_model, tmp_path, seen):
    fields = {"keep_checkpoints": "1", "keep_every": "2", "nonfinite": "skip", "seed": "7"}
    fields |= {
        "model": str(random_model),
        "data.prompt_draw": "row",
        "data.caption_dropout": "0.25",
    }
    config = configured(steps="3", checkpoint_every="1", method="sft", **fields)
    assert train.train(config, epath.Path(tmp_path)) is None  # three in a row are no end
    handed = {"draw": "row", "dropout": 0.25, "seed": 7}
    assert seen["Batches"] | handed == seen["Batches"]
    assert (seen["Checkpoints"]["keep"], seen["Checkpoints"]["every"]) == (1, 2)
    assert seen["make_step"]["skip"] is True and seen["make_step"]["seed"] == 7
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"data.caption_dropout": "0.5"}, CaptionVariants(1, 0, None, True)),
        (
            {"data.shuffle_tags": "true", "data.tag_variants": "5", "data.keep_tags": "2"},
            CaptionVariants(5, 2, None, False),
        ),
        (
            {
                "data.shuffle_tags": "true",
                "teacher.context": "prompt",
                "teacher.prompt_key": "long",
            },
            CaptionVariants(8, 0, "long", False),
        ),
    ],
)
def test_more_captions_are_those_that_are_asked_for(fields, expected):
    assert data_set.caption_variants(load("zimage:random", fields)) == expected
