"""Kills a training again and again, and compares it with one that was left alone.

    python benchmarks/kills.py --kills 30 --seed 0

Each start is killed with SIGKILL after a random time, up to --patience seconds: every other one
counted from its start (it starts, compiles), the rest from its first new step (it trains, saves).
After the last kill the run goes on to its end. Equal are: every number of every step, the LoRA
files bit for bit, and nothing is left behind. The exit status is 1 if anything differs.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dopsd_jax.reporting.metrics import read_metrics
from dopsd_jax.weights.safetensors_io import TensorFiles

CLOCK = ("seconds", "images_per_second", "input_seconds", "peak_bytes")
FIELDS = (
    "--config=zimage:random",
    "--config.data.buckets=96x96",
    "--config.grid=1,0.5",
    "--config.lora.targets=attention",
    "--config.checkpoint_every=10",
    "--config.sample_every=0",
    "--config.sample_rows=1",
)


def start(workdir: Path, steps: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "dopsd_jax.train", *FIELDS, f"--workdir={workdir}"]
    return subprocess.Popen(
        [*command, f"--config.steps={steps}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(workdir: Path, steps: int) -> None:
    process = start(workdir, steps)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the run ended with status {process.returncode}: {errors.decode()}")


def numbers(workdir: Path) -> list[dict]:
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


def steps_done(workdir: Path) -> int:
    """Steps that are written down; a kill may leave the file without any."""
    path = workdir / "metrics.jsonl"
    found = read_metrics(path) if path.exists() else []
    return found[-1]["step"] if found else 0


def kill(process: subprocess.Popen, workdir: Path, patience: float, from_step: bool) -> None:
    """Kills it `patience` seconds after its start or its first new step, if it runs that long."""
    done = steps_done(workdir)
    while from_step and process.poll() is None and steps_done(workdir) <= done:
        time.sleep(0.1)
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
        process.wait()


def files(workdir: Path) -> dict[str, bytes]:
    """The tensors of every LoRA file."""
    found = {}
    for path in sorted((workdir / "lora").iterdir()):
        tensors = TensorFiles.open(path)
        found |= {f"{path.name}/{name}": tensors.read(name).tobytes() for name in tensors.infos}
    return found


def listing(workdir: Path) -> list[str]:
    """All paths, without the random names of cached features and of orbax's data files."""
    paths = (str(p.relative_to(workdir)) for p in workdir.rglob("*") if "features" not in p.parts)
    return sorted(re.sub("/[0-9a-f]{32}$", "/*", path) for path in paths)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--patience", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as home:
        alone, killed = Path(home, "alone"), Path(home, "killed")
        begin = time.monotonic()
        finish(alone, given.steps)
        whole = time.monotonic() - begin
        print(f"left alone: {given.steps} steps in {whole:.0f} s", flush=True)
        for number in range(1, given.kills + 1):
            process, patience = start(killed, given.steps), rng.uniform(0, given.patience)
            kill(process, killed, patience, from_step=number % 2 == 0)
            if process.returncode > 0:
                sys.exit(f"start {number} refused to go on: {process.stderr.read().decode()}")
            if process.returncode == 0:
                sys.exit(f"start {number} came to the end, and was not killed; take more --steps")
            print(f"kill {number}: step {steps_done(killed)}", flush=True)
        finish(killed, given.steps)
        same = {
            "numbers": numbers(alone) == numbers(killed),
            "LoRA files": files(alone) == files(killed),
            "what is there": listing(alone) == listing(killed),
        }
        for what, equal in same.items():
            print(f"{what}: {'equal' if equal else 'DIFFERENT'}")
        if not same["what is there"]:
            print(sorted(set(listing(alone)) ^ set(listing(killed))))
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
