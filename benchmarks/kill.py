"""Kills a run with SIGKILL at random moments until it is done; compares it with one left alone.

    python benchmarks/kill.py --folder=SCRATCH --kills=12

The miniature, a checkpoint at every step. Bit for bit the same: adapters, teacher, optimizer,
metrics but for times. Prints where each kill fell; the exit status is 1 if anything differs.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags
from orbax.checkpoint import v1 as ocp

from dopsd_jax import errors
from dopsd_jax.errors import UserError
from dopsd_jax.metrics import read_metrics

FOLDER = flags.DEFINE_string("folder", None, "scratch folder, empty or of an earlier try")
KILLS = flags.DEFINE_integer("kills", 12, "how often the run is killed at most", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 8, "of the run", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the moments")
flags.mark_flag_as_required("folder")

ROOT = Path(__file__).resolve().parents[1]
CLOCK = ("seconds", "images_per_second")


def main() -> int:
    folder = Path(FOLDER.value).expanduser().absolute()
    whole, killed = folder / "whole", folder / "killed"
    begin = time.monotonic()
    log = finish(start(whole))
    longest = time.monotonic() - begin
    print(f"left alone: {longest:.0f} s", flush=True)
    moments, lines = random.Random(SEED.value), []
    for _ in range(KILLS.value):
        process = start(killed)
        # From the first import to past the end; half of them where steps are taken and saved.
        patience = moments.uniform(0, longest)
        if moments.random() < 0.5:
            wait_for_step(process, killed)
            patience = moments.uniform(0, 3)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
        log = process.communicate()[0]
        lines.append(f"killed: {last_line(log)}; checkpoints {saved(killed)}")
        print(lines[-1], flush=True)
        if process.returncode == 0:
            break
    log = finish(start(killed))
    print("in the end: " + "; ".join(x for x in log.splitlines() if "resuming" in x), flush=True)
    faults = differences(whole, killed)
    print("\n".join(faults) or "bit for bit the same")
    return 1 if faults else 0


def start(workdir: Path) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "dopsd_jax.train", f"--config={ROOT}/configs/zimage.py:tiny",
        f"--config.steps={STEPS.value}", "--config.checkpoint_every=1", "--config.sample_every=0",
        "--config.sample_rows=1", "--config.data.buckets=96x96", f"--workdir={workdir}",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{workdir.parent}/jax_cache"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    log = process.communicate()[0]
    if process.returncode:
        raise UserError(f"the run ended with status {process.returncode}: {last_line(log)}")
    return log


def wait_for_step(process: subprocess.Popen, workdir: Path) -> None:
    """Until the run has saved one more step, or is over."""
    before = saved(workdir)
    while process.poll() is None and saved(workdir) == before:
        time.sleep(0.01)


def saved(workdir: Path) -> list[str]:
    """Names in the folder of checkpoints, those under way too."""
    folder = workdir / "checkpoints"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def last_line(log: str) -> str:
    return (log.strip().splitlines() or ["nothing printed"])[-1][:100]


def differences(whole: Path, killed: Path) -> list[str]:
    faults = []
    ours, theirs = (records(w) for w in (whole, killed))
    if ours != theirs:
        faults.append(f"metrics differ: {len(ours)} and {len(theirs)} lines")
    states = [ocp.load(w / "checkpoints" / str(STEPS.value)) for w in (whole, killed)]
    if states[0].keys() != states[1].keys():
        return [*faults, "the checkpoints hold other arrays"]
    for name, array in states[0].items():
        if not np.array_equal(np.asarray(array), np.asarray(states[1][name])):
            faults.append(f"{name} differs")
    return faults


def records(workdir: Path) -> list[str]:
    """Metrics without times, as text: NaN equals NaN there."""
    return [
        json.dumps({k: v for k, v in record.items() if k not in CLOCK})
        for record in read_metrics(workdir / "metrics.jsonl")
    ]


if __name__ == "__main__":
    errors.run(main)
