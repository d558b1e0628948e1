"""LoRA files on the transformer of a family."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from flax import nnx

from dopsd_jax.adapters import attach, kinds
from dopsd_jax.adapters.base import Adapter
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.families.base import Family, Size
from dopsd_jax.weights.lora_dialects import Layers, layers_of
from dopsd_jax.weights.lora_files import Module
from dopsd_jax.weights.lora_mix import read_mix


class Adapters(NamedTuple):
    """What LoRA files hold, by diffusers path; of one kind and of at most `rank`."""

    modules: Mapping[str, Module]
    kind: type[Adapter]
    rank: int
    where: str


def read_files(family: Family, size: Size, loras: Sequence[LoraOption]) -> Adapters | None:
    """The adapters of LoRA files, of any dialect we read, as their sum, or of one LoKr file.

    None if there are none. Raises `UserError`, also for files that must be merged into the weights.
    """
    modules = read_mix(loras, lora_layers(family, size))
    if not modules:
        return None
    where = ", ".join(str(lora.path) for lora in loras)
    found = kinds.of_modules(modules.values())
    if found is None:
        raise UserError(
            f"{where}: is a LoKr beside others, or one whose layers have factors of several kinds; "
            "`python -m dopsd_jax.convert merge` writes a model that has it in its weights"
        )
    return Adapters(modules, *found, where)


def attach_files(
    model: nnx.Module, family: Family, size: Size, loras: Sequence[LoraOption]
) -> None:
    """Gives the transformer what `read_files` finds, in the place of the adapters that it has."""
    attach_found(model, family, size, read_files(family, size, loras))


def attach_found(model: nnx.Module, family: Family, size: Size, found: Adapters | None) -> None:
    """The same with files that are read."""
    attach.detach(model)
    if found is None:
        return
    slots = attach.slots(family.NETWORKS["transformer"].names(size))
    chosen = {name: slots[name] for name in found.modules}
    attach.attach(model, chosen, found.rank, found.rank, jax.random.key(0), found.kind)
    adapter = nnx.state(model, nnx.LoRAParam)
    loaded = attach.load(adapter, chosen, found.modules, 1.0, found.where, found.kind)
    nnx.update(model, loaded)


def lora_layers(family: Family, size: Size) -> Layers:
    """The transformer's linear layers by every name that LoRA files call them."""
    return layers_of(family.NETWORKS["transformer"], size)
