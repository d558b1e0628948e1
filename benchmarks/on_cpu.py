"""The step beside PyTorch's on this machine's processor, in turns; writes docs/on_cpu.md.

    python benchmarks/on_cpu.py --page=docs/on_cpu.md
    python benchmarks/on_cpu.py --rounds=1

Every measurement is a process of its own, `step.py` with and without --torch. Nothing else should
run beside it. Only ratios are written: seconds would be of this machine.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import gpu_records
import wide_mkl
from absl import flags

from dopsd_jax.common import program
from dopsd_jax.common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = flags.DEFINE_integer("rounds", 3, "how often each is run", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 9, "timed steps of a run", lower_bound=1)
PAGE = flags.DEFINE_string("page", None, "the page; else only printed")

PLAIN = "--config.anchor.share=0"  # PyTorch's loop has no anchors
ZIMAGE, KLEIN = "configs/zimage.py:{}", "configs/flux2_klein.py:{}"
CASES = {
    "Z-Image, random, captions of 512 and 1024 rows": (ZIMAGE.format("random"),),
    "the same, captions of 128 and 704 rows": (ZIMAGE.format("random"), "--tokens=128,704"),
    "the same, captions of 32 and 96 rows": (ZIMAGE.format("random"), "--tokens=32,96"),
    "the same, 256 x 256, captions of 512 and 1024 rows": (ZIMAGE.format("random"), "--side=256"),
    "klein, random, texts of 512 rows, a reference": (KLEIN.format("random"),),
    "Z-Image's miniature, captions of 32 and 96 rows": (
        ZIMAGE.format("tiny"),
        "--tokens=32,96",
        PLAIN,
    ),
    "klein's miniature": (KLEIN.format("tiny"), PLAIN),
}
HEAD = """# Measured on a processor

Made by `python benchmarks/on_cpu.py --page=docs/on_cpu.md`; do not edit.

The time of a D-OPSD step, as a share of the time that PyTorch (diffusers, peft) takes for the same
step with the same sizes: below 1, ours is faster. Both run in turns, each in a process of its own,
{rounds} times; the median is shown. Batches and sizes are those of the configuration.

MKL, which PyTorch multiplies with, uses half of the width of a processor that is not Intel's. In
the second column it is told that the processor is Intel's (`benchmarks/wide_mkl.py`).

| step | of PyTorch | of PyTorch with wide MKL |
|---|--:|--:|
{table}

{about}

Drawing beside diffusers: [sampling.md](sampling.md#beside-diffusers).
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wide = wide_mkl.environment(Path(folder))
        rows = [row(name, args, wide) for name, args in CASES.items()]
    text = HEAD.format(rounds=ROUNDS.value, table="\n".join(rows), about=about())
    if PAGE.value:
        Path(PAGE.value).write_text(text, encoding="utf-8")


def row(name: str, args: tuple[str, ...], wide: dict[str, str]) -> str:
    """The line of a case, also printed."""
    ratios: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS.value):
        own = seconds(args)
        for found, variables in zip(ratios, ({}, wide), strict=True):
            found.append(own / seconds((*args, "--torch=plain"), variables))
    shown = " | ".join(f"{statistics.median(found):.2f}" for found in ratios)
    line = f"| {name} | {shown} |"
    print(line, flush=True)
    return line


def seconds(args: tuple[str, ...], variables: dict[str, str] | None = None) -> float:
    """The median of a run's timed steps."""
    config, *more = args
    command = [sys.executable, ROOT / "benchmarks" / "step.py", "--config", config, *more]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | (variables or {})
    done = subprocess.run(
        [*command, f"--repeats={REPEATS.value}"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"{' '.join(map(str, command))}: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1].removeprefix("result: "))["median"]


def about() -> str:
    """Machine, versions and commit."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    found = {name: version(name) for name in ("jax", "torch", "diffusers", "peft")}
    width = "AVX-512" if "avx512f" in facts["flags"].split() else "no AVX-512"
    return (
        f"{facts['model name']} (family {facts['cpu family']}, {width}), {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, "
        f"{', '.join(f'{name} {number}' for name, number in found.items())}, "
        f"commit {gpu_records.commit()}."
    )


if __name__ == "__main__":
    program.parse()
    program.run(main)
