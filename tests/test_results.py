"""A result is compared with its recorded digest before it is announced."""

import json

import pytest

from dopsd_jax.training.results import FILE, Results

SETTINGS = {"export_weights": "student", "export_dtype": "bfloat16"}


@pytest.fixture
def run(tmp_path):
    """A work directory with a file and a folder as results."""
    paths = [tmp_path / "lora" / "step_4.safetensors", tmp_path / "model" / "step_4"]
    (paths[1] / "vae").mkdir(parents=True)
    paths[0].parent.mkdir()
    paths[0].write_bytes(b"weights")
    (paths[1] / "config.json").write_text("{}")
    (paths[1] / "vae" / "x.safetensors").write_bytes(b"vae")
    Results(tmp_path, SETTINGS).record(paths)
    return tmp_path, paths


def test_untouched_results_have_no_fault(run):
    folder, paths = run
    assert Results(folder, SETTINGS).faults(paths) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [("lora/step_4.safetensors", b""), ("lora/step_4.safetensors", b"weighty"),
     ("model/step_4/vae/x.safetensors", b"vaf"), ("model/step_4/more", b"more")],
)  # fmt: skip
def test_what_was_emptied_or_changed_is_found(run, name, content):
    folder, paths = run
    (folder / name).write_bytes(content)
    (fault,) = Results(folder, SETTINGS).faults(paths)
    assert name.partition("/")[0] in fault and "was changed or damaged" in fault


def test_what_is_missing_or_of_other_settings_is_found(run):
    folder, paths = run
    assert len(Results(folder, {"export_weights": "teacher"}).faults(paths)) == 2
    paths[0].unlink()
    (paths[1] / "config.json").unlink()
    faults = Results(folder, SETTINGS).faults(paths)
    assert "is missing" in faults[0] and "changed" in faults[1]


@pytest.mark.parametrize(
    "content", ["", "null", "[]", '{"lora/step_4.safetensors": 3}', "[" * 10**5]
)
def test_a_record_that_cannot_be_read_proves_nothing(run, content):
    folder, paths = run
    (folder / FILE).write_text(content)
    assert len(Results(folder, SETTINGS).faults(paths)) == 2


def test_records_of_removed_results_go(run):
    folder, paths = run
    paths[0].unlink()
    new = folder / "lora" / "step_6.safetensors"
    new.write_bytes(b"new")
    Results(folder, SETTINGS).record([new])
    assert json.loads((folder / FILE).read_text()).keys() == {
        "model/step_4", "lora/step_6.safetensors"
    }  # fmt: skip
