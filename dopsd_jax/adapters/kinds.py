"""The kinds of adapters by their names in config.lora.kind, and by what files hold."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from dopsd_jax.adapters import lokr
from dopsd_jax.adapters.base import Adapter
from dopsd_jax.adapters.lora import Lora
from dopsd_jax.weights.lora_files import LoraModule, Module

# Made from config.lora.
KINDS: Mapping[str, Callable[[Any], type[Adapter]]] = {
    "lora": lambda options: Lora,
    "lokr": lambda options: lokr.Lokr.of(options.factor),
}


def kind_of(options: Any) -> type[Adapter]:
    """The kind that config.lora names."""
    return KINDS[options.kind](options)


def of_modules(modules: Collection[Module]) -> tuple[type[Adapter], int] | None:
    """The kind, and the rank, that hold the adapters of a file; None: no one kind does."""
    ranks = [module.rank for module in modules if isinstance(module, LoraModule)]
    if len(ranks) == len(modules):
        return Lora, max(ranks)
    return None if ranks else lokr.kind_of(modules)
