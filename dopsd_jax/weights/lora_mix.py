"""Several LoRA files with strengths as one set of adapters: the sum of their changes, exactly."""

from collections.abc import Mapping, Sequence

import numpy as np

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.weights.lora_dialects import Layers
from dopsd_jax.weights.lora_files import LoraModule, read_lora


def read_mix(
    given: Sequence[LoraOption], layers: Layers, transformer_only: bool = False
) -> dict[str, LoraModule]:
    """The adapters of all files, by diffusers path. Raises `UserError` with the faults of all."""
    found, faults = [], []
    for path, strength in given:
        try:
            file = read_lora(path, layers, transformer_only)
            found.append({name: _times(module, strength) for name, module in file.modules.items()})
        except UserError as error:
            faults += error.problems
    raise_if(faults)
    return mix(found)


def mix(loras: Sequence[Mapping[str, LoraModule]]) -> dict[str, LoraModule]:
    """The sum of the changes: the factors of a layer side by side, so that its ranks add up."""
    names = dict.fromkeys(name for lora in loras for name in lora)
    return {name: _sum([lora[name] for lora in loras if name in lora]) for name in names}


def _times(module: LoraModule, strength: float) -> LoraModule:
    return LoraModule(module.a, module.b, module.scale * strength)


def _sum(modules: Sequence[LoraModule]) -> LoraModule:
    if len(modules) == 1:
        return modules[0]
    scaled = [module.b * np.float32(module.scale) for module in modules]
    a = np.concatenate([module.a for module in modules])
    return LoraModule(a, np.concatenate(scaled, axis=1), 1.0)
