"""Adapters added into full weights, tensor by tensor."""

from collections.abc import Mapping

import numpy as np

from dopsd_jax.common.errors import raise_if
from dopsd_jax.weights.lora_mix import Change
from dopsd_jax.weights.tensors import FLOATS, TensorInfo, Tensors


class Merged:
    """Canonical tensors with W + change in place of every adapted W.

    The sum is in float32 and rounded once, to the stored type or to `dtype`. Raises `UserError`
    when an adapter belongs to no tensor, or to one of another shape.
    """

    def __init__(self, base: Tensors, modules: Mapping[str, Change], dtype: str | None = None):
        self.base, self.where = base, base.where
        self.modules = {f"{path}.weight": module for path, module in modules.items()}
        faults = []
        for name, module in self.modules.items():
            if name not in base.infos:
                faults.append(f"{base.where}: has no tensor {name!r} for the adapter to change")
            elif base.infos[name].shape != module.shape:
                found = list(base.infos[name].shape)
                faults.append(
                    f"{base.where}: tensor {name!r} is {found}, the adapter is for "
                    f"{list(module.shape)}"
                )
        raise_if(faults)
        self.infos = {
            name: TensorInfo(dtype if dtype and info.dtype in FLOATS else info.dtype, info.shape)
            for name, info in base.infos.items()
        }

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        array = self.base.read(name, rows)
        if module := self.modules.get(name):
            update = module.delta(rows)
            update += array.astype(np.float32)
            array = update
        with np.errstate(over="ignore"):  # the writer refuses what is beyond a type, in a line
            return array.astype(self.infos[name].numpy, copy=False)
