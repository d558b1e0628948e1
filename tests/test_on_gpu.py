"""benchmarks/on_gpu.py: its cases are commands that can run, and it goes on where it was."""

import dataclasses
import json
import os
import subprocess
import sys

import gpu_page
import numpy as np
import pytest
import torch
import torch_reference as reference
import torch_step
from conftest import ROOT
from gpu_cases import SECTIONS, XLA, Case, cases
from gpu_records import DONE, FAILED, FULL, LATE, left_out, run

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
    assert done.stderr.startswith("error: no NVIDIA GPU is here; --dry")
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
