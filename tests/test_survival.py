"""A run that is stopped and killed on its way equals one that was left alone, bit for bit."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import RANDOM_CONFIG, ROOT, run_program
from orbax.checkpoint import v1 as ocp

from dopsd_jax.reporting.metrics import read_metrics
from dopsd_jax.training.checkpoint import Checkpoints
from dopsd_jax.weights.safetensors_io import TensorFiles

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
CLOCK = ("seconds", "images_per_second", "input_seconds")


def launch(workdir, *options):
    command = [sys.executable, "-m", "dopsd_jax.train", *RANDOM_CONFIG, f"--workdir={workdir}"]
    return subprocess.Popen(
        [*map(str, command), *options], cwd=ROOT, text=True, env=os.environ,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(process, happened, patience=400):
    begin = time.monotonic()
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < patience
        time.sleep(0.002)


def bits(workdir, step=4):
    files = TensorFiles.open(workdir / "lora" / f"step_{step}.safetensors")
    return {name: files.read(name) for name in files.infos}


def numbers(workdir):
    return [
        {k: v for k, v in record.items() if k not in CLOCK}
        for record in read_metrics(workdir / "metrics.jsonl")
    ]


def test_a_run_stopped_by_a_signal_and_killed_while_saving_is_the_same_run(random_run, tmp_path):
    """Other checkpoints and previews on its way than the one that was left alone."""
    workdir = tmp_path / "run"
    for name in ("random_model", "random_data", "features"):
        shutil.copytree(random_run / name, workdir / name)
    options = "--config.checkpoint_every=1", "--config.sample_every=3"

    # Asked to stop while the first step is compiled.
    process = launch(workdir, *options)
    wait_for(process, (workdir / "samples" / "step_000000.png").exists)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 75, stderr
    stopped = Checkpoints(workdir / "checkpoints", 1).steps[-1]
    assert stopped < 4 and f"stopped after step {stopped}, which is saved" in stdout

    # Killed while it saves the next step: orbax has begun, the digests are not there.
    process = launch(workdir, *options)
    folder = workdir / "checkpoints"
    begun = lambda: [p for p in folder.iterdir() if p.name.startswith(str(stopped + 1))]
    wait_for(process, begun)
    process.kill()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and f"resuming at step {stopped}" in stdout
    assert stopped in Checkpoints(folder, 1).steps

    process = launch(workdir, *options)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    assert numbers(workdir) == numbers(random_run)
    assert [r["step"] for r in read_metrics(workdir / "metrics.jsonl")] == [1, 2, 3, 4]
    whole = bits(random_run)
    for name, array in bits(workdir).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    # Student, teacher, optimizer and step.
    ours, whole = (ocp.load(w / "checkpoints" / "4") for w in (workdir, random_run))
    assert {name.partition(".")[0] for name in whole} == {
        "step", "student", "teacher", "opt_state"
    }  # fmt: skip
    for name, array in whole.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    random_run, tmp_path
):
    workdir = tmp_path / "run"
    for name in ("random_model", "random_data", "features"):
        shutil.copytree(random_run / name, workdir / name)
    # A learning rate that float32 adapters survive one step of, and no more.
    process = launch(workdir, "--config.learning_rate=1e29", "--config.checkpoint_every=9")
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 2, stdout + stderr
    (line,) = [x for x in stderr.splitlines() if x.startswith("error: ")]
    assert "step 2: its loss or gradient is not finite" in line and "after step 1 is saved" in line
    incident = json.loads((workdir / "incidents" / "step_2.json").read_text())
    assert len(incident["samples"]) == 2 and incident["metrics"]["step"] == 2
    assert all((workdir / s["image"]).exists() for s in incident["samples"])
    assert Checkpoints(workdir / "checkpoints", 3).steps == [1]
    assert all(np.isfinite(array).all() for array in bits(workdir, 1).values())


def test_a_failed_export_costs_nothing_that_was_learned(random_run, tmp_path):
    """The state is saved before the file; the next start writes what is missing, and draws it."""
    workdir = tmp_path / "run"
    shutil.copytree(random_run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    path = workdir / "lora" / "step_4.safetensors"
    whole = path.read_bytes()
    path.unlink()
    (path / "in the way").mkdir(parents=True)
    grid = workdir / "samples" / "step_000004.png"
    grid.unlink()
    result = run_program("train", *RANDOM_CONFIG, f"--workdir={workdir}")
    assert result.returncode == 2 and f"error: {path}: is a folder" in result.stderr
    assert Checkpoints(workdir / "checkpoints", 3).steps == [2, 4]
    shutil.rmtree(path)
    assert not grid.exists()
    result = run_program("train", *RANDOM_CONFIG, f"--workdir={workdir}")
    assert result.returncode == 0 and "resuming at step 4" in result.stdout, result.stderr
    assert f"{path}: is missing; it is written again" in result.stdout
    assert path.read_bytes() == whole and grid.exists()


def test_skipped_steps_that_end_a_run_are_all_recorded(random_run, tmp_path):
    """The state counts the step after the tenth, too."""
    workdir = tmp_path / "run"
    for name in ("random_model", "random_data", "features"):
        shutil.copytree(random_run / name, workdir / name)
    result = run_program(
        "train", *RANDOM_CONFIG, f"--workdir={workdir}", "--config.learning_rate=1e29",
        "--config.nonfinite=skip", "--config.steps=20", "--config.checkpoint_every=99",
    )  # fmt: skip
    assert result.returncode == 2 and "10 steps in a row were skipped" in result.stderr
    (kept,) = Checkpoints(workdir / "checkpoints", 3).steps
    assert [r["step"] for r in read_metrics(workdir / "metrics.jsonl")] == list(range(1, kept + 1))


def test_stops_are_only_noted_until_the_last_save_is_written():
    """What is named first in the block that trains is left last."""
    tree = ast.parse((ROOT / "dopsd_jax" / "train.py").read_text(encoding="utf-8"))
    blocks = [[ast.unparse(i.context_expr) for i in n.items] for n in ast.walk(tree)
              if isinstance(n, ast.With)]  # fmt: skip
    (block,) = [names for names in blocks if "checkpoints" in names]
    assert block[0] == "StopRequest()"
