"""Measures all that a GPU is needed for, and writes docs/on_gpu.md.

    python benchmarks/on_gpu.py                                   # what is not measured yet
    python benchmarks/on_gpu.py --cases='step: zimage' --again    # names that match, anew
    python benchmarks/on_gpu.py --list                            # names, run nothing
    python benchmarks/on_gpu.py --cases=none                      # only the page
    python benchmarks/on_gpu.py --dry --records=/tmp/dry.jsonl --page=/tmp/dry.md

Each case runs in a process of its own, which has the whole device, for at most some minutes. Its
record goes to docs/on_gpu.jsonl as soon as it is there, with device, versions and commit: a stopped
run goes on where it was. A case that runs out of memory is a result. PyTorch, diffusers and
peft must be installed, as for the tests; nothing is downloaded. --dry tries every case at tiny size
on a CPU: the numbers then mean nothing.
"""

import datetime
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gpu_card
import gpu_page
from absl import flags
from gpu_cases import Case, cases
from gpu_records import FAILED, LATE, ROOT, commit, left_out, read, run, versions

from dopsd_jax.common import gpu_memory, program

CASES = flags.DEFINE_string("cases", "", "only cases whose name matches this pattern; or none")
AGAIN = flags.DEFINE_bool("again", False, "also cases that are measured")
LIST = flags.DEFINE_bool("list", False, "print the names of the cases and end")
DRY = flags.DEFINE_bool("dry", False, "tiny sizes on the CPU")
MINUTES = flags.DEFINE_float("minutes", 0, "stop after so many; 0: no limit", 0)
RECORDS = flags.DEFINE_string("records", str(ROOT / "docs" / "on_gpu.jsonl"), "file of records")
PAGE = flags.DEFINE_string("page", str(ROOT / "docs" / "on_gpu.md"), "the page")
COMMIT = flags.DEFINE_string("commit", "", "what is measured, where git cannot tell")
LEAST = 60  # seconds without which no case is begun


def main() -> int | None:
    every, began = cases(DRY.value), time.monotonic()
    matches = lambda case: CASES.value != "none" and re.search(CASES.value, case.name)
    chosen = list(filter(matches, every))
    if LIST.value:
        print("\n".join(case.name for case in chosen))
        return None
    records = read(Path(RECORDS.value))
    card = None if DRY.value or not chosen else gpu_card.find()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        measure_all(chosen, card, records, began)
    finally:  # also where it is stopped
        write(every, records)
    return int(any(records[c.name]["outcome"] == FAILED for c in chosen if c.name in records))


def measure_all(
    chosen: list[Case], card: gpu_card.Card | None, records: dict[str, dict], began: float
) -> None:
    """Adds to `records`, and to their file, what was not measured yet."""
    for number, case in enumerate(chosen, 1):
        if why := left_out(case, records, card and card.memory, AGAIN.value):
            print(f"{number}/{len(chosen)} {case.name}: {why}", flush=True)
            continue
        left = 60 * MINUTES.value - (time.monotonic() - began) if MINUTES.value else case.seconds
        if left < LEAST:
            print(f"the {MINUTES.value:g} minutes are over", flush=True)
            break
        print(f"{number}/{len(chosen)} {case.name}: {time.strftime('%H:%M:%S')}", flush=True)
        record = measure(case, card, min(left, case.seconds))
        if record["outcome"] == LATE and left < case.seconds:
            print("    cut short", flush=True)
            continue
        print(f"    {record['outcome']}: {gpu_page.brief(record)}", flush=True)
        with Path(RECORDS.value).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        records[case.name] = record


def write(every: list[Case], records: dict[str, dict]) -> None:
    """The newest record of each case, and the page."""
    kept = [records[case.name] for case in every if case.name in records]
    if kept:
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        Path(RECORDS.value).write_text(lines, encoding="utf-8")
    Path(PAGE.value).write_text(gpu_page.page(every, records), encoding="utf-8")
    print(f"wrote {PAGE.value}", flush=True)


def measure(case: Case, card: gpu_card.Card | None, seconds: float) -> dict[str, Any]:
    """The record of a case that is run now."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"PYTHONPATH": path}
    if DRY.value:
        env["JAX_PLATFORMS"] = "cpu"
    elif case.section != "start":
        env["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compilation is timed too
    env |= case.env
    if card:
        env["CUDA_VISIBLE_DEVICES"] = card.uuid
    if case.card and card:
        share = min(1, (case.card << 30) / card.memory)
        env[gpu_memory.NAMES[0]] = f"{gpu_memory.SHARE * share:.4f}"
    script, *words = case.command
    command = [sys.executable, str(Path(__file__).with_name(script)), *words]
    begin = time.monotonic()
    outcome, result = run(command, env, seconds)
    return {
        "name": case.name,
        "group": case.group,
        "card": case.card,
        "outcome": outcome,
        "result": result,
        "command": " ".join([*(f"{k}={v}" for k, v in case.env.items()), *case.command]),
        "wall": round(time.monotonic() - begin, 1),
        "device": "cpu (dry)" if DRY.value else card.name,
        "versions": versions() | ({"driver": card.driver} if card else {}),
        "commit": COMMIT.value or commit(),
        "day": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    program.run(main)
