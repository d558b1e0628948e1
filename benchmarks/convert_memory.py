"""Peak memory of converting the full-size transformer: 6.15 billion float32 parameters, 24.6 GB.

Makes a synthetic one (random numbers, true names and shapes, three shards), imports it, exports it
again and prints time and peak memory of each, every step in a process of its own. Needs about 50 GB
of disk, which it frees at the end.

    python benchmarks/convert_memory.py --folder /scratch/zimage [--layers 30]
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from dopsd_jax.common.progress import byte_progress
from dopsd_jax.conversion.export import export_diffusers, export_single
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.models.zimage_config import ZImageConfig, names
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights.safetensors_write import write_sharded
from dopsd_jax.weights.tensors import TensorInfo, take
from dopsd_jax.weights.validation import sources

BOUND = 4 * 2**30
BLOCK = 1 << 20  # random numbers that are drawn once and repeated


class Synthetic:
    """Tensors of a transformer, made when they are asked for."""

    where = "synthetic"

    def __init__(self, config: ZImageConfig):
        self.infos = {n: TensorInfo("F32", s) for n, s in sources(names(config)).items()}
        self.block = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        shape = self.infos[name].shape
        return take(np.resize(np.roll(self.block, len(name)), shape), rows)


def make_model(folder: Path, layers: int) -> None:
    """The miniature with a full-size transformer."""
    write_random_model(folder)
    config = ZImageConfig(layers=layers, caption_dim=64)
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config.to_dict()))
    progress, tensors = byte_progress("writing"), Synthetic(config)
    progress.start(sum(info.nbytes for info in tensors.infos.values()))
    write_sharded(folder / "transformer", "diffusion_pytorch_model", tensors, progress=progress)


def measured(work: Callable[[], None]) -> tuple[float, int]:
    """Seconds and peak memory in bytes of `work` in a new process."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, send))
    began = time.monotonic()
    process.start()
    send.close()
    try:
        peak = receive.recv()
    except EOFError:
        sys.exit("the process ended early")
    process.join()
    return time.monotonic() - began, peak


def _run(work: Callable[[], None], send) -> None:
    work()
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kB on Linux
    send.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class Step:
    """One call of a function, to be pickled."""

    def __init__(self, function: Callable, *args):
        self.function, self.args = function, args

    def __call__(self) -> None:
        self.function(*self.args, progress=byte_progress("converting"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; must not exist")
    parser.add_argument("--layers", type=int, default=30, help="main layers (30 is the true model)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    model, out = args.folder / "model", args.folder / "converted"
    try:
        make_model(model, args.layers)
        size = sum(file.stat().st_size for file in (model / "transformer").iterdir())
        print(f"transformer: {size / 1e9:.2f} GB")
        steps = {
            "import": Step(import_model, model, out),
            "export diffusers": Step(export_diffusers, out, args.folder / "back"),
            "export comfyui": Step(export_single, out, args.folder / "one.safetensors"),
        }
        worst = 0
        for name, step in steps.items():
            seconds, peak = measured(step)
            worst = max(worst, peak)
            print(f"{name}: {seconds:.0f} s, peak {peak / 2**30:.2f} GiB")
            # What the next step does not need.
            shutil.rmtree({"import": model}.get(name, args.folder / "back"), ignore_errors=True)
        print(f"bound {BOUND / 2**30:.0f} GiB: {'kept' if worst < BOUND else 'BROKEN'}")
        if worst >= BOUND:
            sys.exit(1)
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
