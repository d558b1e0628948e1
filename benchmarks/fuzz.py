"""Feeds damaged files to every reader: whatever comes, the answer is a `UserError` or a result.

    python benchmarks/fuzz.py --cases 100000 --seed 0

Prints the cases of each reader, and every exception that is not a `UserError` with the seed that
gives it again. The suite runs a few hundred of the same cases (tests/test_fuzz.py).
"""

import argparse
import collections
import copy
import json
import random
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dopsd_jax import families
from dopsd_jax.common.errors import UserError
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.conversion.inspection import inspect
from dopsd_jax.families.zimage.networks import VLM, ZIMAGE
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights import converted, hub
from dopsd_jax.weights.lora_dialects import layers_of
from dopsd_jax.weights.lora_files import LoraModule, read_lora
from dopsd_jax.weights.lora_write import write_lora
from dopsd_jax.weights.model_folder import check_assets
from dopsd_jax.weights.stored import open_stored, read_config

NASTY = (
    None, True, False, 0, -1, 1, 2, 10**9, 2**31, 2**63, 10**39, 0.0, -0.5, 1e308, 1e-320,
    "", "x", "nan", "../..", "\x00", "\x1b[31m", "é" * 40, "(a+)+$", "layers.0",
    [], {}, [[]], [1], [None], {"a": 1}, [0, 0], [1, 2, 3], [10**12] * 3, ["a"] * 3,
)  # fmt: skip
TOKENS = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 2000, b'"\\ud800"', b"\xff\xfe", b"{")


class Reader(NamedTuple):
    """A file that is damaged, and what reads it; `header` is the kind of its content."""

    path: Path
    read: Callable[[], object]
    kind: str  # json, safetensors or bytes


def damaged(rng: random.Random, content: bytes, kind: str) -> bytes:
    """`content` with one to three faults: of its meaning if it can be parsed, or of its bytes."""
    if kind == "safetensors" and rng.random() < 0.7:
        (length,) = struct.unpack("<Q", content[:8])
        header = damaged(rng, content[8 : 8 + length], "json")
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    if kind == "json" and rng.random() < 0.7:
        tree = json.loads(content)
        for _ in range(rng.randint(1, 3)):
            tree = _with_fault(rng, tree)
        content = json.dumps(tree).encode()
        if rng.random() < 0.8:
            return content
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(5)
        if action == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del data[at : at + rng.choice((1, 8, 100, 10**9))]
        elif action == 2:
            data[at:at] = rng.choice(TOKENS)
        elif action == 3:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**24, 2**63, 2**64 - 1)))
        else:
            data[at:at] = data[: rng.randrange(1 + min(len(data), 500))]
    return bytes(data)


def _with_fault(rng: random.Random, tree: object) -> object:
    places: list[tuple[dict | list, object]] = []

    def walk(node):
        inner = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in inner:
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    if isinstance(tree, dict | list):
        walk(tree)
    if not places or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(NASTY))
    node, key = rng.choice(places)
    action = rng.randrange(6)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[rng.choice(("x", "", "__metadata__", "é", key + "x"))] = node.pop(key)
    elif action == 2:
        other, name = rng.choice(places)
        node[key] = json.loads(json.dumps(other[name])) if _has(other, name) else None
    elif isinstance(node[key], str) and action == 3:
        node[key] = rng.choice(TOKENS).decode("latin-1") + node[key]
    else:
        node[key] = copy.deepcopy(rng.choice(NASTY))  # later faults change it
    return tree


def _has(node: dict | list, key: object) -> bool:
    return key in node if isinstance(node, dict) else key < len(node)


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader by name, each with a good file of its own below `folder`."""
    model = write_random_model(folder / "model")
    import_model(model, folder / "converted")
    return weight_readers(folder, model)


def weight_readers(folder: Path, model: Path) -> dict[str, Reader]:
    """The readers of models, weights and LoRA files."""
    transformer, vlm = ZIMAGE["transformer"], model / "vlm"
    made = folder / "converted" / "transformer"
    config, _ = read_config(model / "transformer" / "config.json", transformer)
    layers = layers_of(transformer, config)
    modules = {
        path: LoraModule(
            np.ones((2, t.width), np.float32), np.ones((t.rows[0], 2), np.float32), 2.0
        )
        for path, t in list(layers.split.items())[:6]
    }
    lora, peft = folder / "lora.safetensors", folder / "peft"
    write_lora(lora, modules, layers)
    write_lora(peft, modules, layers, "Q")
    preprocessor = vlm / "preprocessor_config.json"

    def components(network, path):
        return lambda: open_stored(path, network)

    found = {
        f"{name} config": Reader(
            model / name / "config.json", components(network, model / name), "json"
        )
        for name, network in (*ZIMAGE.items(), ("vlm", VLM))
    }
    family = families.load("zimage")
    pipeline = lambda: family.Pipeline(family, model)
    (weights,) = (model / "transformer").glob("*.safetensors")
    return found | {
        "safetensors": Reader(weights, components(transformer, weights.parent), "safetensors"),
        "inspect": Reader(weights, lambda: list(inspect(weights)), "safetensors"),
        "lora": Reader(lora, lambda: read_lora(lora, layers), "safetensors"),
        "lora inspect": Reader(lora, lambda: list(inspect(lora)), "safetensors"),
        "peft": Reader(peft / "adapter_config.json", lambda: read_lora(peft, layers), "json"),
        "manifest": Reader(made / converted.MANIFEST, components(transformer, made), "json"),
        "converted config": Reader(made / "config.json", components(transformer, made), "json"),
        "model manifest": Reader(
            folder / "converted" / hub.MODEL_MANIFEST,
            lambda: (families.of_folder(folder / "converted"), hub.resolve(folder / "converted")),
            "json",
        ),
        "model index": Reader(
            model / "model_index.json", lambda: families.of_folder(model), "json"
        ),
        "scheduler": Reader(
            model / "scheduler" / "scheduler_config.json", lambda: pipeline().scheduler, "json"
        ),
        "tokenizer": Reader(
            model / "tokenizer" / "tokenizer_config.json", lambda: check_assets(model), "json"
        ),
        "preprocessor": Reader(preprocessor, lambda: pipeline().image_settings({}), "json"),
    }


def run_case(reader: Reader, good: bytes, seed: str) -> Exception | None:
    """Damages the file, reads it, and puts the good one back. What was raised besides UserError."""
    reader.path.write_bytes(damaged(random.Random(seed), good, reader.kind))
    try:
        reader.read()
    except UserError as error:
        if not all(problem.isprintable() for problem in error.problems):
            return ValueError(f"unprintable: {error.problems!r}")
    except Exception as error:
        return error
    finally:
        reader.path.write_bytes(good)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one reader, by name")
    args = parser.parse_args()
    counts: collections.Counter = collections.Counter()
    slowest, kinds = 0.0, set()
    with tempfile.TemporaryDirectory() as folder:
        table = readers(Path(folder))
        if args.only:
            table = {args.only: table[args.only]}
        good = {name: reader.path.read_bytes() for name, reader in table.items()}
        for case in range(args.cases):
            name = list(table)[case % len(table)]
            seed, began = f"{args.seed}/{name}/{case}", time.monotonic()
            error = run_case(table[name], good[name], seed)
            slowest = max(slowest, time.monotonic() - began)
            counts[name] += 1
            if error is not None:
                counts["exceptions"] += 1
                place = traceback.extract_tb(error.__traceback__)[-1:]
                kind = (type(error).__name__, str(place))
                if kind not in kinds:
                    kinds.add(kind)
                    print(f"{seed}: {type(error).__name__}: {str(error)[:200]} {place}")
    for name, count in counts.items():
        print(f"{name}: {count}")
    print(f"{args.cases} cases, {counts['exceptions']} exceptions, slowest {slowest:.2f} s")
    return min(counts["exceptions"], 1)


if __name__ == "__main__":
    sys.exit(main())
