"""Reads safetensors files and sharded folders, checking everything a damaged file can get wrong.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, tensor data).
"""

import dataclasses
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.file_kinds import FIRST_BYTES, kind_of
from dopsd_jax.common.files import open_regular
from dopsd_jax.common.json_fields import in_json
from dopsd_jax.common.json_files import parse_json, read_json
from dopsd_jax.weights.tensors import DTYPES, TensorInfo

MAX_HEADER = 8 << 20  # bytes; real ones take one or two, and parsed they take 30 times as much
MAX_AXES = 16
AGAIN = "download or copy the file again"
INDEX_SUFFIX = ".safetensors.index.json"
# File names that diffusers and transformers look for.
BASE_NAMES = ("diffusion_pytorch_model", "model", "adapter_model")


@dataclasses.dataclass(frozen=True)
class FileInfo(TensorInfo):
    """A tensor of a file: where its bytes begin."""

    file: Path
    start: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The checked header of one file."""

    tensors: dict[str, FileInfo]
    metadata: dict[str, str]
    size: int


def read_header(path: str | os.PathLike) -> Header:
    """Header of one file. Raises `UserError` naming every fault."""
    path = Path(path)
    with open_regular(path) as file:
        try:
            return parse_header(path, os.fstat(file.fileno()).st_size, file)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from None


def parse_header(path: Path, size: int, file) -> Header:
    """`read_header` of a binary file of `size` bytes, wherever it is; `path` is its name."""
    if size == 0:
        raise UserError(f"{path}: the file is empty (0 bytes); {AGAIN}")
    if size < 8:
        raise UserError(f"{path}: {size} bytes are too few for a safetensors file; {AGAIN}")
    first = file.read(8)
    (length,) = struct.unpack("<Q", first)
    if length > MAX_HEADER:
        kind = kind_of(first + file.read(FIRST_BYTES))
        what = kind or f"not a safetensors file (header length {length}); {AGAIN}"
        raise UserError(f"{path}: {what}")
    if 8 + length > size:
        raise UserError(
            f"{path}: truncated: the header takes {length} bytes, the file has {size - 8}; {AGAIN}"
        )
    entries = parse_json(file.read(length), f"{path}: the header", AGAIN)
    if not isinstance(entries, dict):
        raise UserError(f"{path}: the header is not a JSON object; {AGAIN}")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not _is_strings(metadata):
        raise UserError(f"{path}: __metadata__ is not a table of strings; {AGAIN}")
    begin = 8 + length
    faults, tensors = [], {}
    for name, entry in entries.items():
        fault = _entry_fault(entry)
        if fault:
            faults.append(f"{path}: tensor {name!r}: {fault}; {AGAIN}")
        else:
            shape, start = tuple(entry["shape"]), begin + entry["data_offsets"][0]
            tensors[name] = FileInfo(entry["dtype"], shape, path, start)
    raise_if(faults)
    raise_if(_offset_faults(path, entries, size - begin))
    return Header(tensors, metadata, size)


def _is_strings(table) -> bool:
    return isinstance(table, dict) and all(isinstance(v, str) for v in table.values())


def _is_sizes(values) -> bool:
    if not isinstance(values, list) or len(values) > MAX_AXES:
        return False
    return all(type(v) is int and 0 <= v < 2**63 for v in values)


def _entry_fault(entry) -> str | None:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "its entry does not hold exactly dtype, shape and data_offsets"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        return f"type {in_json(entry['dtype'])} is not one of {', '.join(DTYPES)}"
    if not _is_sizes(entry["shape"]):
        return f"shape {in_json(entry['shape'])} is not a list of sizes"
    offsets = entry["data_offsets"]
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {in_json(offsets)} are not a range"
    expected = TensorInfo(entry["dtype"], tuple(entry["shape"])).nbytes
    if offsets[1] - offsets[0] != expected:
        return (
            f"{offsets[1] - offsets[0]} bytes, but {entry['dtype']} {entry['shape']} "
            f"takes {expected}"
        )
    return None


def _offset_faults(path: Path, entries: dict, available: int) -> list[str]:
    faults, end = [], 0
    ordered = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    for start, stop, name in ordered:
        if start != end:
            what = "overlaps the one before it" if start < end else "leaves a gap before it"
            faults.append(f"{path}: tensor {name!r} {what} (byte {start}, not {end}); {AGAIN}")
        end = stop
    if end > available:
        faults.append(f"{path}: truncated: {end} bytes of data, {available} there; {AGAIN}")
    if end < available:
        faults.append(f"{path}: {available - end} bytes behind the last tensor; {AGAIN}")
    return faults


class TensorFiles:
    """The tensors of one safetensors file, or of the shards of a folder."""

    def __init__(self, where: str, headers: Mapping[Path, Header]):
        self.where = where
        self.files = tuple(headers)
        self.infos: dict[str, FileInfo] = {}
        self.metadata: dict[str, str] = {}
        for header in headers.values():
            self.infos |= header.tensors
            self.metadata |= header.metadata

    @classmethod
    def open(cls, path: str | os.PathLike) -> "TensorFiles":
        """Opens a file, or a folder with one file or an index. Raises `UserError`."""
        path = Path(path)
        if not os.path.isdir(path):
            return cls(str(path), {path: read_header(path)})
        index = _find_index(path)
        if index is not None:
            return cls(str(path), _sharded_headers(index))
        file = _find_single(path)
        return cls(str(path), {file: read_header(file)})

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or rows of it (step 1), read from the file into new memory."""
        info = self.infos[name]
        shape, start = info.shape, info.start
        if rows != slice(None):
            first, last, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError(f"rows {rows}: only step 1")
            start += first * (info.nbytes // shape[0])
            shape = (max(last - first, 0), *shape[1:])
        array = np.empty(shape, info.numpy)
        # A copy by read(), not a memory map: mapped pages would count as this process's memory.
        target = memoryview(array.reshape(-1).view(np.uint8))
        try:
            with open(info.file, "rb", buffering=0) as file:
                file.seek(start)
                done = 0
                while done < len(target):
                    count = file.readinto(target[done:])
                    if not count:
                        raise UserError(f"{info.file}: ends inside tensor {name!r}; {AGAIN}")
                    done += count
        except OSError as error:
            raise UserError(f"{info.file}: cannot be read ({error.strerror}); {AGAIN}") from error
        return array


def _preferred(found: list[Path], suffix: str) -> Path | None:
    """The file with a name diffusers or transformers would take, else the only one."""
    for base in BASE_NAMES:
        for file in found:
            if file.name == base + suffix:
                return file
    return found[0] if len(found) == 1 else None


def _find_index(folder: Path) -> Path | None:
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if not found:
        return None
    if index := _preferred(found, INDEX_SUFFIX):
        return index
    listed = ", ".join(f.name for f in found)
    raise UserError(f"{folder}: several index files ({listed}); leave the one to read")


def _find_single(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if file := _preferred(found, ".safetensors"):
        if "-of-" not in file.name:
            return file
        found = [file]
    if any("-of-" in f.name for f in found):
        raise UserError(
            f"{folder}: has shards ({found[0].name}) but no index *{INDEX_SUFFIX}; download it too"
        )
    if found:
        listed = ", ".join(f.name for f in found)
        raise UserError(f"{folder}: several safetensors files ({listed}); name the one to read")
    pickles = [f.name for p in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(p)]
    if pickles:
        raise UserError(
            f"{folder}: has only {pickles[0]}, a pickle, which may run code when read; "
            "get the safetensors version"
        )
    raise UserError(f"{folder}: no safetensors file in it; check the path, or download it again")


def _sharded_headers(index: Path) -> dict[Path, Header]:
    weight_map = _read_index(index)
    folder, faults, headers = index.parent, [], {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
            faults.append(f"{index}: shard {shard!r} is not a plain file name; {AGAIN}")
            continue
        if not os.path.isfile(folder / shard):
            faults.append(f"{folder / shard}: missing, but {index.name} names it; download it")
            continue
        try:
            headers[folder / shard] = read_header(folder / shard)
        except UserError as error:
            faults += error.problems
    found = {name: file for file, header in headers.items() for name in header.tensors}
    copies = sum(len(header.tensors) for header in headers.values())
    for name, shard in weight_map.items():
        file = folder / shard
        if file in headers and name not in headers[file].tensors:
            faults.append(f"{file}: lacks tensor {name!r}, which {index.name} puts there; {AGAIN}")
    for name, file in found.items():
        if name not in weight_map:
            faults.append(f"{file}: tensor {name!r} is not in {index.name}; download both again")
    if not faults and copies > len(found):
        faults.append(f"{index}: the shards hold {copies - len(found)} tensors twice; {AGAIN}")
    raise_if(faults)
    return headers


def _read_index(index: Path) -> dict[str, str]:
    content, _ = read_json(index, again=AGAIN)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not _is_strings(weight_map) or not weight_map:
        raise UserError(f"{index}: has no table weight_map of tensor and file names; {AGAIN}")
    return weight_map
