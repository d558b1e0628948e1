"""The programs, run as a user runs them, on the miniature."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import OWN_PROMPT, RANDOM_CONFIG, ROOT, run_program
from PIL import Image
from torch_reference import sample_with_diffusers

import dopsd_jax
from dopsd_jax.common.config_fields import name_or_list
from dopsd_jax.common.errors import UserError
from dopsd_jax.config import schema
from dopsd_jax.config.fields import declared
from dopsd_jax.families.sampling import start_noise
from dopsd_jax.reporting.pictures import read_labels
from dopsd_jax.run.lock import exclusive
from dopsd_jax.run.workdir import open_workdir
from dopsd_jax.training.checkpoint import Checkpoints
from dopsd_jax.weights.safetensors_io import TensorFiles

pytestmark = pytest.mark.slow
PROMPT = "a large green circle on the left"


def tensors(path):
    files = TensorFiles.open(path)
    return {name: files.read(name) for name in files.infos}


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same_numbers(a, b):
    """Equal records but for what a clock measured."""
    clock = ("seconds", "images_per_second", "input_seconds")
    strip = lambda rows: [{k: v for k, v in r.items() if k not in clock} for r in rows]
    assert strip(a) == strip(b)


def test_a_run_leaves_what_is_promised(random_run):
    rows = records(random_run)
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    wanted = {"step", "loss", "loss_per_step", "gap", "norm_ratio", "grad_norm", "lr"}
    wanted |= {"seconds", "input_seconds"}
    assert all(
        wanted | {"images_per_second"} <= r.keys() and len(r["loss_per_step"]) == 2 for r in rows
    )
    assert all(r["loss"] > 0 and r["grad_norm"] > 0 for r in rows)
    config = json.loads((random_run / "config.json").read_text())
    assert config["config"].keys() == declared().keys()
    assert config["config"]["steps"] == 4 and len(config["facts"]["data"]) == 64
    assert "jax" in config["versions"]
    # The fixture's remat is auto, and here is memory enough.
    assert config["config"]["remat"] == "auto"
    assert config["chosen"]["remat"] == "none" and config["chosen"]["attention"] == "xla"
    assert "remat: none, chosen by auto" in (random_run / "stdout.txt").read_text()
    for step in (0, 4):
        with Image.open(random_run / f"samples/step_{step:06d}.png") as picture:
            labels = read_labels(picture)
        assert labels.columns == ("target", "base", "teacher", "tuned")
        assert len(labels.captions) == 2 and labels.captions[-1] == OWN_PROMPT
    start = json.loads((random_run / "start.json").read_text())
    assert {"imports", "encoding", "weights", "compiling", "first step"} < start.keys()
    assert "start: " in (random_run / "stdout.txt").read_text()
    assert any((random_run / "tensorboard").iterdir())
    assert {p.name for p in (random_run / "lora").iterdir()} == {
        "step_2.safetensors",
        "step_4.safetensors",
    }
    about = TensorFiles.open(random_run / "lora" / "step_4.safetensors").metadata
    assert about["dopsd_jax.data_digest"] == config["facts"]["data"]
    assert len(about["dopsd_jax.base_digest"]) == 64
    assert config["facts"]["base_digest"] == about["dopsd_jax.base_digest"]
    assert about["ss_steps"] == "4"
    assert about["modelspec.usage_hint"].startswith("8 steps, no guidance")
    assert not any(str(random_run) in text for text in about.values())
    assert "<svg" in (random_run / "report.html").read_text()
    output = (random_run / "stdout.txt").read_text()
    assert re.search(r"step +4/4 .*loss .*gap .*images/s", output)
    assert "adapters: 49 layers" in output


def test_the_exported_lora_gives_diffusers_the_pictures_we_sample(random_run, tmp_path):
    """Loaded by diffusers' own load_lora_weights, and merged: the same image from one noise."""
    model, file = random_run / "random_model", random_run / "lora" / "step_4.safetensors"
    result = run_program(
        "sample", f"--model={model}", f"--lora={file}", f"--prompt={PROMPT}", f"--out={tmp_path}",
        "--height=96", "--width=112", "--seed=7",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "000_seed7.png") as picture:
        ours = np.asarray(picture).astype(int)
        assert picture.text["prompt"] == PROMPT
    noise = np.asarray(start_noise(7, 1, (12, 14, 16)))
    theirs = sample_with_diffusers(model, [PROMPT], noise, lora=file)[0].astype(int)
    assert np.abs(ours - theirs).max() <= 2
    merged = tmp_path / "merged"
    result = run_program("convert", "merge", model, file, merged, "--format", "diffusers")
    assert result.returncode == 0, result.stderr
    theirs = sample_with_diffusers(merged, [PROMPT], noise)[0].astype(int)
    assert np.abs(ours - theirs).max() <= 2
    pipe = dopsd_jax.load_pipeline(str(merged))
    again = pipe([PROMPT], height=96, width=112, latents=noise)[0].astype(int)
    assert np.abs(ours - again).max() <= 2


def test_a_result_that_was_altered_is_written_again_from_the_state(random_run, tmp_path):
    """And an intact one is left alone."""
    workdir = tmp_path / "run"
    shutil.copytree(random_run, workdir)
    path = workdir / "lora" / "step_4.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    result = run_program("train", *RANDOM_CONFIG, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert f"{path}: was changed or damaged; it is written again" in result.stdout
    assert result.stdout.index("written again") < result.stdout.index(f"result: {path}")
    assert path.read_bytes() == whole
    same_numbers(records(workdir), records(random_run))
    written = path.stat().st_mtime_ns
    again = run_program("train", *RANDOM_CONFIG, f"--workdir={workdir}")
    assert again.returncode == 0 and "written again" not in again.stdout, again.stderr
    assert f"result: {path}" in again.stdout and path.stat().st_mtime_ns == written


def test_a_second_training_in_one_work_directory_is_refused(random_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(random_run, workdir)
    before = (workdir / "metrics.jsonl").read_bytes()
    with exclusive(workdir, "training"):
        result = run_program("train", *RANDOM_CONFIG, f"--workdir={workdir}", "--config.steps=6")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert f"process {os.getpid()} on " in line and str(workdir) in line
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_another_configuration_does_not_touch_the_run(random_run):
    before = (random_run / "metrics.jsonl").read_bytes()
    result = run_program(
        "train", *RANDOM_CONFIG, f"--workdir={random_run}", "--config.learning_rate=0.5",
        "--config.lora.rank=2",
    )  # fmt: skip
    assert result.returncode == 2
    errors = result.stderr.strip().splitlines()
    assert len([e for e in errors if e.startswith("error: ")]) == 2
    assert "config.learning_rate = 0.001, now 0.5" in result.stderr
    assert "config.lora.rank = 8, now 2" in result.stderr
    assert (random_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--config.stepz=4"], ["stepz"]),
        (["--config.steps=many"], ["many"]),
        (["--config.steps=0", "--config.loss=", "--config.remat=x"], ["steps: 0", "loss", "remat"]),
        (["--config.method=ppo", "--config.learning_rate=-1"], ["method", "learning_rate"]),
        (["--config.data.path=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--config.model=/nowhere/model"], ["/nowhere/model"]),
        (["--config.model=some-owner/some-model"], ["HF_HUB_OFFLINE"]),
        (["--config.lora.targets=attention.to_q,ff.net"], ["'ff.net' matches no linear layer"]),
        (["--config.data.buckets=100x96"], ["not a multiple of 16"]),
        (["--config.data.resolution=100", "--config.data.buckets="], ["not a multiple of 16"]),
        (["--config.mesh.data=3"], ["config.mesh"]),
        (["--config.attention=splash"], ["config.attention"]),
        (["--config.lora.init_from=/nowhere.safetensors"], ["/nowhere.safetensors"]),
        (["--config.train=full", "--config.lora.rank=2"], ["config.lora.rank: has no effect"]),
        (["stray"], ["stray"]),
    ],
)  # fmt: skip
def test_bad_input_is_a_clear_line_each_and_no_traceback(random_run, tmp_path, arguments, messages):
    workdir = tmp_path / "run"
    for name in ("random_model", "random_data", "features"):
        shutil.copytree(random_run / name, workdir / name)
    result = run_program("train", *RANDOM_CONFIG, f"--workdir={workdir}", *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for message in messages:
        assert any(message in line for line in lines), (message, result.stderr)


def test_an_unknown_configuration_argument_is_named(tmp_path):
    result = run_program(
        "train", f"--config={ROOT}/configs/zimage.py:small", f"--workdir={tmp_path}"
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    known = "lora, released, 12gb, 16gb, 24gb, 48gb, 80gb, full, tiny, "
    assert f"'small' is not one of {known}" in result.stderr
    result = run_program("train", "--config=/no/such/config.py", f"--workdir={tmp_path}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "/no/such/config.py" in result.stderr


def test_check_reports_before_training(random_run, tmp_path):
    workdir = tmp_path / "run"
    for name in ("random_model", "random_data", "features"):
        shutil.copytree(random_run / name, workdir / name)
    rounded = "--config.teacher.products=fp8"
    result = run_program("check", *RANDOM_CONFIG, rounded, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    for words in (
        "data: 8 rows", "bucket 96x96", "adapters: 49 layers, 67,984 parameters",
        "memory", "TFLOP", "teacher: relative gap by step", "distance to the target",
        "sharpness of clean estimates by step", "row 1: likeness to its picture: teacher",
        "teacher.products = fp8: relative error of the teacher's velocity by step 0.0",
    ):  # fmt: skip
        assert words in result.stdout, words
    assert re.search("^(advice|warning): .*(teacher|estimate)", result.stdout, re.MULTILINE)
    assert "not asked" not in result.stdout
    assert (workdir / "check.png").exists()
    assert not (workdir / "metrics.jsonl").exists() and not (workdir / "config.json").exists()


def test_every_configuration_has_exactly_the_known_fields():
    get_config = runpy.run_path(str(ROOT / "configs/zimage.py"))["get_config"]
    for arg in (None, "lora", "full", "tiny", "tiny_full", "random", "random_full"):
        config = get_config(arg)
        assert schema.flat(config).keys() == declared().keys()
        config.data.path = config.data.path or "somewhere"
        schema.check(config)


def test_a_list_may_be_written_on_the_command_line():
    assert name_or_list("1, 0.9,0.5") == (1, 0.9, 0.5)
    assert name_or_list("(0, 2)") == (0, 2)
    assert name_or_list("attention.to_q,feed_forward.w1") == (
        "attention.to_q",
        "feed_forward.w1",
    )
    assert name_or_list("nodes4") == "nodes4"
    assert name_or_list("random:1") == "random:1"
    assert name_or_list("3") == (3,)


def test_a_caption_longer_than_the_model_takes_is_named_before_training(random_run, tmp_path):
    workdir, photos = tmp_path / "run", tmp_path / "photos"
    shutil.copytree(random_run / "random_model", workdir / "random_model")
    shutil.copytree(random_run / "random_data", photos)
    for name in ("000", "001", "002", "003", "004"):
        (photos / f"{name}.txt").write_text("word " * 700)
    result = run_program(
        "train", *RANDOM_CONFIG, f"--workdir={workdir}", f"--config.data.path={photos}"
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for name in ("000", "001", "002"):
        assert re.search(rf"{name}\.\w+: the prompt 'word .* tokens .*512", result.stderr)
    assert result.stderr.splitlines()[3:] == ["error: ... and 2 more like these"]
    assert not (workdir / "metrics.jsonl").exists()


def test_a_run_that_a_full_disk_ended_goes_on_bit_for_bit(random_run, tmp_path):
    """Files cannot grow past what the first checkpoint took: the next, larger write fails."""
    workdir = tmp_path / "run"
    shutil.copytree(random_run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "lora" / "step_4.safetensors").unlink()
    before = (workdir / "lora" / "step_2.safetensors").read_bytes()
    # 390 KiB a file: enough for a LoRA file, too little for a checkpoint.
    command = shlex.join(
        [sys.executable, "-m", "dopsd_jax.train", *RANDOM_CONFIG, f"--workdir={workdir}"]
    )
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 390; exec {command}"],
        capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 2, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "disk is full" in errors[0] and "Traceback" not in result.stderr
    assert (workdir / "lora" / "step_2.safetensors").read_bytes() == before
    assert Checkpoints(workdir / "checkpoints", keep=3).steps == [2]
    # What a kill leaves: a half-written checkpoint and a half-written line.
    (workdir / "checkpoints" / "4.orbax-checkpoint-tmp-0").mkdir(exist_ok=True)
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    again = run_program("train", *RANDOM_CONFIG, f"--workdir={workdir}")
    assert again.returncode == 0 and "resuming at step 2" in again.stdout, again.stderr
    same_numbers(records(workdir), records(random_run))
    ours, whole = (tensors(w / "lora" / "step_4.safetensors") for w in (workdir, random_run))
    assert ours.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_a_run_goes_on_with_another_rate_if_that_is_allowed(random_run, tmp_path):
    """The rate takes effect with the first step after the checkpoint, and the change is kept."""
    workdir = tmp_path / "run"
    shutil.copytree(random_run, workdir)
    more = (f"--workdir={workdir}", "--config.steps=5", "--config.learning_rate=5e-4")
    refused = run_program("train", *RANDOM_CONFIG, *more)
    assert refused.returncode == 2
    assert "--allow_changes=learning_rate" in refused.stderr
    assert "config.lora.init_from" in refused.stderr
    # What is refused for another reason changes nothing.
    before, data = (workdir / "config.json").read_text(), tmp_path / "long"
    shutil.copytree(workdir / "random_data", data)
    next(data.glob("*.txt")).write_text("a long caption " * 600)
    more_allowed = "--allow_changes=learning_rate,data"
    refused = run_program(
        "train", *RANDOM_CONFIG, *more, more_allowed, f"--config.data.path={data}"
    )
    assert refused.returncode == 2 and "tokens with its template" in refused.stderr
    assert (workdir / "config.json").read_text() == before
    allowed = run_program("train", *RANDOM_CONFIG, *more, "--allow_changes=learning_rate")
    assert allowed.returncode == 0, allowed.stderr
    assert [r["lr"] for r in records(workdir)] == pytest.approx([1e-3] * 4 + [5e-4], rel=1e-6)
    changes = json.loads((workdir / "config.json").read_text())["changes"]
    assert changes == [{"step": 4, "field": "learning_rate", "old": 0.001, "new": 0.0005}]
    assert "Changed on the way" in (workdir / "report.html").read_text()


def test_a_run_that_has_saved_nothing_may_be_corrected(tmp_path):
    open_workdir(tmp_path, {"learning_rate": 1.0}, {"data": "a"})
    open_workdir(tmp_path, {"learning_rate": 0.1}, {"data": "b"})
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    open_workdir(tmp_path, {"learning_rate": 0.1}, {"data": "b"})
    with pytest.raises(UserError) as error:
        open_workdir(tmp_path, {"learning_rate": 0.2}, {"data": "c"})
    assert len(error.value.problems) == 2
