"""Options of XLA's compiler for GPUs that a program sets itself, so that no shell has to.

An option that a compiler does not know ends the process. So there are only those that jaxlib 0.10.2
and 0.12.0.1 both read (tests/test_gpu_flags.py asks the jaxlib that is installed), and none for a
jaxlib beyond setup.py's bounds.
"""

import importlib.metadata
import importlib.util
import os
import re

# Off by default in XLA (xla/debug_options_flags.cc). NVIDIA's containers set it for every program
# (docs.nvidia.com/jax-toolbox/environment-variables), JAX's own advice names it
# (docs.jax.dev/en/latest/gpu_performance_tips.html): copies and traffic are started early, under
# the work that does not wait for them, as those of layers in the host's memory are.
# What else such lists name is XLA's default by now: triton_gemm_any, command buffers for kernels,
# products and convolutions, autotuning at level 4.
FLAGS = {"xla_gpu_enable_latency_hiding_scheduler": "true"}
NEWEST = (0, 13)  # the first jaxlib whose options were not looked at
SWITCH = "DOPSD_JAX_XLA_FLAGS"  # "off": nothing is added
PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
PLATFORMS = {"", "cuda", "gpu"}  # names of JAX_PLATFORMS under which a GPU may be used


def add() -> None:
    """Adds `FLAGS` to XLA_FLAGS where a GPU may be used; what the user has set there, holds.

    To be called before JAX looks for devices: XLA reads the variable once.
    """
    if os.environ.get(SWITCH, "").strip().lower() in ("off", "0", "false"):
        return
    if not may_use_gpu() or not known(importlib.metadata.version("jaxlib")):
        return
    own = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [own, *missing(own)]))


def missing(own: str) -> list[str]:
    """Those of `FLAGS` that the words of XLA_FLAGS do not set."""
    named = {word.partition("=")[0].lstrip("-") for word in own.split()}
    return [f"--{name}={value}" for name, value in FLAGS.items() if name not in named]


def known(version: str) -> bool:
    """Whether the options of this jaxlib were looked at."""
    return tuple(map(int, re.findall(r"\d+", version)[:2])) < NEWEST


def may_use_gpu() -> bool:
    """Whether JAX here can use an NVIDIA GPU, without asking for one."""
    import jax

    asked = (jax.config.jax_platforms or "").split(",")
    return bool(PLATFORMS.intersection(asked)) and any(map(_is_installed, PLUGINS))


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # there are no plugins at all
        return False
