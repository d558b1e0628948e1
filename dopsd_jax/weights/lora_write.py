"""Writes LoRA and LoKr files in the dialects that other programs load."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from etils import epath

from dopsd_jax.common.atomic import disk_error, write_text
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.weights import lokr
from dopsd_jax.weights.lora_dialects import WRITTEN, Layers, Target, stem
from dopsd_jax.weights.lora_files import PEFT_CONFIG, PEFT_WEIGHTS, LoraModule, Module
from dopsd_jax.weights.lora_header import header
from dopsd_jax.weights.lora_settings import HEADER, HEADER_PREFIX
from dopsd_jax.weights.safetensors_write import write_safetensors
from dopsd_jax.weights.tensors import DTYPES, ArrayTensors

TRAINERS = ("K", "Y")  # dialects with lora_down, lora_up and alpha tensors
LOKR = ("D", "Cs", "Y")  # those in which a LoKr can be written


def write_lora(
    path: str | Path,
    modules: Mapping[str, Module],
    layers: Layers,
    dialect: str = "D",
    dtype: str = "F32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the adapters of a model. Raises `UserError`.

    `D`, the default, loads everywhere: the scale is in B, every layer has the same rank (smaller
    ones are filled up with zeros), and the header says so. `Cs`, `Cn`: the scale is in B. `K`, `Y`:
    with alpha tensors. `Q`: a folder as PEFT saves it. A LoKr is written in one of `LOKR`: the
    scale is in its first factor, but in `Y` in alpha tensors. `dtype` is a code of
    `tensors.FLOATS`; `metadata` adds header strings to those of `lora_header`, e.g.
    `modelspec.title`.
    """
    path = epath.Path(path)
    if dialect not in WRITTEN:
        raise UserError(f"{path}: dialect {dialect!r} cannot be written; {', '.join(WRITTEN)} can")
    if not modules:
        raise UserError(f"{path}: there is no adapter to write")
    raise_if(
        f"{path}: adapter {name!r} is of no linear layer of this model"
        for name in modules
        if name not in layers.split
    )
    is_lokr = any(isinstance(module, lokr.LokrModule) for module in modules.values())
    tensors, shown = (_kronecker if is_lokr else _low_rank)(path, modules, layers, dialect)
    arrays = {name: _cast(path, name, tensor, dtype) for name, tensor in tensors.items()}
    strings = header(path.stem, shown, layers, metadata or {})
    settings = None if is_lokr or dialect not in ("D", "Q") else _peft_settings(shown)
    _write(path, arrays, dialect, settings, strings)


def _low_rank(
    path: Path, modules: Mapping[str, LoraModule], layers: Layers, dialect: str
) -> tuple[dict[str, np.ndarray], Mapping[str, LoraModule]]:
    """The tensors of a LoRA, and what the header shall tell of."""
    style = WRITTEN[dialect]
    if dialect in ("D", "Q"):
        modules = one_rank({name: baked(m) for name, m in modules.items()})
    by_path = fuse(modules, layers) if style.native else modules
    names = ("lora_down", "lora_up") if dialect in TRAINERS else ("lora_A", "lora_B")
    if dialect not in TRAINERS:
        by_path = {name: baked(module) for name, module in by_path.items()}
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(by_path):
        module, base = by_path[name], stem(style, name)
        if dialect in TRAINERS:
            tensors[f"{base}.alpha"] = np.float32(module.scale * module.rank)
        tensors[f"{base}.{names[0]}.weight"] = module.a
        tensors[f"{base}.{names[1]}.weight"] = module.b
    # kohya's rank is that of q, k and v before they are fused: alpha tensors say the rest.
    return tensors, modules if dialect == "K" else by_path


def _kronecker(
    path: Path, modules: Mapping[str, Module], layers: Layers, dialect: str
) -> tuple[dict[str, np.ndarray], Mapping[str, lokr.LokrModule]]:
    """The same of a LoKr. Raises `UserError`."""
    faults = []
    if dialect not in LOKR:
        faults.append(f"dialect {dialect!r} cannot hold a LoKr; {', '.join(LOKR)} can")
    if not all(isinstance(module, lokr.LokrModule) for module in modules.values()):
        faults.append("has LoRA and LoKr adapters, which are not written into one file")
    elif parts := [name for name, module in modules.items() if not module.is_entire]:
        faults.append(
            f"{parts[0]} has a part of the LoKr of several layers, which has no factors of its "
            "own; `python -m dopsd_jax.convert merge` can use the file that it is from"
        )
    raise_if(f"{path}: {fault}" for fault in faults)
    # Without a rank there is nothing that alpha is divided by.
    keeps = lambda module: dialect == "Y" and module.rank is not None
    modules = {n: m if keeps(m) else lokr.baked(m) for n, m in sorted(modules.items())}
    tensors: dict[str, np.ndarray] = {}
    for name, module in modules.items():
        base = stem(WRITTEN[dialect], name)
        if dialect == "Y":
            tensors[f"{base}.alpha"] = np.float32(module.scale * (module.rank or 1))
        tensors |= {f"{base}.lokr_{end}": factor for end, factor in module.factors.items()}
    return tensors, modules


def baked(module: LoraModule) -> LoraModule:
    """The same adapter with the scale multiplied into B, in float32."""
    if module.scale == 1.0:
        return module
    return LoraModule(module.a, module.b * np.float32(module.scale), 1.0)


def one_rank(modules: Mapping[str, LoraModule]) -> dict[str, LoraModule]:
    """Adapters filled up with zeros to the largest rank; the scale must be baked. Exact."""
    rank = max(module.rank for module in modules.values())

    def fill(module: LoraModule) -> LoraModule:
        extra = rank - module.rank
        a = np.pad(module.a, ((0, extra), (0, 0)))
        return LoraModule(a, np.pad(module.b, ((0, 0), (0, extra))), module.scale)

    return {name: m if m.rank == rank else fill(m) for name, m in modules.items()}


def fuse(modules: Mapping[str, LoraModule], layers: Layers) -> dict[str, LoraModule]:
    """Adapters by the authors' paths; those of fused layers on a block diagonal. Exact."""
    fused = {}
    for name, target in layers.native.items():
        if any(path in modules for path in target.paths):
            fused[name] = _fuse(target, modules)
    return fused


def _fuse(target: Target, modules: Mapping[str, LoraModule]) -> LoraModule:
    found = [modules.get(path) for path in target.paths]
    if len(found) == 1:
        return dataclasses.replace(found[0], b=target.in_order(found[0].b))
    present = [module for module in found if module is not None]
    first = present[0]
    same_scale = all(module.scale == first.scale for module in present)
    if len(present) == len(found) and same_scale:
        shared = all(np.array_equal(module.a, first.a) for module in present)
        if shared:  # it was one adapter of the fused layer: give it back
            return LoraModule(first.a, np.concatenate([m.b for m in present]), first.scale)
    if not same_scale:
        found = [module and baked(module) for module in found]
        present = [module for module in found if module is not None]
    rank = sum(module.rank for module in present)
    b = np.zeros((sum(target.rows), rank), np.float32)
    row = column = 0
    for module, rows in zip(found, target.rows, strict=True):
        if module is not None:
            b[row : row + rows, column : column + module.rank] = module.b
            column += module.rank
        row += rows
    return LoraModule(np.concatenate([m.a for m in present]), b, present[0].scale)


def _cast(path: Path, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    if name.endswith(".alpha"):
        return np.asarray(array, np.float32)
    with np.errstate(over="ignore"):
        cast = array.astype(DTYPES[dtype])
    if not np.isfinite(cast.astype(np.float32)).all():
        raise UserError(f"{path}: {name!r} does not fit {dtype}; use F32 or BF16")
    return cast


def _write(path: Path, arrays, dialect: str, settings: dict | None, strings: dict) -> None:
    """`settings`: PEFT's, where the dialect has them."""
    tensors = ArrayTensors(arrays)
    if dialect == "D" and settings:
        prefixed = {HEADER_PREFIX + k: v for k, v in settings.items()}
        strings[HEADER] = json.dumps(prefixed, sort_keys=True)
    if dialect != "Q":
        write_safetensors(path, tensors.infos, tensors.read, strings)
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = {file.name for file in path.iterdir()} - {PEFT_CONFIG, PEFT_WEIGHTS}
    except OSError as error:
        raise disk_error(error, path) from error
    if others:
        raise UserError(f"{path}: holds other files, such as {min(others)}; give another name")
    settings = {"peft_type": "LORA"} | settings
    write_safetensors(path / PEFT_WEIGHTS, tensors.infos, tensors.read, strings)
    write_text(path / PEFT_CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _peft_settings(modules: Mapping[str, LoraModule]) -> dict:
    rank = next(iter(modules.values())).rank
    return {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(modules),
        # Empty, but there: diffusers up to 0.39 fails on a header without them.
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_bias": False,
        "use_dora": False,
        "use_rslora": False,
    }
