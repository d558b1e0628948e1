"""Kills a training again and again, and compares it with one that was left alone.

    python benchmarks/kills.py --kills 30 --seed 0

Each start is killed with SIGKILL after a random time, up to --patience seconds: while it starts,
compiles, trains or saves.
After the last kill the run goes on to its end. Equal are: every number of every step, the LoRA
files bit for bit, and nothing is left behind. The exit status is 1 if anything differs.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dopsd_jax.reporting.metrics import read_metrics
from dopsd_jax.weights.safetensors_io import TensorFiles

CLOCK = ("seconds", "images_per_second")
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


def files(workdir: Path) -> dict[str, bytes]:
    """The tensors of every LoRA file."""
    found = {}
    for path in sorted((workdir / "lora").iterdir()):
        tensors = TensorFiles.open(path)
        found |= {f"{path.name}/{name}": tensors.read(name).tobytes() for name in tensors.infos}
    return found


def listing(workdir: Path) -> set[str]:
    """All paths, without the random names of cached features."""
    return {str(p.relative_to(workdir)) for p in workdir.rglob("*") if "features" not in p.parts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--patience", type=float, default=15.0)
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
            try:
                _, errors = process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done = numbers(killed)[-1]["step"] if (killed / "metrics.jsonl").exists() else 0
                print(f"kill {number} after {patience:.1f} s, step {done}", flush=True)
                continue
            if process.returncode:
                sys.exit(f"start {number} refused to go on: {errors.decode()}")
            sys.exit(f"start {number} came to the end, and was not killed; take more --steps")
        finish(killed, given.steps)
        same = {
            "numbers": numbers(alone) == numbers(killed),
            "LoRA files": files(alone) == files(killed),
            "what is there": listing(alone) == listing(killed),
        }
        for what, equal in same.items():
            print(f"{what}: {'equal' if equal else 'DIFFERENT'}")
        if not same["what is there"]:
            print(sorted(listing(alone) ^ listing(killed)))
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
