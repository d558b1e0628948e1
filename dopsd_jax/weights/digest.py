"""One number for the content of a network's weights, whatever files hold them.

The digest is over names, types, shapes and bytes of all tensors; sharding, file names and header
order do not change it. It combines one hash per tensor, so tensors can be hashed in any order.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dopsd_jax.common.atomic import write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_files import read_json
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.tensors import CODES, Tensors, contiguous

HASH_THREADS = 4


def tensor_digest(array: np.ndarray) -> str:
    """sha256 of type, shape and bytes."""
    content = hashlib.sha256(f"{CODES[array.dtype]} {list(array.shape)} ".encode())
    content.update(memoryview(contiguous(array).reshape(-1).view(np.uint8)))
    return content.hexdigest()


def part_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """The digest of a converted checkpoint's part: of names, types, shapes and bytes."""
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # one takes 0.7 GB a second
        digests = pool.map(tensor_digest, arrays.values())
        return combined_digest(dict(zip(arrays, digests, strict=True)))


def combined_digest(digests: Mapping[str, str]) -> str:
    """The digest of a set of tensors, given each one's."""
    lines = (f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest(tensors: Tensors) -> str:
    """The digest of all tensors: reads every byte."""
    return combined_digest({n: tensor_digest(tensors.read(n)) for n in tensors.infos})


def file_stamp(files: TensorFiles) -> str:
    """Names, sizes and times of the files: changes when they may have changed. Cheap."""
    stamps = []
    for file in sorted(files.files):
        status = file.stat()
        stamps.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def remembered_digest(tensors: Tensors, files: TensorFiles, memo: str | os.PathLike) -> str:
    """`digest(tensors)`, taken once per state of `files` and kept in the JSON file `memo`.

    An unreadable memo is written anew: it holds nothing that cannot be computed.
    """
    memo, stamp = Path(memo), file_stamp(files)
    try:
        known, _ = read_json(memo)
    except UserError:
        known = {}
    if not isinstance(known, dict):
        known = {}
    if not isinstance(known.get(stamp), str):
        known[stamp] = digest(tensors)
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_text(memo, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return known[stamp]
