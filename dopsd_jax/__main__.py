"""Starts a program by its name: dopsd-jax PROGRAM ..., or python -m dopsd_jax PROGRAM ..."""

import runpy
import sys

from dopsd_jax import __version__

PROGRAMS = {
    "caption": "write captions for pictures that have none",
    "train": "tune a model on pictures with captions",
    "prepare": "encode a data set once, for many runs or many machines",
    "check": "look at a configuration, its data and its teacher before training",
    "sample": "draw pictures from prompts",
    "serve": "try a model and LoRA files on a page of this machine, and watch a run",
    "evaluate": "compare a run's result with the base model, in scores with intervals",
    "estimate": "tell memory and work of a training step on devices that you do not have",
    "convert": "import, export, merge and inspect weights and LoRA files",
    "report": "write the page of a run again",
    "push": "write a model card for a LoRA file, and upload both to the hub",
}


def usage() -> str:
    width = max(map(len, PROGRAMS))
    return "\n".join([
        "usage: dopsd-jax PROGRAM [options], or python -m dopsd_jax.PROGRAM [options]",
        "",
        *(f"  {name:{width}}  {text}" for name, text in PROGRAMS.items()),
        "",
        "dopsd-jax PROGRAM --help lists the program's options; dopsd-jax --version the version.",
    ])  # fmt: skip


def main() -> int:
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"dopsd_jax {__version__}")
        return 0
    if name not in PROGRAMS:
        print(f"error: {name}: is not a program; see dopsd-jax --help", file=sys.stderr)
        return 2
    sys.argv = [f"dopsd-jax {name}", *rest]
    runpy.run_module(f"dopsd_jax.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
