"""benchmarks/on_gpu.py: its cases are commands that can run, and it goes on where it was."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import gpu_card
import gpu_page
import numpy as np
import pytest
import torch
import torch_reference as reference
import torch_step
from conftest import ROOT
from gpu_cases import SECTIONS, XLA, Case, cases
from gpu_records import DONE, FAILED, FULL, LATE, left_out, run

from dopsd_jax.common.errors import UserError
from dopsd_jax.config import schema
from dopsd_jax.config.loading import load

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize("dry", [False, True], ids=["true size", "dry"])
def test_every_case_has_a_name_of_its_own_and_a_configuration_that_holds(dry):
    every = cases(dry)
    assert len({case.name for case in every}) == len(every)
    assert {case.section for case in every} == set(SECTIONS) == gpu_page.TABLES.keys()
    assert [case.name for case in every] == [case.name for case in cases(not dry)]
    seen = set()
    for case in every:
        script, *words = case.command
        assert (BENCHMARKS / script).is_file()
        if script != "step.py" or case.command in seen:
            continue
        seen.add(case.command)
        given = dict(word.removeprefix("--").split("=", 1) for word in words)
        spec, prefix = given.pop("config"), "config."
        asked = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
        config = load(str(ROOT / spec), asked)
        with config.unlocked():
            config.data.path = "photos"
        schema.check(config, asked)


def test_the_compiler_reads_the_switches():
    code = "import jax; jax.devices(); print('parsed')"
    for flags in (" ".join(XLA.values()), " ".join(reversed(XLA.values()))):
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == "parsed", done.stderr


def record(case: Case, outcome: str) -> dict:
    fields = {"name": case.name, "group": case.group, "card": case.card, "outcome": outcome}
    return {case.name: fields}


def test_a_case_is_run_once_and_a_larger_card_only_where_a_smaller_one_is_not_enough():
    small, large = (Case(f"card: x, {n} GB", (), card=n, group="card: x") for n in (12, 16))
    other = Case("step: x", ())
    why = lambda case, records, memory=80 << 30, again=False: left_out(case, records, memory, again)
    assert not why(small, {}) and not why(other, {})
    for outcome, again in ((DONE, False), (FULL, False), (LATE, True), (FAILED, True)):
        assert (why(other, record(other, outcome)) == "") == again
    assert why(other, record(other, DONE), again=True) == ""
    assert why(large, record(small, DONE)) == "a smaller card is enough"
    assert not why(large, record(small, FULL)) and not why(small, record(large, DONE))
    assert "has 14 GiB" in why(large, {}, 14 << 30) and not why(small, {}, 14 << 30)


# MiB that drivers tell of cards whose names have these GB: A10G, L4, RTX 4090, L40S, A100, H100.
@pytest.mark.parametrize(
    "gigabytes, told",
    [(24, 23028), (24, 23034), (24, 24564), (48, 46068), (80, 81920), (80, 81559)],
)
def test_a_card_of_a_size_is_measured_at_it(gigabytes, told):
    case = Case("card: x", (), card=gigabytes, group="x")
    assert not left_out(case, {}, told << 20, False)
    assert left_out(case._replace(card=2 * gigabytes), {}, told << 20, False)


def smi(*rows):
    """Lines of nvidia-smi: index, memory, used."""
    return [f"{i}, GPU-{i}, NVIDIA X, {total}, {used}, 570.1" for i, total, used in rows]


def test_the_idlest_gpu_that_may_be_used_is_measured():
    lines = smi((0, 81559, 70000), (1, 81559, 4), (2, 24564, 0))
    assert gpu_card.choose(lines, None) == ("NVIDIA X", 24564 << 20, "GPU-2", "570.1")
    assert gpu_card.choose(lines, "0,1").uuid == gpu_card.choose(lines, "GPU-1").uuid == "GPU-1"
    for visible, told in (
        ("0", "70000 MiB of NVIDIA X are in use"),
        ("7", "no NVIDIA GPU is here"),
    ):
        with pytest.raises(UserError, match=told):
            gpu_card.choose(lines, visible)
    with pytest.raises(UserError, match="no NVIDIA GPU is here"):
        gpu_card.choose([], None)
    with pytest.raises(UserError, match="does not say how much memory NVIDIA X has"):
        gpu_card.choose(smi((0, "[N/A]", "[N/A]")), None)


def test_on_a_gpu_nothing_is_timed_that_pytorch_has_not():
    """Anchors are work beside the step; PyTorch's loop has none."""
    words = [case.command for case in cases(False) if case.command[0] == "step.py"]
    assert words and all("--config.anchor.share=0.0" in command for command in words)


@pytest.mark.slow
def test_a_stopped_run_ends_its_case_and_leaves_a_page(tmp_path):
    page = tmp_path / "p.md"
    own = [f"--records={tmp_path / 'r.jsonl'}", f"--page={page}", "--dry"]
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py"), *own, "--cases=step: zimage, batch 1"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("1/4 step: zimage, batch 1, none")
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    script = lambda child: b"step.py" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
    while not any(map(script, found := children.read_text().split())):
        time.sleep(0.5)
    time.sleep(1)  # until the benchmark knows of its case
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"wrote {page}" in out and "has not been run yet" in page.read_text()
    assert not any(pathlib.Path(f"/proc/{child}").exists() for child in found)


@pytest.mark.parametrize(
    "code, seconds, outcome",
    [
        ("print('result: {\"a\": 1}')", 60, DONE),
        ("raise SystemExit('RESOURCE_EXHAUSTED: Out of memory')", 60, FULL),
        ("raise SystemExit('torch.OutOfMemoryError: CUDA out of memory.')", 60, FULL),
        ("print('result: {}'); raise SystemExit('no such thing')", 60, FAILED),
        ("pass", 60, FAILED),
        ("import time; time.sleep(600)", 1, LATE),
    ],
)
def test_how_a_case_ends(code, seconds, outcome):
    found, result = run([sys.executable, "-c", code], dict(os.environ), seconds)
    assert found == outcome
    assert result == {"a": 1} if outcome == DONE else set(result) <= {"said"}


def on_gpu(tmp_path, *words: str, **env: str) -> subprocess.CompletedProcess:
    own = [f"--records={tmp_path / 'r.jsonl'}", f"--page={tmp_path / 'p.md'}"]
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py"), *own, *words]
    own = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(command, env=own, capture_output=True, text=True)


def test_without_a_gpu_it_says_so(tmp_path):
    done = on_gpu(tmp_path, PATH="/nowhere")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: no NVIDIA GPU is here that may be used")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_dry_runs_leave_records_and_a_page_and_go_on(tmp_path):
    words = "--dry", "--cases=ceiling|step: zimage, batch 1, auto|switch: zimage, batch 1, teacher|"
    words = words[0], words[1] + "torch: zimage, batch 1, per step$"
    done = on_gpu(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == [DONE] * 4, done.stdout
    for row in rows:
        assert row["device"] == "cpu (dry)" and row["commit"] and row["versions"]["jax"]
    step, rounded, torch_row = (row["result"] for row in rows[1:])
    assert step["remat"] == "none" and step["counted_bytes"] > 0 and step["model_flop"] > 0
    assert torch_row["words"] == ["per_step"] and torch_row["images"] == step["images"] == 1
    assert 1e-3 < rounded["teacher_error"] < 0.2 and "teacher_error" not in step
    page = (tmp_path / "p.md").read_text()
    assert "teacher's products in fp8 (velocity off by " in page
    assert "| zimage, batch 1, auto (none) |" in page and "| zimage, batch 1, per step |" in page
    assert "## Not measured" in page
    assert "Goal: at least 70 % of the ceiling." in page and "Goals: at least 2.0" in page
    before = (tmp_path / "r.jsonl").read_text()
    again = on_gpu(tmp_path, *words)
    assert again.stdout.count(": is measured") == 4
    assert (tmp_path / "r.jsonl").read_text() == before


def test_the_page_here_is_of_the_records_here():
    path = ROOT / "docs" / "on_gpu.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = {row["name"]: row for row in map(json.loads, lines)}
    written = (ROOT / "docs" / "on_gpu.md").read_text(encoding="utf-8")
    assert written == gpu_page.page(cases(False), records)


@pytest.mark.parametrize("loss, steps", [("x0", None), ((1.0, 0.5, 2.0), (0, 2))])
def test_a_backward_pass_after_each_step_gives_the_same_gradient(loss, steps):
    model = reference.build_transformer(0)
    for name, seed in (("teacher", 1), ("student", 2)):
        reference.load_adapters(model, reference.random_adapters(model, 2, seed), name)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    batches = [reference.Batch([draw(5, 24)], [draw(9, 24)], draw(1, 8, 8, 8)) for _ in range(2)]
    settings = dataclasses.replace(
        reference.Settings(), sigmas=(1.0, 0.7, 0.4), loss=loss, loss_steps=steps, accumulate=2
    )
    found = []
    for backward in (reference.backward, torch_step.backward_per_step):
        backward(model, batches, settings)
        found.append([p.grad.clone() for p in reference.adapter_parameters(model, "student")])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)
