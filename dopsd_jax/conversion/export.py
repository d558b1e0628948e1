"""Writes models for others: a diffusers folder, or the transformer as a ComfyUI single file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from dopsd_jax import families
from dopsd_jax.common.atomic import atomic_folder, need_space, write_text
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.progress import SILENT, Progress
from dopsd_jax.weights.converted import CONFIG
from dopsd_jax.weights.layouts import CANONICAL, Found, in_layout
from dopsd_jax.weights.lora_mix import Change
from dopsd_jax.weights.merge import Merged
from dopsd_jax.weights.model_folder import copy_assets, copy_shared_assets
from dopsd_jax.weights.networks import Network, present
from dopsd_jax.weights.safetensors_write import (
    MAX_SHARD,
    file_order,
    shards,
    write_safetensors,
    write_sharded,
)
from dopsd_jax.weights.stored import Stored, open_stored
from dopsd_jax.weights.tensors import Cast, Tensors, total_bytes

HUGGING_FACE_LAYOUTS = (CANONICAL, "bare")  # what diffusers and transformers read by themselves
PT = {"format": "pt"}  # transformers refuses files that do not say so


def export_diffusers(
    model: Path,
    out: Path,
    *,
    lora: Mapping[str, Change] | None = None,
    transformer: Tensors | None = None,
    dtype: str | None = None,
    max_shard: int = MAX_SHARD,
    progress: Progress = SILENT,
    write: bool = True,
    replace: bool = False,
) -> None:
    """Writes a model (converted or not) as the new Hugging Face-layout folder `out`.

    Names and types are those of the source, unless `dtype` (a code of `tensors.FLOATS`) is given;
    `lora` is merged into the transformer; `transformer` replaces the source's own tensors, in its
    own type. The folder appears when it is whole. Raises `UserError`.

    `write` False only reads `transformer`, in the same order: for the processes that help to gather
    it. `replace`: an `out` that is there already is replaced.
    """
    opened, faults = {}, []
    # Networks beside a published model, which diffusers ignores and our own teacher needs.
    for name, network in present(families.of_folder(model).NETWORKS, model).items():
        try:
            opened[name] = network, open_stored(model / name, network)
        except UserError as error:
            faults += error.problems
    raise_if(faults)
    views = {}
    for name, (network, stored) in opened.items():
        changed = _changed(stored, lora if name == "transformer" else None, dtype)
        if name == "transformer" and transformer is not None:
            changed = transformer
        views[name] = in_layout(changed, _hugging_face(network, stored))
    if not write:
        _read(views["transformer"], max_shard)
        return
    size = sum(total_bytes(view) for view in views.values())
    progress.start(size)
    need_space(out.parent, size)
    with atomic_folder(out, replace=replace) as partial:
        copy_shared_assets(model, partial)
        for name, (network, stored) in opened.items():
            copy_assets(model / name, partial / name)
            write_text(partial / name / CONFIG, stored.config_text)
            write_sharded(partial / name, network.base, views[name], max_shard, PT, progress)


def export_single(
    model: Path,
    out: Path,
    *,
    lora: Mapping[str, Change] | None = None,
    transformer: Tensors | None = None,
    dtype: str | None = None,
    progress: Progress = SILENT,
    write: bool = True,
) -> None:
    """Writes the transformer of a model as one file with the authors' names, for ComfyUI.

    The names carry a prefix if the file that the model was imported from did. `transformer` and
    `write` are those of `export_diffusers`. Raises `UserError`.
    """
    network = families.of_folder(model).NETWORKS["transformer"]
    stored = open_stored(model / network.component, network)
    layout = next(x for x in network.layouts(stored.config) if x.name == network.single)
    prefix = stored.found.prefix if stored.found.layout.name == network.single else ""
    tensors = _changed(stored, lora, dtype) if transformer is None else transformer
    view = in_layout(tensors, Found(layout, prefix))
    if not write:
        _read(view)
        return
    progress.start(total_bytes(view))
    write_safetensors(out, view.infos, view.read, progress=progress)


def _changed(stored: Stored, lora: Mapping[str, Change] | None, dtype: str | None) -> Tensors:
    tensors = stored.tensors
    # In the type to be written: one rounding, not two.
    if dtype is not None and lora is None:
        return Cast(tensors, dtype)
    return tensors if lora is None else Merged(tensors, lora, dtype)


def _read(tensors: Tensors, max_shard: int | None = None) -> None:
    for names in shards(tensors.infos, max_shard):
        for name in file_order({n: tensors.infos[n] for n in names}):
            tensors.read(name)


def _hugging_face(network: Network, stored: Stored) -> Found:
    """The layout to write for diffusers: the source's own, if that is one."""
    if stored.found.layout.name in HUGGING_FACE_LAYOUTS:
        return dataclasses.replace(stored.found, prefix="")
    return Found(network.layouts(stored.config)[0], "")
