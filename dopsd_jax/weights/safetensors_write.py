"""Writes safetensors files tensor by tensor, and sharded folders as diffusers lays them out."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from etils import epath

from dopsd_jax.common.atomic import atomic_file, is_remote, need_space, write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.progress import SILENT, Progress
from dopsd_jax.weights.tensors import CODES, TensorInfo, Tensors, check_finite, contiguous

MAX_SHARD = 10_000_000_000  # diffusers' default, bytes
HEADER_MULTIPLE = 8


def file_order(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Wide types first, then by name: every tensor begins at a multiple of its item size."""
    return sorted(infos, key=lambda n: (-infos[n].numpy.itemsize, n))


def write_safetensors(
    path: str | os.PathLike,
    infos: Mapping[str, TensorInfo],
    produce: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
) -> None:
    """Writes one file; `produce(name)` gives a tensor when its turn comes.

    The file appears under its name when it is whole. Raises `UserError` when it cannot be written;
    an older file of the name is then untouched.
    """
    path = epath.Path(path)
    if not is_remote(path):
        if not path.parent.is_dir():
            raise UserError(f"{path.parent}: no such folder; create it first")
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the name of a file")
        need_space(path.parent, sum(info.nbytes for info in infos.values()))
    names = file_order(infos)
    with atomic_file(path) as file:
        file.write(header_bytes(names, infos, metadata))
        for name in names:
            array, info = produce(name), infos[name]
            if CODES.get(array.dtype) != info.dtype or array.shape != info.shape:
                raise ValueError(f"{name}: produced {array.dtype} {array.shape}, announced {info}")
            array = check_finite(contiguous(array), path, name)
            file.write(memoryview(array.reshape(-1).view(np.uint8)))
            progress.advance(info.nbytes, name)


def header_bytes(names: list[str], infos: Mapping[str, TensorInfo], metadata) -> bytes:
    """What stands before the data: tensors in the order of `names`."""
    entries, offset = {}, 0
    if metadata:
        entries["__metadata__"] = dict(metadata)
    for name in names:
        info = infos[name]
        span = [offset, offset + info.nbytes]
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_MULTIPLE)
    return struct.pack("<Q", len(text)) + text


def write_sharded(
    folder: str | os.PathLike,
    base: str,
    tensors: Tensors,
    max_shard: int = MAX_SHARD,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
) -> None:
    """Writes `<base>.safetensors`, or `<base>-00001-of-0000N.safetensors` and the index.

    `base` is `diffusion_pytorch_model` for diffusers' components, `model` for transformers'.
    """
    folder, infos = Path(folder), tensors.infos
    parts = shards(infos, max_shard)
    weight_map = {}
    for number, names in enumerate(parts, 1):
        part = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        file = f"{base}{part}.safetensors"
        write_safetensors(
            folder / file, {n: infos[n] for n in names}, tensors.read, metadata, progress
        )
        weight_map |= {n: file for n in names}
    if len(parts) > 1:
        size = sum(info.nbytes for info in infos.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_text(folder / f"{base}.safetensors.index.json", text)


def shards(infos: Mapping[str, TensorInfo], limit: int | None) -> list[list[str]]:
    """Names file by file, alphabetically; a tensor larger than `limit` bytes stands alone."""
    files, size = [[]], 0
    for name in sorted(infos):
        if limit is not None and files[-1] and size + infos[name].nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += infos[name].nbytes
    return files
