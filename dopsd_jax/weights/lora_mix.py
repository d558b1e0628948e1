"""Several LoRA files with strengths as one set of adapters: the sum of their changes, exactly."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.weights.lora_dialects import Layers
from dopsd_jax.weights.lora_files import LoraModule, Module, read_adapter, read_lora


class Change(Protocol):
    """The change of one linear layer."""

    shape: tuple[int, int]

    def delta(self, rows: slice = slice(None)) -> np.ndarray:
        """The change of W [out, in], or of some of its rows, float32."""


@dataclasses.dataclass(frozen=True)
class Sum:
    """The change of several adapters of a layer."""

    modules: Sequence[Module]

    @property
    def shape(self) -> tuple[int, int]:
        return self.modules[0].shape

    def delta(self, rows: slice = slice(None)) -> np.ndarray:
        return np.sum([module.delta(rows) for module in self.modules], axis=0)


def read_changes(
    given: Sequence[LoraOption], layers: Layers, transformer_only: bool = False
) -> dict[str, Change]:
    """The summed changes of files to be merged, LoRA and LoKr, by diffusers path.

    Raises `UserError` with the faults of all.
    """
    files = _read(given, layers, transformer_only, read_adapter)
    names = dict.fromkeys(name for file in files for name in file)
    return {name: Sum([file[name] for file in files if name in file]) for name in names}


def read_mix(given: Sequence[LoraOption], layers: Layers) -> dict[str, Module]:
    """The adapters of all files, by diffusers path; of several files, all must be LoRA.

    Raises `UserError` with the faults of all.
    """
    if len(given) == 1:
        return _read(given, layers, False, read_adapter)[0]
    return mix(_read(given, layers, False, read_lora))


def _read(given, layers: Layers, transformer_only: bool, read) -> list[dict[str, Module]]:
    found, faults = [], []
    for path, strength in given:
        try:
            modules = read(path, layers, transformer_only).modules
            found.append({name: _times(module, strength) for name, module in modules.items()})
        except UserError as error:
            faults += error.problems
    raise_if(faults)
    return found


def mix(loras: Sequence[Mapping[str, LoraModule]]) -> dict[str, LoraModule]:
    """The sum of the changes: the factors of a layer side by side, so that its ranks add up."""
    names = dict.fromkeys(name for lora in loras for name in lora)
    return {name: _sum([lora[name] for lora in loras if name in lora]) for name in names}


def _times(module: Module, strength: float) -> Module:
    return dataclasses.replace(module, scale=module.scale * strength)


def _sum(modules: Sequence[LoraModule]) -> LoraModule:
    if len(modules) == 1:
        return modules[0]
    scaled = [module.b * np.float32(module.scale) for module in modules]
    a = np.concatenate([module.a for module in modules])
    return LoraModule(a, np.concatenate(scaled, axis=1), 1.0)
