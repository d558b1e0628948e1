"""Memory that a step gives back stays with the program, on a processor and with glibc only."""

import importlib.util
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from dopsd_jax.common import cpu_memory, gpu_flags

PAGES = 3072 * 3072 * 4 // 4096  # of the one large array in STEP
# The pages that the system clears in a call of a compiled program: the fewest of several, since a
# thread that computes for the first time has a new heap.
STEP = """
import resource, jax, jax.numpy as jnp
from dopsd_jax.common import program
def main():
    step = jax.jit(lambda x: jnp.exp(x @ x.T) @ x)
    x = jnp.ones((3072, 8))
    cleared = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step(x).block_until_ready()
        cleared.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(min(cleared))
program.run(main)
"""
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def pages_cleared(**environment: str) -> int:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC", "GLIBC"))}
    done = subprocess.run(
        [sys.executable, "-c", STEP], env=own | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@on_glibc
def test_a_step_finds_the_memory_of_the_one_before():
    assert pages_cleared() < PAGES / 100


@on_glibc
@pytest.mark.parametrize(
    "environment",
    [
        {"GLIBC_TUNABLES": "glibc.malloc.check=0"},
        dict.fromkeys(cpu_memory.OPTIONS, "131072"),
    ],
)
def test_what_the_user_has_set_holds(environment):
    assert pages_cleared(**environment) > PAGES / 2


@pytest.mark.parametrize("lacking", [OSError, AttributeError, TypeError])
def test_nothing_happens_without_glibc(monkeypatch, lacking):
    asked = []

    def no_library(name):
        asked.append(name)
        raise lacking

    monkeypatch.setattr(cpu_memory.ctypes, "CDLL", no_library)
    monkeypatch.setattr(gpu_flags, "may_use_gpu", lambda: False)
    monkeypatch.setattr(cpu_memory, "may_use_tpu", lambda: False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    cpu_memory.keep()
    assert asked


@pytest.mark.parametrize(
    "platforms, library, devices, expected",
    [
        (None, True, True, True),
        ("tpu,cpu", True, True, True),
        ("cpu", True, True, False),
        (None, False, True, False),
        (None, True, False, False),
    ],
)
def test_a_tpu_is_where_its_library_and_its_files_are(
    tmp_path, monkeypatch, platforms, library, devices, expected
):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(cpu_memory, "Path", lambda name: tmp_path / ("" if devices else "none"))
    spec = lambda name: object() if library and name == "libtpu" else None
    monkeypatch.setattr(importlib.util, "find_spec", spec)
    config = SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr(jax, "config", config)
    assert cpu_memory.may_use_tpu() is expected


@pytest.mark.parametrize("found", ["may_use_gpu", "may_use_tpu"])
def test_accelerators_keep_the_librarys_own_ways(monkeypatch, found):
    module = gpu_flags if found == "may_use_gpu" else cpu_memory
    monkeypatch.setattr(module, found, lambda: True)
    monkeypatch.setattr(cpu_memory.ctypes, "CDLL", lambda name: pytest.fail("was asked"))
    cpu_memory.keep()
