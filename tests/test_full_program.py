"""A full run as a user makes it, and the model that comes out of it."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_program
from torch_reference import sample_with_diffusers

import dopsd_jax
from dopsd_jax.families.sampling import start_noise
from dopsd_jax.families.zimage import networks
from dopsd_jax.weights.stored import open_stored

pytestmark = pytest.mark.slow
PROMPT = "a large green circle on the left"
ARGUMENTS = (
    f"--config={ROOT}/configs/zimage.py:random_full",
    "--config.steps=2",
    "--config.learning_rate=1e-3",
    "--config.checkpoint_every=1",
    "--config.sample_every=0",
    "--config.sample_rows=1",
    "--config.data.buckets=96x96",
    "--config.grid=1,0.5",
    "--config.offload=teacher,optimizer",
    "--config.moments_dtype=bfloat16",
    "--config.export=diffusers,comfyui",
    "--config.export_every=1",
)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("full")
    result = run_program("train", *ARGUMENTS, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    (workdir / "stdout.txt").write_text(result.stdout)
    return workdir


def tensors(folder, weights=None):
    stored = open_stored(folder, networks.ZIMAGE["transformer"], weights)
    return {name: stored.tensors.read(name) for name in stored.tensors.infos}


def test_a_full_run_leaves_what_is_promised(full_run):
    output = (full_run / "stdout.txt").read_text()
    assert "the whole transformer: 773,984 parameters in float32" in output
    assert [p for p in re.findall(r"result: (\S+)", output)] == [
        str(full_run / "model" / "step_2"),
        str(full_run / "model" / "step_2.safetensors"),
    ]
    # Only the newest model is kept.
    assert {p.name for p in (full_run / "model").iterdir()} == {"step_2", "step_2.safetensors"}
    assert {p.name for p in (full_run / "samples").iterdir()} == {
        "step_000000.png",
        "step_000002.png",
        "training.png",
    }
    rows = [json.loads(line) for line in (full_run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2] and all(r["grad_norm"] > 0 for r in rows)
    assert "<svg" in (full_run / "report.html").read_text()


def test_a_run_that_ends_early_writes_its_model_once(full_run, tmp_path):
    """Without config.export_every; nothing is said to be missing."""
    workdir = shutil.copytree(full_run, tmp_path / "run")
    result = run_program(
        "train", *ARGUMENTS, f"--workdir={workdir}", "--config.steps=5", "--config.export_every=0",
        "--config.data.holdout=1", "--config.stop.patience=1", "--config.stop.tolerance=1",
        "--allow_changes=data",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "ended at step 3: " in result.stdout and "is missing" not in result.stdout
    assert {p.name for p in (workdir / "model").iterdir()} == {"step_3", "step_3.safetensors"}


def test_diffusers_draws_what_we_draw_with_the_delivered_model(full_run):
    noise = np.asarray(start_noise(7, 1, (12, 14, 16)))

    def ours(folder):
        pipe = dopsd_jax.load_pipeline(str(folder))
        return pipe([PROMPT], height=96, width=112, latents=noise)[0].astype(int)

    model = full_run / "model" / "step_2"
    tuned = ours(model)
    theirs = sample_with_diffusers(model, [PROMPT], noise)[0].astype(int)
    assert np.abs(tuned - theirs).max() <= 2
    assert np.abs(tuned - ours(full_run / "random_model")).max() > 8


def test_the_single_file_holds_the_same_network_and_every_tensor_has_moved(full_run):
    model = full_run / "model" / "step_2"
    folder = tensors(model / "transformer")
    single = tensors(model / "transformer", full_run / "model" / "step_2.safetensors")
    start = tensors(full_run / "random_model" / "transformer")
    assert folder.keys() == single.keys() == start.keys()
    for name, array in folder.items():
        np.testing.assert_array_equal(array, single[name], err_msg=name)
        assert str(array.dtype) == "bfloat16" and array.shape == start[name].shape
    moved = [name for name in folder if (folder[name] != start[name].astype("bfloat16")).any()]
    assert len(moved) > 0.9 * len(folder)
