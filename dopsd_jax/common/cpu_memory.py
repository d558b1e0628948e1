"""Memory of a program that computes on the processor: what a step gives back, the next one takes.

XLA asks the C library for the arrays of a step and gives them back after it. glibc returns blocks
of 32 MiB and more to the system at once, and the heaps of threads whenever they are empty. The
system then has to clear the same pages in every step: with long captions that was half of a step's
time (docs/running.md).
"""

import contextlib
import ctypes
import importlib.util
import os
from pathlib import Path

from dopsd_jax.common import gpu_flags

KEPT = 1 << 30  # bytes: free memory at a heap's end stays up to this, and blocks lie in heaps
HEAP = 128 << 20  # more than the 64 MiB of a thread's heap: an empty one is not given back
# The number of each option in malloc.h, under the name that sets it in the environment. A single
# heap for all threads would be simpler, but what a compilation leaves in it makes each small
# product slower: its threads share the lock while blocks are sought.
OPTIONS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, KEPT),
    "MALLOC_MMAP_THRESHOLD_": (-3, KEPT),
    "MALLOC_TOP_PAD_": (-2, HEAP),
}
TPUS = ("accel*", "vfio/*")  # files in /dev of a machine that has some


def keep() -> None:
    """Keeps freed memory where JAX computes on the processor; the user's own settings hold.

    To be called before JAX looks for devices: its threads have their heaps from then on. Does
    nothing where the C library is not glibc.
    """
    if gpu_flags.may_use_gpu() or may_use_tpu():
        return
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # there is no such function
        library = ctypes.CDLL(None)
        for name, (option, value) in OPTIONS.items():
            if name not in os.environ:
                library.mallopt(option, value)


def may_use_tpu() -> bool:
    """Whether JAX here can use a TPU, without asking for one."""
    import jax

    asked = (jax.config.jax_platforms or "").split(",")
    if not {"", "tpu"}.intersection(asked) or importlib.util.find_spec("libtpu") is None:
        return False
    return any(any(Path("/dev").glob(files)) for files in TPUS)
