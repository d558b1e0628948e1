"""Options for XLA's GPU compiler: known to the jaxlib here, and never against the user's own."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from dopsd_jax.common import gpu_flags

PARSE = "import jax; jax.devices(); print('parsed')"
# A machine with a GPU, as far as `add` can tell.
START = """
import os, sys, types
import jax
from dopsd_jax.common import gpu_flags, program
gpu_flags.PLUGINS = ("json",)
program.run(lambda: print(os.environ.get("XLA_FLAGS", "")))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    own = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-c", code], env=own | environment, capture_output=True, text=True
    )


def test_this_jaxlib_reads_them():
    flags = " ".join(gpu_flags.missing(""))
    assert run(PARSE, XLA_FLAGS=flags, JAX_PLATFORMS="cpu").stdout.strip() == "parsed"
    wrong = run(PARSE, XLA_FLAGS=flags.replace("scheduler", "schedule"), JAX_PLATFORMS="cpu")
    assert wrong.returncode != 0 and "schedule" in wrong.stderr  # so that the line above says much


def test_a_newer_jaxlib_than_setup_py_allows_is_given_none():
    (bound,) = re.findall(r'"jax>=[\d.]+,<([\d.]+)"', (ROOT / "setup.py").read_text("utf-8"))
    assert bound == ".".join(map(str, gpu_flags.NEWEST))
    assert gpu_flags.known("0.10.2") and gpu_flags.known("0.12.0.1")
    assert not gpu_flags.known("0.13.0") and not gpu_flags.known("1.0")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, gpu_flags.missing("")),
        ({"JAX_PLATFORMS": "cuda,cpu"}, gpu_flags.missing("")),
        ({"JAX_PLATFORMS": "cpu"}, []),
        ({gpu_flags.SWITCH: "off"}, []),
        ({"XLA_FLAGS": "--xla_gpu_autotune_level=3"},
         ["--xla_gpu_autotune_level=3", *gpu_flags.missing("")]),
        ({"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false"},
         ["--xla_gpu_enable_latency_hiding_scheduler=false"]),
    ],
)  # fmt: skip
def test_they_are_added_for_a_gpu_where_the_user_has_not_set_them(environment, expected):
    done = run(START, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected


def test_without_a_plugin_for_a_gpu_nothing_is_added():
    assert run(START.replace('"json"', '"jax_plugins.none"')).stdout.split() == []
