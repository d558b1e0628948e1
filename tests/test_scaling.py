"""The page of TPU slices says what the records say, and nothing where there is none."""

import importlib.util
import json
import math
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
GIB = 2**30


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location(
        "scaling_table", ROOT / "benchmarks" / "scaling_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(devices, needed, fits=True, gathered=0):
    sent = {"all-gather": {"count": 7, "bytes": gathered}} if gathered else {}
    live = {"base": 3 * GIB, "adapters": GIB, "teacher": GIB, "optimizer": 2 * GIB}
    report = {
        "mesh": {"data": devices, "fsdp": 1, "context": 1, "tensor": 1},
        "images": devices,
        "account": {"live": live},
        "work": {"model": 2e12, "executed": 3e12},
        "capacity": 16 * GIB,
        "needed": needed,
        "problem": None if fits else "what lives through the run takes 99.00 GiB by itself",
        "seconds": 60,
        "sent": sent,
        "activations": {"all-gather": {"count": 1, "bytes": 2**20}} if gathered else {},
        "unknown_loops": 0,
    }
    versions = {"jax": "1", "libtpu": "2"}
    return {"report": report, "fits": fits, "commit": "abc", "checked": "abc", "versions": versions}


def test_the_page_says_what_the_records_say(table):
    rows = [
        ("lora v6e-1", record(1, 9 * GIB)),
        ("lora v5e-1 int8", None),
        ("full v5p-4", record(4, None, fits=False)),
        ("lora v6e-8", record(8, 9 * GIB, gathered=GIB)),
        ("lora v6e-256", record(256, 9 * GIB, gathered=2 * GIB)),
        ("lora tpu7x-4", record(8, 9 * GIB)),
    ]
    text = table.page(rows)
    assert "base in bfloat16: fits, 9.00 of 16.00 GiB" in text
    assert "base in int8: not compiled" in text
    assert "Google's v5p-8): **does not fit**: what lives through the run takes 99.00 GiB" in text
    assert (
        "| lora v6e-1 | one device | 4.00 | 1.00 | 2.00 | 2.00 | 9.00 | 16.00 | fits | 2 | 3 |"
        in (text)
    )
    assert (
        "| lora tpu7x-4 | data 8 | 4.00 | 1.00 | 2.00 | 2.00 | 9.00 | 16.00 | fits | 2 | 3 |"
        in text
    )
    assert "| lora v5e-1 int8 | | | | | | | | not compiled | | |" in text
    assert "| lora v6e-8 | 1.00 (7) | 0 | 0 | 0 | 0 | 1.0 MiB (1) |" in text
    assert "Activations are at most 0.098% of the results, in lora v6e-8." in text
    assert "| lora v6e-8 to 256 | TFLOP executed | 3.00 | 3.00 | 1.0000 |" in text
    assert "| full v6e-8 to 256 | | not compiled | | |" in text


def test_names_count_chips_and_every_device_has_an_image():
    for line in (ROOT / "docs" / "scaling.jsonl").read_text("utf-8").splitlines():
        found = json.loads(line)
        kind, chips = re.search(r"(v5e|v5p|v6e|tpu7x)-(\d+)", found["name"]).groups()
        devices = int(chips) * (2 if kind == "tpu7x" else 1)
        report = found["report"]
        assert math.prod(report["mesh"].values()) == report["images"] == devices, found["name"]


def test_the_committed_page_is_that_of_the_committed_records(table):
    records = map(json.loads, (ROOT / "docs" / "scaling.jsonl").read_text("utf-8").splitlines())
    page = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    for found in records:
        lines = table.page([(found["name"], found)]).splitlines()
        rows = [line for line in lines if line.startswith(f"| {found['name']} |")]
        assert rows and all(row in page for row in rows)
