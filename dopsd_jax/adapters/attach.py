"""Adapters in a network: which linear layers get one, how they are attached, exported and loaded.

An adapter is named by the PyTorch path of its layer (`layers.3.attention.to_q`), although layers
are fused and stacked here: the network's table of names maps them.
"""

import dataclasses
import fnmatch
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax.adapters.base import Adapter, AdapterScale
from dopsd_jax.adapters.lora import Lora
from dopsd_jax.common.errors import raise_if
from dopsd_jax.models.layers import Dense
from dopsd_jax.models.names import Leaf


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where the adapter of one PyTorch linear layer lives: part `part` of the fused `dense`."""

    dense: str
    part: int
    index: int | None
    din: int
    dout: int


def slots(leaves: Sequence[Leaf]) -> dict[str, Slot]:
    """Every linear layer of a network that can carry an adapter, by its PyTorch path."""
    found = {}
    for leaf in leaves:
        if leaf.kind != "linear" or not leaf.path.endswith(".kernel"):
            continue
        dense = leaf.path.removesuffix(".kernel")
        for part, source in enumerate(leaf.sources):
            dout, din = source.shape
            found[source.name.removesuffix(".weight")] = Slot(dense, part, leaf.index, din, dout)
    return found


def select(
    available: Mapping[str, Slot],
    targets: str | Sequence[str],
    presets: Mapping[str, Sequence[str]],
) -> dict[str, Slot]:
    """The layers that `targets` names: a preset, or a list of patterns.

    A pattern is a whole path, the end of one at a dot (`attention.to_q`), or has shell wildcards
    (`layers.*.attention.to_?`). Raises `UserError` naming every pattern that matches nothing.
    """
    if isinstance(targets, str):
        raise_if(
            [f"config.lora.targets: {targets!r} is not a preset ({', '.join(presets)}) or a list"]
            if targets not in presets
            else []
        )
        targets = presets[targets]
    matches = {
        pattern: [
            path
            for path in available
            if path == pattern or path.endswith(f".{pattern}") or fnmatch.fnmatchcase(path, pattern)
        ]
        for pattern in targets
    }
    kinds = sorted({".".join(p for p in path.split(".") if not p.isdigit()) for path in available})
    raise_if(
        f"config.lora.targets: {pattern!r} matches no linear layer; there are {', '.join(kinds)}"
        for pattern, paths in matches.items()
        if not paths
    )
    chosen = {path for paths in matches.values() for path in paths}
    raise_if(
        [] if chosen else ["config.lora.targets: the list is empty; name a preset or patterns"]
    )
    return {path: slot for path, slot in available.items() if path in chosen}


def attach(
    model: nnx.Module,
    chosen: Mapping[str, Slot],
    rank: int,
    alpha: float,
    key: jax.Array,
    kind: type[Adapter] = Lora,
) -> None:
    """Gives the chosen layers of `model` adapters of a kind that change nothing yet.

    A stack of layers is adapted as a whole; layers of it that were not chosen have scale 0, so they
    neither act nor learn.
    """
    stacks: dict[tuple[str, int], list[Slot]] = {}
    for slot in chosen.values():
        stacks.setdefault((slot.dense, slot.part), []).append(slot)
    for (dense, part), members in stacks.items():
        layer = _module(model, dense)
        slot = members[0]
        lead = () if slot.index is None else (layer.kernel.shape[0],)
        part_key = jax.random.fold_in(key, zlib.crc32(f"{dense}/{part}".encode()) & 0x7FFFFFFF)
        scale = np.zeros(lead, np.float32)
        for member in members:
            place = () if member.index is None else member.index
            scale[place] = kind.strength(slot.din, slot.dout, rank, alpha)
        adapter = kind.init(part_key, lead, slot.din, slot.dout, rank)
        adapter.scale = AdapterScale(jnp.asarray(scale))
        adapter.is_wide = kind.is_wide_for(slot.din, slot.dout, rank)
        layer.adapters[str(part)] = adapter


def detach(model: nnx.Module) -> None:
    """Takes all adapters from `model`."""
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, Dense):
            layer.adapters = nnx.Dict()


def scaled(base: nnx.State, strength: float) -> nnx.State:
    """`base`, the part of a network that is not trained, with other strengths of its adapters.

    strength: what those that they have are multiplied with.
    """
    times = lambda leaf: leaf.replace(leaf[...] * jnp.float32(strength))
    flat = nnx.to_flat_state(base)
    return nnx.from_flat_state(
        {path: times(leaf) if isinstance(leaf, AdapterScale) else leaf for path, leaf in flat}
    )


def export(
    trained: nnx.State, chosen: Mapping[str, Slot], scale: float, kind: type[Adapter] = Lora
) -> dict[str, Any]:
    """The adapters by PyTorch path, as files have them; see `Adapter.export`.

    `trained`: the network's trained part.
    """
    flat = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(trained)}
    return {path: kind.export(weights, scale) for path, weights in _layers(flat, chosen)}


def load(
    trained: nnx.State,
    chosen: Mapping[str, Slot],
    modules: Mapping[str, Any],
    scale: float,
    where: str,
    kind: type[Adapter] = Lora,
) -> nnx.State:
    """`trained` with the adapters of the file `where`, by PyTorch path.

    Raises `UserError` for layers that only one side has, and for adapters that do not fit.
    """
    faults = [
        f"{where}: adapts {p}, which config.lora.targets does not"
        for p in modules.keys() - chosen.keys()
    ]
    faults += [
        f"{where}: has nothing for {p}, which config.lora.targets adapts"
        for p in chosen.keys() - modules.keys()
    ]
    flat = {path: np.array(leaf[...]) for path, leaf in nnx.to_flat_state(trained)}
    both = {path: slot for path, slot in chosen.items() if path in modules}
    for path, weights in _layers(flat, both):
        try:
            for name, array in kind.load(weights, modules[path], scale).items():
                weights[name][...] = array
        except ValueError as error:
            faults.append(f"{where}: {path} {error}")
    raise_if(sorted(faults))
    return nnx.from_flat_state(
        {p: v.replace(jnp.asarray(flat[p])) for p, v in nnx.to_flat_state(trained)}
    )


def _layers(
    flat: Mapping[tuple, np.ndarray], chosen: Mapping[str, Slot]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The trained arrays of each chosen layer, by attribute: views, without the axis of layers."""
    adapters: dict[str, dict[str, np.ndarray]] = {}
    for path, array in flat.items():
        *owner, name = map(str, path)
        adapters.setdefault(".".join(owner), {})[name] = array
    for path, slot in chosen.items():
        arrays = adapters[f"{slot.dense}.adapters.{slot.part}"]
        pick = () if slot.index is None else slot.index
        yield path, {name: array[pick] for name, array in arrays.items()}


def _module(model: nnx.Module, path: str) -> nnx.Module:
    for name in path.split("."):
        model = getattr(model, name)
    return model
