"""Many processes: real ones, two with four devices each, and what a run on them leaves behind."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import RANDOM_CONFIG, ROOT, run_program

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.images import open_image
from dopsd_jax.parallel import cluster, multihost
from dopsd_jax.parallel.multihost import SharedError
from dopsd_jax.parallel.preemption import STOPPED_EXIT
from dopsd_jax.reporting.metrics import read_metrics

SCRIPT = pathlib.Path(__file__).with_name("process_group.py")
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


OTHER = ("--num_processes=2", "--process_id=1")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(command, index, port, **environment):
    own = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
    }
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=os.environ | own | environment, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def group(scenario):
    """(status, stdout, stderr) of both processes."""
    port = free_port()
    both = [start([SCRIPT, scenario], i, port) for i in range(2)]
    outputs = [p.communicate(timeout=300) for p in both]
    return [(p.returncode, *output) for p, output in zip(both, outputs, strict=True)]


def errors_of(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def test_processes_agree_and_hold_their_own_samples():
    for i, (status, stdout, stderr) in enumerate(group("agree")):
        assert status == 0 and "agreed" in stdout, stderr
        assert f"processes: this is {i} of 2, 4 of 8 devices" in stdout


def test_a_fault_of_one_process_ends_all_with_its_line():
    for status, _, stderr in group("refuse"):
        assert status == 2
        assert errors_of(stderr) == ["error: config.model: is not on this machine; copy it"]


def test_a_process_that_fails_alone_does_not_leave_the_other_waiting():
    first, second = group("fail")
    assert first[0] == 2 and errors_of(first[2]) and "Traceback" not in first[2]
    assert second[0] != 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--distributed=on"], "--distributed=on: .* give --coordinator, --num_processes"),
        (["--num_processes=2"], "give --coordinator, --process_id"),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "'here' is not host:port"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "--process_id: 2 is not"),
        (
            ["--coordinator=127.0.0.1:9", *OTHER, "--connect_timeout=2"],
            r"the other processes did not meet at 127.0.0.1:9 within 2 s",
        ),
    ],
)  # fmt: skip
def test_processes_that_cannot_meet_say_so(options, message):
    result = subprocess.run(
        [sys.executable, SCRIPT, "agree", *options],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    (line,) = errors_of(result.stderr)
    assert re.search(message, line), line


# A large eps: else Adam turns rounding into steps of its own. Every adapter takes time to compile.
BATCH = (
    "--config.lora.targets=attention",
    "--config.batch_size=8",
    "--config.data.buckets=96x96",
    "--config.accumulate=2",
    "--config.adam_eps=1e-3",
    "--config.data.holdout=1",
)


# XLA on a processor orders two collective operations by their starts alone. One that needs nothing
# of a loop may run beside the operations inside it, on one device earlier than on another: gloo,
# which knows messages by their order, then ends the process. (Without several processes they are
# known by name.) It was seen once, on a machine with much else to do.
SWAPPED = "Received data size doesn't match expected size"


def stopped(command, workdir):
    """Two processes, four devices each, of which one gets SIGTERM after three steps; as `group`."""
    port, log = free_port(), workdir / "metrics.jsonl"
    both = [start(command, i, port, JAX_NUM_CPU_DEVICES="4") for i in range(2)]
    try:
        patience = time.monotonic() + 500
        while not (log.exists() and log.read_text().count("\n") >= 3):
            if any(p.poll() is not None for p in both) or time.monotonic() > patience:
                break
            time.sleep(0.1)
        else:
            both[1].send_signal(signal.SIGTERM)
            for process in both:
                process.wait(timeout=300)
    finally:
        for process in both:
            process.kill()
    return [(p.wait(), *p.communicate()) for p in both]


@pytest.fixture(scope="module")
def preempted(random_run, tmp_path_factory):
    """A run on two processes that SIGTERM to one of them stopped; and their outputs."""
    for _ in range(3):
        workdir = tmp_path_factory.mktemp("two") / "run"
        for name in ("random_model", "random_data"):
            shutil.copytree(random_run / name, workdir / name)
        command = [
            "-m", "dopsd_jax.train", *RANDOM_CONFIG, *BATCH, "--config.steps=500",
            "--config.mesh.fsdp=2", "--config.mesh.context=2", f"--workdir={workdir}",
        ]  # fmt: skip
        outcomes = stopped(command, workdir)
        if not any(SWAPPED in stderr for _, _, stderr in outcomes):
            break
    if any(status < 0 for status, _, _ in outcomes):  # not as an assertion: its text would be cut
        pytest.fail("\n".join(text for outcome in outcomes for text in outcome[1:]))
    return workdir, outcomes


def test_sigterm_to_one_process_stops_all_after_one_step(preempted):
    workdir, outcomes = preempted
    assert [status for status, _, _ in outcomes] == [75, 75], outcomes
    stopped = read_metrics(workdir / "metrics.jsonl")[-1]["step"]
    assert 3 <= stopped < 500
    assert f"stopped after step {stopped}, which is saved" in outcomes[0][1]
    digests = sorted(p.name for p in (workdir / f"checkpoints/{stopped}").glob("digests.*"))
    assert digests == ["digests.0.json", "digests.1.json"]
    assert (workdir / "lora" / f"step_{stopped}.safetensors").exists()
    # Process 0 speaks for all.
    assert "step" in outcomes[0][1] and "pictures" not in outcomes[1][1]


def test_other_processes_and_meshes_give_the_same_losses(preempted, tmp_path):
    """One process with eight devices from the start; one with two goes on where two stopped."""
    workdir, _ = preempted
    two = read_metrics(workdir / "metrics.jsonl")
    steps = two[-1]["step"] + 2
    results = {}
    for name, devices, tensor in (("whole", 8, 1), ("resumed", 2, 2)):
        folder = tmp_path / name
        shutil.copytree(workdir, folder)
        if name == "whole":
            shutil.rmtree(folder / "checkpoints")
        result = run_program(
            "train", *RANDOM_CONFIG, *BATCH, f"--config.steps={steps}",
            f"--config.mesh.tensor={tensor}", f"--workdir={folder}",
            JAX_NUM_CPU_DEVICES=str(devices),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        resumed = f"resuming at step {steps - 2}" in result.stdout
        assert resumed == (name == "resumed")
        results[name] = read_metrics(folder / "metrics.jsonl")
    assert [json.dumps(r) for r in results["resumed"][:-2]] == [json.dumps(r) for r in two]
    for ours, whole in zip(results["resumed"], results["whole"], strict=True):
        for field in ("loss", "loss_per_step", "gap", "grad_norm"):
            np.testing.assert_allclose(ours[field], whole[field], rtol=1e-5, err_msg=field)
    whole, ours = (
        {e["step"]: e["heldout_gap"] for e in json.loads(text)["checkpoints"]}
        for text in ((tmp_path / name / "ranking.json").read_text() for name in results)
    )
    first = (f / "samples" / "step_000000.png" for f in (workdir, tmp_path / "whole"))
    pictures = [open_image(path).astype(int) for path in first]
    assert np.abs(np.subtract(*pictures)).max() <= 2  # those of several devices, drawn on each mesh
    common = sorted(ours.keys() & whole.keys())
    assert len(common) >= 2
    np.testing.assert_allclose([ours[s] for s in common], [whole[s] for s in common], rtol=1e-5)


@pytest.mark.parametrize(
    ("end", "status", "left"),
    [(KeyboardInterrupt, 130, True), (UserError("x: y"), 2, True), (SharedError("x: y"), 2, False),
     (0, 0, False), (STOPPED_EXIT, STOPPED_EXIT, False)],
)  # fmt: skip
def test_a_process_that_ends_alone_does_not_wait_for_the_others(monkeypatch, end, status, left):
    """Which would wait for it: a normal exit does. One that is shared ends all."""
    ended = []
    monkeypatch.setattr(cluster, "connect", lambda: "")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "leave", ended.append)
    monkeypatch.setattr(cluster.program, "run", lambda joined: found.append(joined()))
    found = []

    def main():
        if isinstance(end, int):
            return end
        raise end

    cluster.run(main)
    assert found == [status] and ended == [status] * left


@pytest.mark.parametrize(("program", "status"), [("prepare", 75), ("train", -signal.SIGTERM)])
def test_a_signal_before_the_first_step_ends_a_process_at_once(tmp_path, program, status):
    """Though jax's own service for preempted machines takes the signal when processes connect."""
    out = f"--out={tmp_path}/out" if program == "prepare" else "--config.steps=1"
    command = ["-m", f"dopsd_jax.{program}", *RANDOM_CONFIG, f"--workdir={tmp_path}", out]
    alone = ("--distributed=on", "--num_processes=1", "--process_id=0")
    process = start([*command, *alone], 0, free_port())
    line = ""
    while not line.startswith("processes: this is 0 of 1"):
        line = process.stdout.readline()
        assert line, process.communicate()
    while program == "prepare" and not (tmp_path / "out").exists():  # made when it has begun
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stderr
    assert ("the same command goes on" in stderr) == (program == "prepare")
