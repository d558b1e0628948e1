"""Cases of on_gpu.py as records: which are run, how they ended, with which versions."""

import importlib.metadata
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_cases import Case

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "torch", "diffusers", "peft")
MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemoryError", "Out of memory")
DONE, FULL, LATE, FAILED = "done", "out of memory", "too slow", "failed"
RESULT = "result: "
NOMINAL = 1.07  # drivers keep up to so much of a card: 44.99 GiB of an L40S with 48 GB


def read(path: Path) -> dict[str, dict]:
    """The newest record of each case."""
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def left_out(case: Case, records: Mapping[str, dict], memory: int | None, again: bool) -> str:
    """Why a case is not run; empty if it is.

    memory: bytes of the card; None: that does not matter. again: also what is measured.
    """
    old = records.get(case.name)
    if old and old["outcome"] in (DONE, FULL) and not again:
        return "is measured"
    group = [row for row in records.values() if case.group and row["group"] == case.group]
    if any(row["outcome"] == DONE and row["card"] < case.card for row in group):
        return "a smaller card is enough"
    if memory and case.card and case.card << 30 > memory * NOMINAL:
        return f"the card here has {memory / 2**30:.0f} GiB"
    return ""


def run(command: list[str], env: dict[str, str], seconds: float) -> tuple[str, dict[str, Any]]:
    """How a case ended, and its result, or the last lines that it said."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, cwd=ROOT, start_new_session=True, **pipes)
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        return LATE, {}
    except BaseException:  # the benchmark is stopped: nothing may stay on the device
        end(process)
        raise
    lines = [line for line in out.splitlines() if line.startswith(RESULT)]
    if process.returncode == 0 and lines:
        return DONE, json.loads(lines[-1].removeprefix(RESULT))
    said = out + errors
    full = any(words in said for words in MEMORY)
    return FULL if full else FAILED, {"said": said.strip().splitlines()[-3:]}


def end(process: subprocess.Popen) -> None:
    """Ends a case with all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def commit() -> str:
    """Of the working tree; with a plus sign if files that are run differ from it."""
    git = lambda *words: subprocess.run(
        ["git", "-C", ROOT, *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--", "dopsd_jax", "configs", "benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
