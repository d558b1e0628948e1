"""The difference of two models of one family as a LoRA."""

import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dopsd_jax import families
from dopsd_jax.common.errors import UserError, few
from dopsd_jax.common.progress import SILENT, Progress
from dopsd_jax.weights.lora_dialects import Layers, layers_of
from dopsd_jax.weights.lora_files import LoraModule
from dopsd_jax.weights.low_rank import low_rank
from dopsd_jax.weights.stored import open_stored
from dopsd_jax.weights.tensors import FLOATS, Tensors

WORST = 3  # layers that the summary names


class Extracted(NamedTuple):
    """A LoRA of the transformer, the layers it may adapt, and what to say of it in a few lines."""

    modules: dict[str, LoraModule]
    layers: Layers
    summary: list[str]


def extract(
    base: Path, tuned: Path, rank: int, energy: float = 1.0, progress: Progress = SILENT
) -> Extracted:
    """`tuned` minus `base` in every linear layer of the transformer, by `low_rank`.

    base: a model folder, converted or not; tuned: another, or a single file of the transformer.
    Two layers are in memory at a time. Raises `UserError` for models that do not fit each other, or
    that do not differ.
    """
    network = families.of_folder(base).NETWORKS["transformer"]
    before = open_stored(base / network.component, network)
    if os.path.isfile(tuned):
        after = open_stored(base / network.component, network, tuned)
    else:
        after = open_stored(tuned / network.component, network)
    if after.config != before.config:
        raise UserError(f"{tuned}: its transformer has other sizes than {base}'s")
    layers = layers_of(network, before.config)
    modules, errors, norms = {}, {}, {}
    progress.start(len(layers.split))
    for name in layers.split:
        change = _change(before.tensors, after.tensors, f"{name}.weight", tuned)
        norm = float(np.linalg.norm(change))
        if norm:
            found = low_rank(change, rank, energy)
            modules[name] = LoraModule(found.a, found.b, 1.0)
            errors[name], norms[name] = found.error, norm
        progress.advance()
    if not modules:
        raise UserError(
            f"{tuned}: no linear layer differs from {base}; there is nothing to extract"
        )
    others = _others(before.tensors, after.tensors, layers, tuned)
    return Extracted(modules, layers, _summary(modules, errors, norms, layers, others))


def _change(before: Tensors, after: Tensors, name: str, tuned: Path) -> np.ndarray:
    change = after.read(name).astype(np.float32)
    change -= before.read(name).astype(np.float32)
    if not np.isfinite(change).all():
        raise UserError(f"{tuned}: {name!r} holds numbers that are not finite, or the base does")
    return change


def _others(before: Tensors, after: Tensors, layers: Layers, tuned: Path) -> list[str]:
    """The tensors that differ and are no linear layer: norms, biases, learned tokens."""
    linear = {f"{name}.weight" for name in layers.split}
    return [
        name
        for name, info in before.infos.items()
        if name not in linear and name in after.infos and info.dtype in FLOATS
        if _change(before, after, name, tuned).any()
    ]


def _summary(
    modules: Mapping[str, LoraModule],
    errors: Mapping[str, float],
    norms: Mapping[str, float],
    layers: Layers,
    others: list[str],
) -> list[str]:
    whole = sum(norm**2 for norm in norms.values())
    lost = sum((errors[name] * norm) ** 2 for name, norm in norms.items())
    ranks = [module.rank for module in modules.values()]
    lines = [
        f"{len(modules)} of {len(layers.split)} linear layers differ; rank {min(ranks)} to "
        f"{max(ranks)}, median {statistics.median(ranks):g}",
        f"relative error of the change: {(lost / whole) ** 0.5:.3g} in all, "
        f"{statistics.median(errors.values()):.3g} in the median layer; the largest:",
    ]
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:WORST]
    lines += [f"  {errors[name]:.3g} {name}" for name in worst]
    if others:
        lines.append(f"{len(others)} tensors that no LoRA can change differ too, and are left out:")
        lines += [f"  {name}" for name in few(others)]
    return lines
