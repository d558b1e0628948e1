"""Turns a Hugging Face folder, or a single file and such a folder, into a converted model."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from dopsd_jax import families
from dopsd_jax.common.atomic import disk_error, write_text
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.progress import SILENT, Progress
from dopsd_jax.weights import converted
from dopsd_jax.weights.digest import file_stamp
from dopsd_jax.weights.hub import MODEL_MANIFEST
from dopsd_jax.weights.model_folder import (
    INDEX,
    check_assets,
    copy_assets,
    copy_shared_assets,
    is_converted_model,
)
from dopsd_jax.weights.networks import Network
from dopsd_jax.weights.stored import Stored, is_converted, open_stored
from dopsd_jax.weights.tensors import Cast, total_bytes


def open_all(
    folder: Path, files: Mapping[str, Path] | None = None, vlm: Path | None = None
) -> dict[str, tuple[Path, Network, Stored]]:
    """Every network of a model, with all tensors checked; `files`: files to read instead of its
    own.

    Raises `UserError` with the faults of all networks at once.
    """
    faults, opened, wanted = [], {}, []
    for name, network in families.of_folder(folder).NETWORKS.items():
        if not network.beside:
            wanted.append((folder / name, network))
        elif vlm is not None or os.path.isdir(folder / name):
            wanted.append((vlm or folder / name, network))
    for path, network in wanted:
        file = (files or {}).get(network.component)
        try:
            stored = open_stored(path, network, file)
            if stored.files is None:
                raise UserError(f"{path}: is converted already; give the model it was made from")
            opened[network.component] = path, network, stored
        except UserError as error:
            faults += error.problems
    raise_if(faults)
    return opened


def import_model(
    source: Path,
    out: Path,
    *,
    described: str | None = None,
    revision: str | None = None,
    files: Mapping[str, Path] | None = None,
    vlm: Path | None = None,
    dtype: str | None = None,
    part_bytes: int = converted.PART_BYTES,
    progress: Progress = SILENT,
) -> None:
    """Writes the converted model `out`. An import that was interrupted goes on where it stopped.

    Args:
      source: Hugging Face-layout folder.
      out: new folder, or the one an interrupted import of the same source left.
      described: what the user called the source, and its commit `revision`: both are recorded.
      files: for some components, a single file to read instead of the folder's, in any known
        layout; of the component's folder only config.json is then needed.
      vlm: folder of the vision-language model, stored as component `vlm`; None takes the
        source's own folder of that name, if it has one.
      dtype: store every parameter in this type (a code of `tensors.FLOATS`); None keeps each one's.

    Raises `UserError`; nothing is written before all tensors of all networks are accounted for.
    """
    if is_converted_model(source):
        raise UserError(f"{source}: is a converted model already; use it as it is, or export it")
    if is_converted_model(out):
        raise UserError(f"{out}: already holds a converted model; give another folder")
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out}: is a file; give a folder")
    try:
        inside = list(out.iterdir()) if os.path.isdir(out) else []
    except OSError as error:
        raise disk_error(error, out) from None
    if inside and not any(map(is_converted, inside)):
        raise UserError(f"{out}: is not empty; give another folder")
    opened = open_all(source, files, vlm)
    check_assets(source)
    progress.start(sum(total_bytes(stored.tensors) for _, _, stored in opened.values()))
    digests = {}
    for name, (path, network, stored) in opened.items():
        tensors = Cast(stored.tensors, dtype) if dtype else stored.tensors
        label = str((files or {}).get(name) or (path if network.beside else described or source))
        origin = converted.Origin(label, file_stamp(stored.files), stored.found)
        digests[name] = converted.convert(
            tensors,
            stored.leaves + stored.unused,
            stored.config_text,
            out / name,
            name,
            origin,
            part_bytes,
            progress,
        )
    try:
        for name, (path, _, _) in opened.items():
            copy_assets(path, out / name)
        copy_shared_assets(source, out)
    except OSError as error:
        raise disk_error(error, out / INDEX) from error
    manifest = {
        "format": converted.FORMAT,
        "family": families.of_folder(source).NAME,
        "source": described or str(source),
        "revision": revision,
        "components": digests,
    }
    write_text(out / MODEL_MANIFEST, json.dumps(manifest, indent=1) + "\n")
