"""Trackers: what they are given, and that the run needs none of them."""

import importlib.util
import struct
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from dopsd_jax.common.errors import UserError
from dopsd_jax.config import schema
from dopsd_jax.config.fields import TRACKERS, defaults
from dopsd_jax.reporting import trackers
from dopsd_jax.reporting.trackers import Trackers, scalars

RECORD = {
    "step": 3,
    "loss": jnp.float32(0.1),
    "loss_per_step": jnp.array([0.5, jnp.nan, 0.25]),
    "verdict": "good",
    "skipped": False,
}


def configured(*names):
    config = defaults()
    config.model, config.data.path, config.trackers = "model", "data", ",".join(names)
    return config


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "grid.png"
    Image.fromarray(np.full((8, 12, 3), 200, np.uint8)).save(path)
    return path


def events(folder):
    """The events in all files of a folder, in the order they were written."""
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def test_numbers_of_a_record_have_names_and_nothing_else_is_one():
    assert scalars(RECORD) == {"loss": 0.1, "loss_per_step/0": 0.5, "loss_per_step/2": 0.25}


def test_tensorboard_has_numbers_pictures_and_the_configuration(tmp_path, picture):
    said = []
    with Trackers(configured("tensorboard"), tmp_path, 0, said.append) as kept:
        kept.numbers(RECORD)
        kept.picture(3, "samples", picture)
    values = [(e.step, v) for e in events(tmp_path / "tensorboard") for v in e.summary.value]
    numbers = {v.tag: v.simple_value for step, v in values if step == 3 and v.tag != "samples"}
    assert numbers == pytest.approx(scalars(RECORD))
    (shown,) = [v.image for _, v in values if v.tag == "samples"]
    assert (shown.height, shown.width) == (8, 12)
    (text,) = [v.tensor.string_val[0] for _, v in values if v.tag.startswith("config")]
    assert b"    learning_rate = 0.0001" in text
    assert not said


def test_a_resumed_run_hides_what_was_written_after_its_checkpoint(tmp_path):
    for first in (0, 2):
        with Trackers(configured("tensorboard"), tmp_path, first, print) as kept:
            kept.numbers({"step": first + 1, "loss": 1.0})
    started = [e.step for e in events(tmp_path / "tensorboard") if e.session_log.status == 1]
    assert started == [3]  # SessionLog.START: readers drop what has this step or a later one


def test_wandb_goes_on_in_the_same_run(tmp_path, picture, monkeypatch):
    calls, logged = [], []
    run = SimpleNamespace(
        id="abc", log=lambda values, step: logged.append((step, values)), finish=lambda: None
    )
    wandb = SimpleNamespace(
        init=lambda **options: calls.append(options) or run, Image=lambda image: image.shape
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first in (0, 2):
        with Trackers(configured("wandb"), tmp_path, first, print) as kept:
            kept.numbers(RECORD)
            kept.picture(3, "samples", picture)
    assert [c["id"] for c in calls] == [None, "abc"]
    assert all(c["resume"] == "allow" and c["config"]["learning_rate"] == 1e-4 for c in calls)
    assert logged[:2] == [(3, scalars(RECORD)), (3, {"samples": (8, 12, 3)})]


def test_a_tracker_that_fails_is_said_once_and_left(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *_):
            pass

        def numbers(self, step, values):
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(trackers.KINDS, "tensorboard", Broken)
    said = []
    with Trackers(configured("tensorboard"), tmp_path, 0, said.append) as kept:
        kept.numbers(RECORD)
        kept.numbers(RECORD)
    (line,) = said
    assert "tensorboard fails, the run goes on without it" in line and "No space left" in line


def test_other_processes_write_nothing(tmp_path):
    with Trackers(configured("tensorboard"), tmp_path, 0, print, write=False) as kept:
        kept.numbers(RECORD)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_or_unknown_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"config\.trackers: 'mlflow' is not one of tensorboard"):
        schema.check(configured("mlflow"))
    there = importlib.util.find_spec
    gone = lambda name: None if name in TRACKERS.values() else there(name)
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    with pytest.raises(UserError, match=r"tensorboardX; pip install 'dopsd_jax\[tensorboard\]'"):
        schema.check(configured("tensorboard"))
