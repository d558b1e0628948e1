"""Times what stands around the step: filling the cache, and a start by its parts.

    python benchmarks/around.py --what=filling --batch=4
    python benchmarks/around.py --what=start [--second]

On a Z-Image folder with random weights of the published sizes (`big_folder.py`). A start is that of
`dopsd_jax.train` on four pictures, until its second step; --second: what the first one compiled is
found again. The last line is the result as JSON.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import big_folder
import numpy as np
from absl import flags
from PIL import Image

from dopsd_jax.common import program, start_parts
from dopsd_jax.common.errors import UserError

WHAT = flags.DEFINE_enum("what", "filling", ["filling", "start"], "what is timed")
BATCH = flags.DEFINE_integer("batch", 1, "captions and pictures that are encoded at once", 1)
REPEATS = flags.DEFINE_integer("repeats", 10, "timed batches", 1)
SECOND = flags.DEFINE_bool("second", False, "keep what an earlier start has compiled")
DRY = flags.DEFINE_bool("dry", False, "the random miniature")
PICTURES = 4


def main() -> None:
    folder = big_folder.folder("zimage", DRY.value)
    parts = filling(folder) if WHAT.value == "filling" else start(folder)
    print("result: " + json.dumps({"parts": parts}))


def filling(folder: Path) -> dict[str, float]:
    """Seconds of loading and compiling, and then pictures a second."""
    import dopsd_jax
    from dopsd_jax.families.base import STUDENT, TEACHER

    begin, side = time.perf_counter(), 64 if DRY.value else 1024
    pipe = dopsd_jax.load_pipeline(str(folder), dtype="float32" if DRY.value else "bfloat16")
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    caption = "a large green circle on the left of a small red square"
    count = BATCH.value

    def encode() -> None:
        plain = [pipe.request(STUDENT, caption)] * count
        shown = [pipe.request(TEACHER, caption, sizes=[(side, side)])] * count
        pipe.encode(STUDENT, plain, [[]] * count)
        pipe.encode(TEACHER, shown, [[image]] * count)

    encode()
    first, seconds = time.perf_counter() - begin, []
    for _ in range(1 if DRY.value else REPEATS.value):
        begin = time.perf_counter()
        encode()
        seconds.append(time.perf_counter() - begin)
    return {"load and compile, s": first, "images/s": count / statistics.median(seconds)}


def start(folder: Path) -> dict[str, float]:
    """Seconds of each part of a start, as `train` has measured them, and of what follows."""
    base = Path(tempfile.gettempdir()) / "dopsd_on_gpu" / "start"
    cache, run = base / "cache", base / "run"
    shutil.rmtree(run, ignore_errors=True)
    if not SECOND.value:
        shutil.rmtree(cache, ignore_errors=True)
    side = 64 if DRY.value else 1024
    pictures(base / "pictures", side)
    words = [
        f"--config=configs/zimage.py:{'random' if DRY.value else 'lora'}", f"--workdir={run}",
        f"--config.model={folder}", f"--config.data.path={base / 'pictures'}",
        "--config.teacher.vlm=", f"--config.data.resolution={side}", "--config.data.buckets=",
        "--config.steps=2", "--config.batch_size=1",
        "--config.checkpoint_every=2", "--config.sample_every=0",
        "--config.sample_rows=1", "--config.remat=auto",
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    env["XDG_CACHE_HOME"] = str(cache)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dopsd_jax.train", *words],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise UserError("train failed: " + "".join(done.stdout.splitlines(True)[-5:]).strip())
    found = json.loads((run / start_parts.FILE).read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    after = {"second step": records[1]["seconds"], "all, with the end": time.perf_counter() - begin}
    return found | after


def pictures(folder: Path, side: int) -> None:
    """A data set of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of noise, number {i}\n")


if __name__ == "__main__":
    program.run(main)
