"""LoRA files of every common dialect, read into one form."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.weights.lora_dialects import (
    STYLES,
    SUFFIXES,
    UNSUPPORTED,
    UNSUPPORTED_PARTS,
    Layers,
    Target,
    stems,
)
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.tensors import FLOATS

HEADER = "lora_adapter_metadata"  # diffusers' header string with PEFT's settings
HEADER_PREFIX = "transformer."
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Starts that also change the base weights, so that the file alone is not the whole change.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "orthogonal")


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

    def delta(self) -> np.ndarray:
        """The change of W [out, in], float32."""
        return np.float32(self.scale) * (self.b @ self.a)


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA file.

    Attributes:
      modules: diffusers path of a layer -> its adapter.
      dialect: id of `lora_dialects`, e.g. `D`.
      dtype: widest type code that the factors are stored in.
      metadata: the header's strings.
    """

    modules: dict[str, LoraModule]
    dialect: str
    dtype: str
    metadata: dict[str, str]


def read_lora(path: str | Path, layers: Layers) -> LoraFile:
    """Reads a LoRA file, or a folder that PEFT saved. Raises `UserError` listing every fault.

    alpha is taken from the tensors, the header or PEFT's json, and applied once: it is the scale of
    the modules, the factors are as stored.
    """
    path = Path(path)
    settings = None
    if path.is_dir():
        path, settings = _peft_folder(path)
    elif path.name == PEFT_WEIGHTS and (path.parent / PEFT_CONFIG).is_file():
        settings = _read_settings(path.parent / PEFT_CONFIG, "")
    files = TensorFiles.open(path)
    if settings is None and HEADER in files.metadata:
        where = f"{path}: header string {HEADER}"
        settings = _parse_settings(files.metadata[HEADER], where, HEADER_PREFIX)
    groups, kinds = _group(path, files, layers)
    styles = {style for style, _, _ in groups.values()}
    if len({style.prefix for style in styles}) > 1:
        found = ", ".join(sorted({repr(style.prefix) for style in styles}))
        raise UserError(f"{path}: mixes names that begin with {found}; save it with one program")
    modules = _decode(path, files, groups, settings)
    style = next((s for s in styles if s.native), next(iter(styles)))
    kind = next((k for k in ("default", "down") if k in kinds), "ab")
    dialect = STYLES[style].get(kind) or STYLES[style]["ab"]
    used = {files.infos[parts[p]].dtype for _, _, parts in groups.values() for p in ("a", "b")}
    dtype = next(code for code in FLOATS if code in used)
    return LoraFile(modules, dialect, dtype, files.metadata)


def _peft_folder(folder: Path) -> tuple[Path, "Settings"]:
    if (folder / PEFT_CONFIG).is_file():
        return folder / PEFT_WEIGHTS, _read_settings(folder / PEFT_CONFIG, "")
    inner = sorted(p.parent.name for p in folder.glob(f"*/{PEFT_CONFIG}"))
    if inner:
        raise UserError(f"{folder}: holds several adapters ({', '.join(inner)}); name one of them")
    raise UserError(f"{folder}: has no {PEFT_CONFIG}; give a .safetensors file or a PEFT folder")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What PEFT's settings say of rank and alpha."""

    where: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    root: bool  # rank-stabilised: scale alpha / sqrt(rank)

    def scale(self, path: str, rank: int) -> float:
        """The scale of a layer. Raises ValueError with what is wrong."""
        expected = self.ranks.get(_pattern(self.ranks, path), self.rank)
        if expected != rank:
            raise ValueError(f"has rank {rank}, but {self.where} says {expected}")
        alpha = self.alphas.get(_pattern(self.alphas, path), self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)


def _pattern(patterns: Mapping[str, Any], path: str) -> str:
    """The first pattern that a path matches: PEFT's own rule."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", path)), "")


def _read_settings(path: Path, prefix: str) -> Settings:
    try:
        return _parse_settings(path.read_text(encoding="utf-8"), str(path), prefix)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the folder again") from None


def _parse_settings(text: str, where: str, prefix: str) -> Settings:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); save the adapter again") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: not a JSON object; save the adapter again")
    get = lambda name, default=None: content.get(prefix + name, default)
    faults = []
    if get("peft_type", "LORA") not in ("LORA", None):
        faults.append(f"{where}: peft_type {get('peft_type')!r} is not supported, only LORA")
    for name, what in (("use_dora", "DoRA"), ("lora_bias", "biases"), ("fan_in_fan_out", "Conv1D")):
        if get(name):
            faults.append(f"{where}: {name} is set; {what} in adapters is not supported")
    if str(get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        faults.append(
            f"{where}: init_lora_weights {get('init_lora_weights')!r} changes the base model too; "
            "convert the adapter to a plain LoRA with PEFT first"
        )
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0
    for name in ("r", "lora_alpha"):
        if not number(get(name)):
            faults.append(f"{where}: {name} {get(name)!r} is not a positive number")
    for name in ("rank_pattern", "alpha_pattern"):
        table = get(name) or {}
        if not isinstance(table, dict) or not all(map(number, table.values())):
            faults.append(f"{where}: {name} is not a table of positive numbers")
            continue
        for pattern in table:
            try:
                re.compile(pattern)
            except re.error as error:
                faults.append(f"{where}: {name} {pattern!r} is not a pattern ({error})")
    raise_if(faults)
    ranks, alphas = get("rank_pattern") or {}, get("alpha_pattern") or {}
    root = bool(get("use_rslora"))
    return Settings(where, int(get("r")), float(get("lora_alpha")), ranks, alphas, root)


def _group(path: Path, files: TensorFiles, layers: Layers):
    """stem -> (style, target, {part: tensor name}), and the kinds of suffixes seen."""
    table, groups, kinds, faults = stems(layers, list(STYLES)), {}, set(), []
    for name, info in files.infos.items():
        suffix = next((s for s in SUFFIXES if name.endswith(s)), None)
        found = table.get(name.removesuffix(suffix)) if suffix else None
        if found is None:
            faults.append(f"{path}: tensor {name!r} {_why(name, suffix)}")
            continue
        part = SUFFIXES[suffix]
        if info.dtype not in FLOATS:
            faults.append(f"{path}: tensor {name!r} is {info.dtype}, not {', '.join(FLOATS)}")
        if part == "a":
            kinds.add(
                "default" if ".default." in suffix else "ab" if ".lora_A" in suffix else "down"
            )
        parts = groups.setdefault(name.removesuffix(suffix), (*found, {}))[2]
        if part in parts:
            faults.append(f"{path}: {name!r} and {parts[part]!r} are the same factor")
        parts[part] = name
    raise_if(faults)
    if not groups:
        raise UserError(f"{path}: holds no tensors")
    return groups, kinds


def _why(name: str, suffix: str | None) -> str:
    for end, what in UNSUPPORTED.items():
        if name.endswith(end):
            return f"{what}: not supported; save a plain LoRA"
    for part, what in UNSUPPORTED_PARTS.items():
        if part in name:
            return f"belongs to a {what} adapter: not supported; save a plain LoRA"
    if suffix is None:
        return "is not a factor of a LoRA (lora_A/lora_B, lora_down/lora_up, alpha)"
    return "names no linear layer of this model; is the file for another model?"


def _decode(path: Path, files: TensorFiles, groups, settings: Settings | None):
    modules: dict[str, LoraModule] = {}
    faults = []
    for stem, (_, target, parts) in groups.items():
        try:
            whole = _whole(files, target, parts, settings)
            for name, module in _cut(target, whole).items():
                if name in modules:
                    raise ValueError(f"adapts {name}, which another name in the file adapts too")
                modules[name] = module
        except ValueError as error:
            faults.append(f"{path}: {stem} {error}")
    raise_if(faults)
    return modules


def _whole(files: TensorFiles, target: Target, parts: dict[str, str], settings) -> LoraModule:
    """The adapter as the file has it. Raises ValueError with what is wrong."""
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
    read = lambda part: files.read(parts[part]).astype(np.float32)
    factors = read("a"), read("b")
    if not all(np.isfinite(f).all() for f in factors):
        raise ValueError("holds numbers that are not finite; the training that made it failed")
    stated = settings.scale(target.paths[0], a[0]) if settings else None
    if "alpha" not in parts:
        return LoraModule(*factors, 1.0 if stated is None else stated)
    alpha = read("alpha")
    if alpha.size != 1 or not np.isfinite(alpha).all():
        raise ValueError("has an alpha that is not one number")
    scale = float(alpha.reshape(())) / a[0]
    # A header with scale 1 says that nothing is left to apply; any other says the same thing twice.
    if stated not in (None, 1.0) and not math.isclose(stated, scale, rel_tol=1e-6):
        raise ValueError(f"has scale {scale:g} by its alpha, {settings.where} makes it {stated:g}")
    return LoraModule(*factors, scale)


def _cut(target: Target, whole: LoraModule) -> dict[str, LoraModule]:
    """One adapter for each of the fused layers: rows of B; and of A, if B is block-diagonal."""
    if len(target.paths) == 1:
        return {target.paths[0]: whole}
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
