"""Compiled programs are kept, where the user wants them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from dopsd_jax.common import compile_cache
compile_cache.SECONDS = 0.0
compile_cache.keep()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(compile_cache.folder())
"""


def run(tmp_path: Path, **environment: str) -> Path:
    own = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    own |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu", **environment}
    own.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=own, capture_output=True, text=True, check=True
    )
    return Path(done.stdout.strip())


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*-cache")] if folder.exists() else []


def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    folder = run(tmp_path)
    assert folder.is_relative_to(tmp_path / "cache" / "dopsd_jax" / "compiled")
    kept = files(folder)
    assert kept
    assert run(tmp_path) == folder and sorted(files(folder)) == sorted(kept)  # found again


@pytest.mark.parametrize(
    "setting", [{"JAX_COMPILATION_CACHE_DIR": "{}/own"}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}]
)
def test_what_jax_is_told_holds(tmp_path, setting):
    setting = {name: value.format(tmp_path) for name, value in setting.items()}
    folder = run(tmp_path, **setting)
    assert not files(folder)
    assert bool(files(tmp_path / "own")) == ("JAX_COMPILATION_CACHE_DIR" in setting)


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "cache").write_text("a file")
    run(tmp_path)
