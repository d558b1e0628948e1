"""Options for XLA's compiler: known to the jaxlib here, and never against the user's own."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from dopsd_jax.common import xla_flags

OF_CPU = xla_flags.missing("", xla_flags.CPU)
BOTH = OF_CPU + xla_flags.missing("", xla_flags.GPU)
PARSE = "import jax; jax.devices(); print('parsed')"
# A machine with a GPU, as far as `add` can tell.
START = """
import os, sys, types
import jax
from dopsd_jax.common import xla_flags, program
xla_flags.PLUGINS = ("json",)
program.run(lambda: print(os.environ.get("XLA_FLAGS", "")))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    own = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-c", code], env=own | environment, capture_output=True, text=True
    )


def test_this_jaxlib_reads_them():
    flags = " ".join(BOTH)
    assert run(PARSE, XLA_FLAGS=flags, JAX_PLATFORMS="cpu").stdout.strip() == "parsed"
    wrong = run(PARSE, XLA_FLAGS=flags.replace("scheduler", "schedule"), JAX_PLATFORMS="cpu")
    assert wrong.returncode != 0 and "schedule" in wrong.stderr  # so that the line above says much


def test_a_newer_jaxlib_than_setup_py_allows_is_given_none():
    (bound,) = re.findall(r'"jax>=[\d.]+,<([\d.]+)"', (ROOT / "setup.py").read_text("utf-8"))
    assert bound == ".".join(map(str, xla_flags.NEWEST))
    assert xla_flags.known("0.10.2") and xla_flags.known("0.12.0.1")
    assert not xla_flags.known("0.13.0") and not xla_flags.known("1.0")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, BOTH),
        ({"JAX_PLATFORMS": "cuda,cpu"}, BOTH),
        ({"JAX_PLATFORMS": "cpu"}, OF_CPU),
        ({xla_flags.SWITCH: "off"}, []),
        ({"XLA_FLAGS": "--xla_gpu_autotune_level=3"}, ["--xla_gpu_autotune_level=3", *BOTH]),
        ({"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false"},
         ["--xla_gpu_enable_latency_hiding_scheduler=false", *OF_CPU]),
        ({"XLA_FLAGS": "--xla_cpu_prefer_vector_width=256", "JAX_PLATFORMS": "cpu"},
         ["--xla_cpu_prefer_vector_width=256", *OF_CPU[:1]]),
    ],
)  # fmt: skip
def test_they_are_added_where_the_user_has_not_set_them(environment, expected):
    done = run(START, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected


def test_without_a_plugin_for_a_gpu_none_are_added_for_it():
    assert run(START.replace('"json"', '"jax_plugins.none"')).stdout.split() == OF_CPU
