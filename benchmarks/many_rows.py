"""How long a start takes for each row of a data set whose pictures are known from an earlier one.

Makes tiny pictures with captions as a table, a folder and a tar file, opens each of them as a start
of training does, and prints microseconds of processor time a row for each part; the least of
several starts, since other programs on the machine only add to it. The first start of all, which
opens every picture, is not timed.

    python benchmarks/many_rows.py --folder /scratch/rows [--rows 20000] [--starts 4]
"""

import argparse
import json
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dopsd_jax.data import holdout
from dopsd_jax.data.buckets import make_buckets
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.data.dataset import describe
from dopsd_jax.data.loader import Batches
from dopsd_jax.data.measure import measure
from dopsd_jax.data.picture_index import PictureIndex
from dopsd_jax.data.rows import load_rows

SIZES = ((64, 64), (72, 56), (56, 72), (80, 48), (40, 40))  # of pictures
SHORT, LONG = 12, 45  # words of a caption
WORDS = ("a", "dog", "cat", "river", "stone", "wide", "morning", "light", "under", "painted", "red")
WRITTEN = 1_000_000_000  # when the files were, in seconds: long ago, so that they are remembered
HELD_OUT, BATCH = 8, 8


def write(folder: Path, rows: int) -> None:
    """The same pictures as a table, a folder and a tar file."""
    pictures, random = folder / "pictures", np.random.default_rng(0)
    pictures.mkdir(parents=True)
    caption = lambda words: " ".join(random.choice(WORDS, words))
    with open(folder / "table.jsonl", "w") as table, tarfile.open(folder / "set.tar", "w") as tar:
        for i in range(rows):
            width, height = SIZES[i % len(SIZES)]
            picture, text = pictures / f"{i:07d}.png", pictures / f"{i:07d}.txt"
            colour = (i % 256, i // 256 % 256, i // 65536)
            Image.new("RGB", (width, height), colour).save(picture)
            os.utime(picture, (WRITTEN, WRITTEN))
            short, detailed = caption(SHORT), caption(LONG)
            text.write_text(short)
            row = {"image_path": f"pictures/{picture.name}", "h*w": f"{height}*{width}"}
            print(json.dumps(row | {"short_en": short, "detailed_en": detailed}), file=table)
            tar.add(picture, picture.name)
            tar.add(text, text.name)
    os.utime(folder / "set.tar", (WRITTEN, WRITTEN))


def start(path: Path, cache: FeatureCache) -> Iterator[str]:
    """Opens a data set as training does; the name of each part, when it is done."""
    rows = load_rows(path, cache=cache)
    yield "read"
    dataset = measure(rows, make_buckets(64), index=PictureIndex(cache, str(path)))
    yield "look"
    trained, _ = holdout.split(dataset, HELD_OUT, seed=0)
    yield "hold out"
    dataset.digest()
    yield "digest"
    describe(dataset, BATCH)
    yield "describe"
    Batches(trained, dataset.rows, dataset.prompt_keys, batch_size=BATCH, seed=0).batch(0)
    yield "order"


def times(path: Path, cache: FeatureCache) -> dict[str, float]:
    """Seconds of processor time of each part of a start."""
    found, before = {}, time.process_time()
    for part in start(path, cache):
        now = time.process_time()
        found[part], before = now - before, now
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the files are made")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--starts", type=int, default=4, help="of which the fastest counts")
    options = parser.parse_args()
    folder = options.folder / f"rows_{options.rows}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        write(partial, options.rows)
        partial.rename(folder)
    cache, lines = FeatureCache(folder / "cache"), []
    for name in ("table.jsonl", "pictures", "set.tar"):
        times(folder / name, cache)
        starts = [times(folder / name, cache) for _ in range(options.starts)]
        least = {part: min(own[part] for own in starts) for part in starts[0]}
        parts = least | {"all": sum(least.values())}
        lines.append([name, *(f"{1e6 * own / options.rows:.1f}" for own in parts.values())])
    print("| us of processor time a row |", " | ".join(parts), "|")
    print("|---|" + "---|" * len(parts))
    for line in lines:
        print("|", " | ".join(line), "|")


if __name__ == "__main__":
    main()
