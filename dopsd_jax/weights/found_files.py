"""Weight files of other programs as plain tensors: compiled, quantised, several networks in one.

Everything here is a view: only names are read at once, and numbers when they are needed.
"""

import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.json_files import parse_json
from dopsd_jax.weights.tensors import (
    FLOATS,
    Cast,
    Piece,
    Recipe,
    TensorInfo,
    Tensors,
    View,
    take,
)

COMPILED = "_orig_mod."  # torch.compile's module, wherever in a name
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
# Where a file with several networks has each, as ComfyUI saves and loads them.
BEGINNINGS = {
    "transformer": re.compile(r"(model\.)?diffusion_model\."),
    "text_encoder": re.compile(r"(text_encoders\.[^.]+|cond_stage_model)\.(transformer\.)?"),
    "vae": re.compile(r"(vae|first_stage_model)\."),
}
# Parameters that ComfyUI saves with every text encoder, and that none of these networks has.
LEFT_OUT = re.compile(r"(text_encoders\.[^.]+|cond_stage_model)\.logit_scale")
# Beside quantised weights: their scales, of activations (not used here), and how they were made.
SCALES = (".scale_weight", ".weight_scale")
UNUSED = (".scale_input", ".input_scale", ".comfy_quant")
MARK = "scaled_fp8"


def components(names) -> set[str]:
    """The networks in a file, by component, if it holds several; else none."""
    found = {
        component
        for name in names
        for component, beginning in BEGINNINGS.items()
        if beginning.match(name)
    }
    return found if len(found) > 1 else set()


def strangers(names) -> list[str]:
    """Tensors of a file with several networks that belong to none of them."""
    known = (*BEGINNINGS.values(), LEFT_OUT)
    return [
        name
        for name in (names if components(names) else ())
        if name.rpartition(".")[2] != MARK and not any(one.match(name) for one in known)
    ]


def readable(tensors: Tensors, component: str) -> Tensors:
    """The tensors of one network of a file, in floating types. Raises `UserError`."""
    if any(COMPILED in name for name in tensors.infos):
        tensors = _renamed(tensors, {name: name.replace(COMPILED, "") for name in tensors.infos})
    if component in components(tensors.infos):
        beginning = BEGINNINGS[component]
        mine = (name for name in tensors.infos if beginning.match(name))
        own = {name: name for name in mine if not LEFT_OUT.fullmatch(name)}
        if component != "transformer":  # whose prefix is known, and kept for exports
            own = {name: beginning.sub("", name, count=1) for name in own}
        tensors = _renamed(tensors, own)
    if any(info.dtype in EIGHT_BITS for info in tensors.infos.values()):
        tensors = Dequantised(tensors)
    if {"F16", "BF16"} <= {info.dtype for info in tensors.infos.values()}:
        tensors = Cast(tensors, "F32")  # neither holds the other's numbers, float32 holds both
    return tensors


def _renamed(tensors: Tensors, names: Mapping[str, str]) -> View:
    """The tensors that `names` has, under the names it gives."""
    recipes = {new: Recipe((Piece(old),), tensors.infos[old].shape) for old, new in names.items()}
    if len(recipes) < len(names):
        twice = next(name for name, count in Counter(names.values()).items() if count > 1)
        raise UserError(f"{tensors.where}: holds tensor {twice!r} under two names; save it again")
    return View(tensors, recipes)


class Dequantised:
    """Eight-bit weights times their scales, in the file's own 16- or 32-bit type; other tensors
    unchanged.

    Without a scale the numbers are as stored. A scale is one number, or one per row.
    """

    def __init__(self, base: Tensors):
        self.base, self.where = base, base.where
        counts = Counter(i.dtype for i in base.infos.values() if i.dtype in ("BF16", "F16"))
        wide = counts.most_common(1)[0][0] if counts else "BF16"
        self.infos: dict[str, TensorInfo] = {}
        self.scales: dict[str, str] = {}
        for name, info in base.infos.items():
            if name.endswith((*SCALES, *UNUSED)) or name.rpartition(".")[2] == MARK:
                continue
            eight = info.dtype in EIGHT_BITS
            self.infos[name] = TensorInfo(wide, info.shape) if eight else info
            stem = name.removesuffix(".weight")
            scale = next((stem + end for end in SCALES if stem + end in base.infos), None)
            if eight and scale is not None:
                self.scales[name] = scale
        raise_if(self._faults())

    def _faults(self) -> list[str]:
        faults, base = [], self.base
        for name, scale in self.scales.items():
            found, rows = base.infos[scale], (*base.infos[name].shape, 1)[0]
            if found.dtype not in FLOATS or found.shape not in ((), (1,), (rows,), (rows, 1)):
                faults.append(
                    f"{self.where}: tensor {scale!r} {list(found.shape)} is not a scale of "
                    f"{name!r} that is known here; get a version that is not quantised"
                )
        for name, info in base.infos.items():
            if not name.endswith(".comfy_quant") or info.nbytes > 4096 or info.dtype != "U8":
                continue
            where = f"{self.where}: tensor {name!r}"
            about = parse_json(base.read(name).tobytes().rstrip(b"\0"), where)
            kind = about.get("format") if isinstance(about, dict) else None
            if not str(kind).startswith("float8"):
                faults.append(
                    f"{where}: the weight is quantised as {kind}, which is not read here; get a "
                    "version in bf16 or fp8"
                )
        return faults

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        array = self.base.read(name, rows)
        if name in self.scales:
            scale = self.base.read(self.scales[name]).astype(np.float32).reshape(-1)
            if scale.size == 1:
                scale = scale[0]
            else:
                scale = take(scale, rows).reshape(-1, *[1] * (array.ndim - 1))
            array = array.astype(np.float32) * scale
        with np.errstate(over="ignore"):
            return array.astype(self.infos[name].numpy, copy=False)
