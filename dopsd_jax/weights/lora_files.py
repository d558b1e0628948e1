"""LoRA files of every common dialect, read into one form."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.weights import lokr
from dopsd_jax.weights.lora_dialects import (
    MUSUBI_LOKR,
    STYLES,
    TEXT_ENCODERS,
    UNSUPPORTED,
    UNSUPPORTED_PARTS,
    Layers,
    Target,
    split_name,
    stems,
)
from dopsd_jax.weights.lora_settings import Settings, from_header, from_peft
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.tensors import DTYPES, FLOATS

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FACTORS = (*FLOATS, "F8_E4M3", "F8_E5M2")  # all are exact in float32
NUMBERS = tuple(code for code in DTYPES if code not in ("BOOL", "C64"))  # of an alpha


@dataclasses.dataclass(frozen=True)
class LoraModule:
    """The adapter of one linear layer: W + scale * b a.

    a float32 [rank, in], b float32 [out, rank].
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the layer."""
        return len(self.b), self.a.shape[1]

    def delta(self, rows: slice = slice(None)) -> np.ndarray:
        """The change of W [out, in], or of some of its rows, float32."""
        update = self.b[rows] @ self.a
        update *= np.float32(self.scale)
        return update


Module = LoraModule | lokr.LokrModule


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA file.

    Attributes:
      modules: diffusers path of a layer -> its adapter.
      dialect: id of `lora_dialects`, e.g. `D`.
      dtype: widest type code that the factors are stored in.
      metadata: the header's strings.
    """

    modules: dict[str, Module]
    dialect: str
    dtype: str
    metadata: dict[str, str]


def read_lora(path: str | Path, layers: Layers, transformer_only: bool = False) -> LoraFile:
    """`read_adapter` of a file in which all is LoRA. Raises `UserError`, also for a LoKr file."""
    file = read_adapter(path, layers, transformer_only)
    if not all(isinstance(module, LoraModule) for module in file.modules.values()):
        raise UserError(
            f"{path}: is a LoKr, where only a LoRA will do; `python -m dopsd_jax.convert merge` "
            "writes a model that has it in its weights"
        )
    return file


def read_adapter(path: str | Path, layers: Layers, transformer_only: bool = False) -> LoraFile:
    """Reads a LoRA or LoKr file, or a folder that PEFT saved. Raises `UserError` with every fault.

    alpha is taken from the tensors, PEFT's json or the header's strings, and applied once: it is
    the scale of the modules, the factors are as stored. `transformer_only` leaves out what adapts
    a text encoder.
    """
    path = Path(path)
    settings = None
    if os.path.isdir(path):
        path, settings = _peft_folder(path)
    elif path.name == PEFT_WEIGHTS and os.path.isfile(path.parent / PEFT_CONFIG):
        settings = from_peft(path.parent / PEFT_CONFIG)
    files = TensorFiles.open(path)
    if settings is None:
        settings = from_header(files.metadata, path)
    groups, kinds = _group(path, files, layers, transformer_only)
    styles = {style for style, _, _ in groups.values()}
    if len({style.prefix for style in styles}) > 1:
        found = ", ".join(sorted({repr(style.prefix) for style in styles}))
        raise UserError(f"{path}: mixes names that begin with {found}; save it with one program")
    modules = _decode(path, files, groups, settings)
    style = next((s for s in styles if s.native), next(iter(styles)))
    kind = next((k for k in ("default", "down") if k in kinds), "ab")
    dialect = STYLES[style].get(kind) or STYLES[style]["ab"]
    used = {
        files.infos[name].dtype
        for _, _, parts in groups.values()
        for part, name in parts.items()
        if part != "alpha"
    }
    dtype = next((code for code in FLOATS if code in used), "BF16")  # holds every F8
    return LoraFile(modules, dialect, dtype, files.metadata)


def closest(path: Path, candidates: Sequence[Layers]) -> Layers:
    """Of the layers of several models those that most factors of an adapter's file fit.

    The first where none fits better. Raises `UserError`.
    """
    infos = TensorFiles.open(path).infos

    def fitting(layers: Layers) -> tuple[int, int]:
        table, named, fit = stems(layers, list(STYLES)), 0, 0
        for name, info in infos.items():
            stem, part, *_ = split_name(name)
            if part is None or stem not in table:
                continue
            target, named = table[stem][1], named + 1
            needed = {"a": target.width, "b": sum(target.rows)}.get(part)
            fit += needed is not None and needed in info.shape[part == "a" :][:1]
        return fit, named

    return max(candidates, key=fitting)


def _peft_folder(folder: Path) -> tuple[Path, Settings]:
    if os.path.isfile(folder / PEFT_CONFIG):
        return folder / PEFT_WEIGHTS, from_peft(folder / PEFT_CONFIG)
    inner = sorted(p.parent.name for p in folder.glob(f"*/{PEFT_CONFIG}"))
    if inner:
        raise UserError(f"{folder}: holds several adapters ({', '.join(inner)}); name one of them")
    raise UserError(f"{folder}: has no {PEFT_CONFIG}; give a .safetensors file or a PEFT folder")


def _group(path: Path, files: TensorFiles, layers: Layers, transformer_only: bool):
    """stem -> (style, target, {part: tensor name}), and the kinds of suffixes seen."""
    table, groups, kinds, faults = stems(layers, list(STYLES)), {}, set(), []
    adapters: set[str] = set()
    strangers = 0  # factors of layers that are not here
    for name, info in files.infos.items():
        if name == MUSUBI_LOKR or (transformer_only and name.startswith(TEXT_ENCODERS)):
            continue
        stem, part, kind, adapter = split_name(name)
        found = table.get(stem) if part else None
        if found is None:
            strangers += part is not None and not name.startswith(TEXT_ENCODERS)
            faults.append(f"{path}: tensor {name!r} {_why(name, part)}")
            continue
        if info.dtype not in (FACTORS if part != "alpha" else NUMBERS):
            faults.append(f"{path}: tensor {name!r} is {info.dtype}, not {', '.join(FACTORS)}")
        if part == "a":
            kinds.add(kind)
        if part != "alpha":
            adapters.add(adapter)
        parts = groups.setdefault(stem, (*found, {}))[2]
        if part in parts:
            faults.append(f"{path}: {name!r} and {parts[part]!r} are the same factor")
        parts[part] = name
    if len(faults) == strangers and (why := _other_model(files, groups, strangers)):
        said = files.metadata.get("modelspec.architecture")
        made = f" ({said}, its header says)" if said else ""
        raise UserError(
            f"{path}: is for another model{made}: {why}; give the model that it was made for"
        )
    if len(adapters) > 1 and not faults:
        named = ", ".join(repr(adapter) for adapter in sorted(adapters))
        faults.append(f"{path}: holds several adapters ({named}); save one of them alone")
    raise_if(faults)
    if not groups:
        raise UserError(f"{path}: holds no tensors of an adapter of this model's transformer")
    return groups, kinds


def _other_model(files: TensorFiles, groups, strangers: int) -> str:
    """Why a file of several layers is as a whole not for this model; else ''."""
    if not groups and strangers > 1:
        return f"none of its {strangers} tensors is of a linear layer of this one"
    seen = []
    for stem, (_, target, parts) in groups.items():
        if {"a", "b"} <= parts.keys():
            a, b = (files.infos[parts[part]].shape for part in ("a", "b"))
            seen.append((stem, [*b[:1], *a[1:]], [sum(target.rows), target.width]))
    if len(seen) < 2 or any(found == here for _, found, here in seen):
        return ""
    stem, found, here = seen[0]
    return f"all its layers have other sizes, such as {stem} with {found}, here {here}"


def _why(name: str, part: str | None) -> str:
    for end, what in UNSUPPORTED.items():
        if name.endswith(end):
            return f"{what}: not supported; save a plain LoRA"
    for inner, what in UNSUPPORTED_PARTS.items():
        if inner in name:
            return f"belongs to a {what} adapter: not supported; save a plain LoRA"
    if name.startswith(TEXT_ENCODERS):
        return (
            "is of a text encoder, of which no linear layer is adapted here; `python -m "
            "dopsd_jax.convert lora --transformer-only` writes the file without such layers"
        )
    if part is None:
        return "is not a factor of a LoRA (lora_A/lora_B, lora_down/lora_up, alpha)"
    return "names no linear layer of this model; is the file for another model?"


def _decode(path: Path, files: TensorFiles, groups, settings: Settings | None):
    modules: dict[str, Module] = {}
    faults = []
    for stem, (_, target, parts) in groups.items():
        try:
            if parts.keys() & set(lokr.PARTS):
                found = _kronecker(files, target, parts)
            else:
                found = _cut(target, _whole(files, stem, target, parts, settings))
            for name, module in found.items():
                if name in modules:
                    raise ValueError(f"adapts {name}, which another name in the file adapts too")
                modules[name] = module
        except ValueError as error:
            faults.append(f"{path}: {stem} {error}")
    raise_if(faults)
    return modules


def _whole(
    files: TensorFiles, stem: str, target: Target, parts: dict[str, str], settings
) -> LoraModule:
    """The adapter as the file has it, named `stem`. Raises ValueError with what is wrong."""
    missing = [part for part in ("a", "b") if part not in parts]
    if missing:
        names = {"a": "lora_A (down)", "b": "lora_B (up)"}
        raise ValueError(f"lacks {' and '.join(names[m] for m in missing)}; save the file again")
    a, b = files.infos[parts["a"]].shape, files.infos[parts["b"]].shape
    out = sum(target.rows)
    fits = len(a) == len(b) == 2 and a[1] == target.width and b[0] == out and a[0] == b[1] > 0
    if not fits:
        raise ValueError(
            f"has factors {list(a)} and {list(b)}; the layer needs [rank, {target.width}] and "
            f"[{out}, rank]"
        )
    factors = _factor(files, parts["a"]), _factor(files, parts["b"])
    if settings is not None and settings.loose and "alpha" in parts:
        settings = None
    stated = settings.scale((target.paths[0], stem), a[0]) if settings else 1.0
    if "alpha" not in parts:
        return LoraModule(*factors, stated)
    scale = _alpha(files, parts["alpha"]) / a[0]
    # A header scale of 1 means that it is applied already; any other must agree with alpha.
    if stated != 1.0 and not math.isclose(stated, scale, rel_tol=1e-6):
        raise ValueError(f"has scale {scale:g} by its alpha, {settings.where} makes it {stated:g}")
    return LoraModule(*factors, scale)


def _factor(files: TensorFiles, name: str) -> np.ndarray:
    factor = files.read(name).astype(np.float32)
    if not np.isfinite(factor).all():
        raise ValueError("holds numbers that are not finite; the training that made it failed")
    return factor


def _alpha(files: TensorFiles, name: str) -> float:
    alpha = files.read(name).astype(np.float64)
    if alpha.size != 1 or not np.isfinite(alpha).all():
        raise ValueError("has an alpha that is not one number")
    return float(alpha.reshape(()))


def _kronecker(files: TensorFiles, target: Target, parts: dict[str, str]) -> dict[str, Module]:
    """The LoKr adapters of the layers of a target, by diffusers path."""
    if {"a", "b"} & parts.keys():
        raise ValueError("has factors of a LoRA and of a LoKr; save it with one program")
    shapes = {part: files.infos[name].shape for part, name in parts.items() if part != "alpha"}
    needed, read = (sum(target.rows), target.width), lambda part: _factor(files, parts[part])
    whole = lokr.LokrModule(lokr.assemble(shapes, needed, read), 1.0)
    rank = whole.rank or (max(whole.w2.shape) if MUSUBI_LOKR in files.infos else None)
    if rank and "alpha" in parts:
        whole = dataclasses.replace(whole, scale=_alpha(files, parts["alpha"]) / rank)
    ends = np.cumsum(target.rows).tolist()
    return {
        path: dataclasses.replace(whole, first=end - rows, last=end, swapped=target.swapped)
        for path, rows, end in zip(target.paths, target.rows, ends, strict=True)
    }


def _cut(target: Target, whole: LoraModule) -> dict[str, LoraModule]:
    """One adapter for each of the fused layers: rows of B; and of A, if B is block-diagonal."""
    if len(target.paths) == 1:
        return {target.paths[0]: dataclasses.replace(whole, b=target.in_order(whole.b))}
    blocks = np.split(whole.b, np.cumsum(target.rows)[:-1])
    count = len(blocks)
    if whole.rank % count == 0:
        columns = [np.split(block, count, axis=1) for block in blocks]
        if not any(columns[i][j].any() for i in range(count) for j in range(count) if i != j):
            downs = np.split(whole.a, count)
            return {
                path: LoraModule(downs[i], np.ascontiguousarray(columns[i][i]), whole.scale)
                for i, path in enumerate(target.paths)
            }
    return {
        path: LoraModule(whole.a, block, whole.scale)
        for path, block in zip(target.paths, blocks, strict=True)
    }
