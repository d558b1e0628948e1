"""Low-rank adapters: which linear layers get one, how they start, how they are exported.

Effective weight of an adapted layer: W + (alpha / rank) A B, kernels being [in, out]. An adapter is
named by the PyTorch path of its layer (`layers.3.attention.to_q`), whatever fusing and stacking
we do; the table of names of the network says where that is.
"""

import dataclasses
import fnmatch
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax.common.errors import raise_if
from dopsd_jax.models.names import Leaf
from dopsd_jax.weights.lora_files import LoraModule


class LoraScale(nnx.Variable):
    """alpha / rank of each layer; 0 where a stacked layer is not adapted. Never trained."""


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
    model: nnx.Module, chosen: Mapping[str, Slot], rank: int, alpha: float, key: jax.Array
) -> None:
    """Gives the chosen layers of `model` adapters: A ~ N(0, 1/rank^2), B = 0, float32.

    PEFT's `gaussian` start. A stack of layers is adapted as a whole; layers of it that were not
    chosen have scale 0, so they neither act nor learn.
    """
    stacks: dict[tuple[str, int], list[tuple[str, Slot]]] = {}
    for path, slot in chosen.items():
        stacks.setdefault((slot.dense, slot.part), []).append((path, slot))
    for (dense, part), members in stacks.items():
        layer = _module(model, dense)
        slot = members[0][1]
        lead = () if slot.index is None else (layer.kernel.shape[0],)
        part_key = jax.random.fold_in(key, zlib.crc32(f"{dense}/{part}".encode()) & 0x7FFFFFFF)
        scale = np.zeros(lead, np.float32)
        for _, member in members:
            scale[() if member.index is None else member.index] = alpha / rank
        layer.adapters[str(part)] = nnx.Dict(
            a=nnx.LoRAParam(jax.random.normal(part_key, (*lead, slot.din, rank)) / rank),
            b=nnx.LoRAParam(jnp.zeros((*lead, rank, slot.dout))),
            scale=LoraScale(jnp.asarray(scale)),
        )


def export(adapter: nnx.State, chosen: Mapping[str, Slot], scale: float) -> dict[str, LoraModule]:
    """The adapters by PyTorch path, in PyTorch's shapes: A [rank, in], B [out, rank]."""
    flat = {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(adapter)}

    def pick(slot, name):
        array = flat[f"{slot.dense}.adapters.{slot.part}.{name}"]
        return np.ascontiguousarray((array if slot.index is None else array[slot.index]).T)

    return {
        path: LoraModule(a=pick(slot, "a"), b=pick(slot, "b"), scale=scale)
        for path, slot in chosen.items()
    }


def load(
    adapter: nnx.State,
    chosen: Mapping[str, Slot],
    modules: Mapping[str, LoraModule],
    scale: float,
    where: str,
) -> nnx.State:
    """`adapter` with the weights of a LoRA file: its own scale is folded into B.

    A smaller rank is filled up with rows that do nothing yet. Raises `UserError` for layers that
    only one side has and for ranks above ours.
    """
    flat = {".".join(map(str, p)): np.array(v[...]) for p, v in nnx.to_flat_state(adapter)}
    faults = [
        f"{where}: adapts {p}, which config.lora.targets does not"
        for p in modules.keys() - chosen.keys()
    ]
    faults += [
        f"{where}: has nothing for {p}, which config.lora.targets adapts"
        for p in chosen.keys() - modules.keys()
    ]
    for path in chosen.keys() & modules.keys():
        slot, module = chosen[path], modules[path]
        prefix = f"{slot.dense}.adapters.{slot.part}"
        a, b = flat[f"{prefix}.a"], flat[f"{prefix}.b"]
        if slot.index is not None:
            a, b = a[slot.index], b[slot.index]
        rank = module.a.shape[0]
        if rank > a.shape[1] or module.a.shape[1] != slot.din or module.b.shape[0] != slot.dout:
            faults.append(
                f"{where}: {path} has A {module.a.shape} and B {module.b.shape}; config.lora.rank "
                f"{a.shape[1]} and the model need at most A {a.T.shape} and B {b.T.shape}"
            )
            continue
        a[:, :rank], b[:rank] = module.a.T, module.b.T * (module.scale / scale)
        b[rank:] = 0.0  # the spare rows of A stay random: they can still learn
    raise_if(sorted(faults))
    return nnx.from_flat_state(
        {
            p: v.replace(jnp.asarray(flat[".".join(map(str, p))]))
            for p, v in nnx.to_flat_state(adapter)
        }
    )


def _module(model: nnx.Module, path: str) -> nnx.Module:
    for name in path.split("."):
        model = getattr(model, name)
    return model
