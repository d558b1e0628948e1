"""Helpers of the tests that convert weights."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from flax import nnx

from dopsd_jax.common.progress import Progress
from dopsd_jax.families.zimage.networks import ZIMAGE
from dopsd_jax.random_model import Size
from dopsd_jax.weights.safetensors_io import TensorFiles

ROOT = Path(__file__).parents[1]
TRANSFORMER = ZIMAGE["transformer"]
SMALL = Size(layers=2, refiner_layers=1)


def tensors_of(path):
    """Type, shape and bytes of every tensor of a file or folder."""
    files = TensorFiles.open(path)
    return {n: (i.dtype, i.shape, files.read(n).tobytes()) for n, i in files.infos.items()}


def same_modules(a, b):
    """Fails unless both modules hold the same parameters, bit for bit."""
    a, b = (dict(nnx.to_flat_state(nnx.state(m))) for m in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        x, y = np.asarray(a[path][...]), np.asarray(b[path][...])
        assert x.dtype == y.dtype and x.shape == y.shape, path
        assert x.tobytes() == y.tobytes(), path


def run_python(*args, **env):
    """Output of a Python process with the project on its path; fails if the process does."""
    full = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, env=full, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Interrupt(Progress):
    """Stops an import after some parts, as a signal would; counts what was done."""

    def __init__(self, after):
        super().__init__("interrupted", quiet=True)
        self.after = after

    def advance(self, items=1, text=""):
        super().advance(items, text)
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt
