"""Compiled programs are kept on disk: the second start of a program need not compile again."""

import hashlib
import os
import platform
from pathlib import Path

from dopsd_jax.common.files import expand

FOLDER = Path("dopsd_jax") / "compiled"  # in the user's cache folder
SECONDS = 0.5  # what is compiled faster is not kept
MAX_BYTES = 8 << 30  # then the programs that were not used for longest are removed


def keep() -> None:
    """Lets JAX keep what it compiles; its own settings, where there are any, hold.

    To be called before the first compilation. JAX itself goes on without the folder where it cannot
    be written.
    """
    import jax

    wanted = {"jax_persistent_cache_min_compile_time_secs": SECONDS}
    if not jax.config.jax_compilation_cache_dir:
        wanted["jax_compilation_cache_dir"] = str(folder())
        wanted["jax_compilation_cache_max_size"] = MAX_BYTES
    for name, value in wanted.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def folder() -> Path:
    """Where compiled programs are kept: one folder for each kind of processor.

    Home folders are shared between machines, and a program for one processor may end another's
    process.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand(base) / FOLDER / _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    except OSError:  # not Linux
        kinds = {platform.machine(), platform.processor()}
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:12]
