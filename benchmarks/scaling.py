"""Makes docs/scaling.md: what a step takes on TPU slices, by the TPU compiler.

    python benchmarks/scaling.py                   # compile what is missing, then write the table
    python benchmarks/scaling.py --compile=none    # only write the table
    python benchmarks/scaling.py --cases='full v5p' --compile=again

No TPU is needed, but libtpu; a case takes minutes of a CPU core. Each result goes to
docs/scaling.jsonl as soon as it is there: a stopped run goes on where it was. --compile=changed
also compiles again where the program that the compiler is given has become another; a case whose
program is the same is marked as checked with the present commit.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import scaling_table
from absl import flags

from dopsd_jax.common import program
from dopsd_jax.estimation import abstract_step, compiled_step, tpu_topologies

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "scaling.jsonl"
TABLE = ROOT / "docs" / "scaling.md"
SIDES = {"height": 1024, "width": 1024}

CASES = flags.DEFINE_string("cases", "", "only cases whose name matches this pattern")
COMPILE = flags.DEFINE_enum(
    "compile", "missing", ["none", "missing", "changed", "again"], "which of them to compile"
)


class Job(NamedTuple):
    """One row of the table. topology: of `slices`; preset: of configs/FAMILY.py, with `changes`."""

    name: str
    preset: str
    topology: str
    changes: dict[str, Any]
    family: str = "zimage"


def _split(fsdp: int, data: int = 1) -> dict[str, int]:
    return {"mesh.data": data, "mesh.fsdp": fsdp}


KLEIN = "flux2_klein"
# In the order in which they are compiled. The name counts chips, also of v5p and of 7x, of which a
# chip is two devices.
JOBS = (
    Job("full v5e-1", "full", "v5e-1", _split(1)),
    Job("full v5e-4", "full", "v5e-4", _split(4)),
    Job("full v6e-1", "full", "v6e-1", _split(1)),
    Job("lora v6e-1", "released", "v6e-1", _split(1)),
    Job("lora v5e-1 int8", "released", "v5e-1", {"base_dtype": "int8"}),
    Job("full v5p-4", "full", "v5p:2x2x1", _split(4)),
    Job("lora v6e-8", "released", "v6e-8", _split(1, 8)),
    Job("lora v6e-256", "released", "v6e-256", _split(1, 256)),
    Job("full v6e-8", "full", "v6e-8", _split(8)),
    Job("full v6e-256", "full", "v6e-256", _split(8, 32)),
    Job("lora v5e-4", "released", "v5e-4", _split(4)),
    Job("lora v5p-4", "released", "v5p:2x2x1", _split(1, 4)),
    Job("lora v5p-64", "released", "v5p:4x4x4", _split(1, 64)),
    Job("full v5p-64", "full", "v5p:4x4x4", _split(4, 16)),
    Job("lora v5e-8", "released", "v5e-8", _split(8)),
    Job("lora v5e-1", "released", "v5e-1", _split(1)),
    Job("full v5e-8", "full", "v5e-8", _split(8)),
    Job("full v5e-8 adafactor", "full", "v5e-8", {**_split(8), "optimizer": "adafactor"}),
    Job("klein 4b lora v6e-1", "4b_released", "v6e-1", _split(1), KLEIN),
    Job("klein 4b full v5p-4", "4b_identity_full", "v5p:2x2x1", _split(4), KLEIN),
    Job("klein 9b lora v6e-1", "9b_released", "v6e-1", _split(1), KLEIN),
    Job("klein 9b lora v6e-4", "9b_released", "v6e-4", _split(4), KLEIN),
    Job("klein 9b full v5p-4", "9b_identity_full", "v5p:2x2x1", _split(4), KLEIN),
    Job("klein 9b full v6e-8", "9b_identity_full", "v6e-8", _split(8), KLEIN),
    Job("lora tpu7x-4", "released", "tpu7x:2x2x1", _split(1, 8)),
    Job("full tpu7x-4", "full", "tpu7x:2x2x1", _split(8)),
    Job("klein 9b lora tpu7x-4", "9b_released", "tpu7x:2x2x1", _split(1, 8), KLEIN),
    Job("klein 9b full tpu7x-4", "9b_identity_full", "tpu7x:2x2x1", _split(8), KLEIN),
    Job("klein 4b lora tpu7x-4", "4b_released", "tpu7x:2x2x1", _split(1, 8), KLEIN),
    Job("klein 4b full tpu7x-4", "4b_identity_full", "tpu7x:2x2x1", _split(8), KLEIN),
)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # whatever else is here is left alone
    for job in JOBS:
        if COMPILE.value != "none" and re.search(CASES.value, job.name):
            made = make(job, read().get(job.name))
            if made is not None:
                with RECORDS.open("a") as file:
                    file.write(json.dumps(made) + "\n")
    records = read()
    kept = [records[job.name] for job in JOBS if job.name in records]
    RECORDS.write_text("".join(json.dumps(record) + "\n" for record in kept))
    text = scaling_table.page([(job.name, records.get(job.name)) for job in JOBS])
    TABLE.write_text(text)
    print(f"wrote {TABLE}")


def read() -> dict[str, dict]:
    """The newest record of each case."""
    if not RECORDS.exists():
        return {}
    lines = RECORDS.read_text("utf-8").splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def make(job: Job, old: dict | None) -> dict | None:
    """The record of a case, or of one that was checked; None if there is nothing to do."""
    if old and COMPILE.value == "missing":
        return None
    config = configuration(job)
    family, size, *_ = abstract_step.find_network(config, full_size=True)
    devices = tpu_topologies.devices(job.topology)
    config.batch_size = len(devices)
    student, teacher = family.ROWS
    case = abstract_step.Workload(family, size, **SIDES, rows_student=student, rows_teacher=teacher)
    if old and COMPILE.value == "changed" and old["versions"] == versions():
        report, lower = compiled_step.prepare(config, case, devices)
        digest = "" if report.problem else compiled_step.digest(lower()[0])
        if digest == old["report"]["digest"]:
            print(f"{job.name}: the program is the same", flush=True)
            return {**old, "checked": commit()}
    print(f"{job.name}: compiling, {time.strftime('%H:%M')}", flush=True)
    report = compiled_step.compile_step(config, case, devices)
    print(f"{job.name}: {'fits' if report.fits else report.problem}", flush=True)
    less = None
    if report.fits:
        quick = compiled_step.compile_step(config, case, devices, quick=True)
        less = {"needed": quick.needed, "seconds": quick.seconds} if quick.quick else None
    return {
        "name": job.name,
        "topology": job.topology,
        "config": f"configs/{job.family}.py:{job.preset}",
        "changes": {**job.changes, "batch_size": len(devices)},
        "fields": {name: config[name] for name in ("train", "base_dtype", "remat", "optimizer")},
        "fits": report.fits,
        "report": plain(report),
        "quick": less,
        "commit": commit(),
        "checked": commit(),
        "versions": versions(),
    }


def configuration(job: Job):
    path = ROOT / "configs" / f"{job.family}.py"
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(job.preset)
    config.update_from_flattened_dict(job.changes)
    return config


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def commit() -> str:
    """Of the working tree; with a plus sign if files that are compiled differ from it."""
    git = lambda *words: subprocess.run(
        ["git", "-C", ROOT, *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    changed = git("status", "--porcelain", "--", "dopsd_jax", "configs")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def plain(report: compiled_step.Report) -> dict:
    """The report as JSON has it, without the list of single arrays."""
    traffic = lambda found: {kind: t._asdict() for kind, t in found.items()}
    fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    fields |= {"account": report.account._asdict(), "work": report.work._asdict()}
    if report.sent is not None:
        fields["sent"] = traffic(report.sent.traffic)
        fields["unknown_loops"] = report.sent.unknown_loops
        fields["activations"] = traffic(report.activations)
    return fields


if __name__ == "__main__":
    program.run(main)
