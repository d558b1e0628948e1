"""Shared by all tests: float32 products, and the one measure of error."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile more than they run: without fusions' own emitters, where there is a choice, faster.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import numpy as np
import pytest
import warm_start
from shape_checks import check_shapes

check_shapes(
    *("common", "parallel", "models", "weights", "data", "adapters", "dopsd", "methods", "config"),
    *("training", "run", "reporting", "estimation", "families", "conditioning", "evaluation"),
    *("random_model", "serving.drawing", "serving.watching", "miniature"),
)

import dopsd_jax
from dopsd_jax.adapters import attach
from dopsd_jax.common.atomic import partial_of
from dopsd_jax.common.errors import UserError
from dopsd_jax.families.lora import lora_layers
from dopsd_jax.families.zimage import family
from dopsd_jax.models import zimage_config
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights.lora_files import LoraModule
from dopsd_jax.weights.lora_write import write_lora

jax.config.update("jax_default_matmul_precision", "float32")


def pytest_configure(config):
    """All processes of a run of tests share what they compile: it is the same again and again."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="compiled-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        jax.config.update("jax_compilation_cache_dir", folder)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def problems_of(call, *args, **kwargs) -> tuple[str, ...]:
    """The lines of the `UserError` that a call must raise."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return caught.value.problems


def left_by_killed(path: Path) -> Path:
    """What a writer of `path` that was killed leaves: the name has the number of no process."""
    name = re.sub(r"-\d+-\d+-(?=[0-9a-f]{8}$)", "-4194305-1-", partial_of(path).name)
    return path.with_name(name)


def relative_error(actual, expected) -> float:
    """max |actual - expected| / max |expected|, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """The miniature's folder, made once; do not write into it."""
    return write_random_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def lora_file(random_model, tmp_path_factory):
    """A strong random adapter of the miniature, as the training program would write it."""
    rng = np.random.default_rng(0)
    config = dopsd_jax.load_pipeline(str(random_model)).config
    chosen = attach.select(attach.slots(zimage_config.names(config)), "blocks", family.LORA_PRESETS)
    modules = {
        path: LoraModule(
            rng.standard_normal((4, slot.din)).astype(np.float32) / slot.din**0.5,
            0.5 * rng.standard_normal((slot.dout, 4)).astype(np.float32),
            2.0,
        )
        for path, slot in chosen.items()
    }
    path = tmp_path_factory.mktemp("lora") / "strong.safetensors"
    write_lora(path, modules, lora_layers(family, config))
    return path


# What is looked at beside a run changes nothing of it.
OWN_PROMPT = "a large green circle in another scene"
WATCHED = (
    f"--config.sample_prompts={OWN_PROMPT}",
    "--config.trackers=tensorboard",
    "--config.remat=auto",
)


@pytest.fixture(scope="session")
def random_run(tmp_path_factory):
    """A work directory in which `train --config configs/zimage.py:random` ran for a few steps.

    Made once for all processes of a run of tests; do not write into it.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    workdir, output = base / "random_run", base / "random_run" / "stdout.txt"
    with open(base / "random_run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            result = run_program("train", *RANDOM_CONFIG, *WATCHED, f"--workdir={workdir}")
            assert result.returncode == 0, result.stderr
            output.write_text(result.stdout)
    return workdir


@pytest.fixture
def bucket():
    """The address of an empty object store: gs:// goes through fsspec, here to its memory."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = ("gs", "gcs")
        store, pseudo_dirs = {}, [""]

        def __init__(self, *args, finalize_on_close=None, **kwargs):
            super().__init__(*args, **kwargs)

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).removeprefix("gs://"))

    old = dict(fsspec.registry)
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    yield "gs://bucket"
    for name in Bucket.protocol:
        if name in old:
            fsspec.register_implementation(name, old[name], clobber=True)


ROOT = Path(__file__).parents[1]
# Four steps, saved at 2 and 4: enough to see everything happen. Every bucket is traced and compiled
# by itself, which takes most of a run's time; test_second_family.py has two of them.
RANDOM_CONFIG = (
    f"--config={ROOT}/configs/zimage.py:random",
    "--config.steps=4",
    "--config.checkpoint_every=2",
    "--config.sample_every=0",
    "--config.sample_rows=1",
    "--config.data.buckets=96x96",
    "--config.grid=1,0.5",
)


def run_program(
    name: str, *arguments: str, folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    """Runs `python -m dopsd_jax.<name>` in a folder as a user does; output as text."""
    module, given = f"dopsd_jax.{name}", [*map(str, arguments)]
    if not environment:
        return warm_start.run_module(module, given, folder)
    return subprocess.run(
        [sys.executable, "-m", module, *given],
        capture_output=True, text=True, timeout=600, cwd=folder, env=os.environ | environment,
    )  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process waits for another's at the end.

    Tests marked `gpu` run where there is one; JAX_PLATFORMS=cuda asks for it.
    """
    order = ("multiprocess", "slow")
    rank = {}
    for item in items:
        own = [order.index(mark) for mark in order if item.get_closest_marker(mark)]
        rank[item.path] = min(*own, rank.get(item.path, len(order)), len(order))
    items.sort(key=lambda item: rank[item.path])
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU; run with JAX_PLATFORMS=cuda"))
