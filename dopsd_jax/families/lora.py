"""LoRA files on the transformer of a family."""

from collections.abc import Sequence

import jax
from flax import nnx

from dopsd_jax.adapters import attach, kinds
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.families.base import Family, Size
from dopsd_jax.weights.lora_dialects import Layers, layers_of
from dopsd_jax.weights.lora_mix import read_mix


def attach_files(
    model: nnx.Module, family: Family, size: Size, loras: Sequence[LoraOption]
) -> None:
    """Gives the transformer the adapters of LoRA files, of any dialect we read, as their sum.

    Or those of one LoKr file; it has no others then. Raises `UserError` for files that must be
    merged into the weights.
    """
    slots = attach.slots(family.NETWORKS["transformer"].names(size))
    modules = read_mix(loras, lora_layers(family, size))
    if not modules:
        return attach.detach(model)
    chosen = {name: slots[name] for name in modules}
    where = ", ".join(str(lora.path) for lora in loras)
    found = kinds.of_modules(modules.values())
    if found is None:
        raise UserError(
            f"{where}: is a LoKr beside others, or one whose layers have factors of several kinds; "
            "`python -m dopsd_jax.convert merge` writes a model that has it in its weights"
        )
    kind, rank = found
    attach.detach(model)
    attach.attach(model, chosen, rank, rank, jax.random.key(0), kind)
    adapter = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, attach.load(adapter, chosen, modules, 1.0, where, kind))


def lora_layers(family: Family, size: Size) -> Layers:
    """The transformer's linear layers by every name that LoRA files call them."""
    return layers_of(family.NETWORKS["transformer"], size)
