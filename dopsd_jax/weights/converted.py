"""The converted checkpoint of one network: orbax parts in Flax's arrangement, and a manifest.

    config.json            as it came
    parts/layers.0007.1/   an orbax checkpoint of some parameters of one layer (or of `rest`)
    manifest.json          what is in the parts; written last, so a folder without it is incomplete

A stacked Flax parameter is never whole in host memory: each layer's rows are in parts of their own,
of at most `PART_BYTES` unless one parameter alone is larger.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp

from dopsd_jax.common.atomic import disk_error, need_space, write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.common.json_files import read_json
from dopsd_jax.common.progress import SILENT, Progress
from dopsd_jax.models.names import Leaf, Source, to_flax
from dopsd_jax.weights.digest import combined_digest, part_digest, tensor_digest
from dopsd_jax.weights.layouts import Found
from dopsd_jax.weights.tensors import DTYPES, Tensors, contiguous, read_leaf, total_bytes

# Raise it when the same tensors are arranged otherwise: converted models and checkpoints of full
# fine-tuning that were made before are then refused.
FORMAT = 4
MANIFEST, JOURNAL, PARTS, CONFIG = "manifest.json", "incomplete.json", "parts", "config.json"
PART_BYTES = 256 << 20
REST = "rest"
UNUSED = "unused."  # prefix of tensors for which the module has no place


def storage_context() -> ocp.Context:
    """No compression: weights hardly shrink, and it takes time and a second copy in memory."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context


def unused_leaf(source: Source) -> Leaf:
    """How a tensor without a place in the module is kept, so that an export is complete."""
    return Leaf(f"{UNUSED}{source.name}", None, (source,), "same")


def split_parts(leaves: Sequence[Leaf], tensors: Tensors, limit: int) -> dict[str, list[Leaf]]:
    """Leaves of one layer together, in parts of at most `limit` bytes; in order."""
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        stack = leaf.path.partition(".")[0]
        group = REST if leaf.index is None else f"{stack}.{leaf.index:04d}"
        groups.setdefault(group, []).append(leaf)
    parts = {}
    for group, members in groups.items():
        count, size, current = 0, 0, []
        for leaf in members:
            nbytes = sum(tensors.infos[s.name].nbytes for s in leaf.sources)
            if current and size + nbytes > limit:
                parts[f"{group}.{count}"] = current
                count, size, current = count + 1, 0, []
            current.append(leaf)
            size += nbytes
        parts[f"{group}.{count}"] = current
    return parts


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where converted tensors come from."""

    source: str  # for people: folder, file, or hub id with revision
    stamp: str  # changes when the source may have changed
    found: Found


def convert(
    tensors: Tensors,
    leaves: Sequence[Leaf],
    config_text: str,
    folder: Path,
    component: str,
    origin: Origin,
    part_bytes: int = PART_BYTES,
    progress: Progress = SILENT,
) -> str:
    """Writes the converted checkpoint of one network; returns the digest of its tensors.

    `tensors` has canonical names and is accounted for; `leaves` include those of `unused_leaf`. A
    conversion that was interrupted goes on where it stopped. Raises `UserError`.
    """
    parts = split_parts(leaves, tensors, part_bytes)
    job = _fingerprint(tensors, config_text, component, origin, part_bytes)
    if finished := _finished(folder, job):
        progress.advance(total_bytes(tensors), component)
        return finished
    digests, sums = _start(folder, job)
    done = {name for name in parts if name in sums and (folder / PARTS / name).is_dir()}
    bytes_of = lambda part: sum(tensors.infos[name].nbytes for name in _sources(part))
    need_space(folder, sum(bytes_of(p) for name, p in parts.items() if name not in done))
    table = {}
    for name, part in parts.items():
        if name not in done:
            arrays, hashes = _read_part(tensors, part)
            _save_part(folder / PARTS / name, arrays)
            digests |= hashes
            sums[name] = part_digest(arrays)
            del arrays
            journal = {"job": job, "digests": digests, "sha256": sums}
            write_text(folder / JOURNAL, json.dumps(journal))
        table[name] = [
            {
                "path": leaf.path,
                "index": leaf.index,
                "dtype": tensors.infos[leaf.sources[0].name].dtype,
                "shape": list(leaf.shape),
            }
            for leaf in part
        ]
        progress.advance(bytes_of(part), f"{component}/{name}")
    write_text(folder / CONFIG, config_text)
    manifest = {
        "format": FORMAT,
        "component": component,
        "job": job,
        "source": origin.source,
        "digest": combined_digest(digests),
        "config_sha256": hashlib.sha256(config_text.encode()).hexdigest(),
        "layout": {"name": origin.found.layout.name, "prefix": origin.found.prefix},
        "bytes": total_bytes(tensors),
        "parts": table,
        "sha256": sums,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    (folder / JOURNAL).unlink()
    return manifest["digest"]


def _sources(part: Sequence[Leaf]) -> list[str]:
    return [source.name for leaf in part for source in leaf.sources]


def _fingerprint(tensors, config_text, component, origin, part_bytes) -> str:
    infos = sorted((n, i.dtype, list(i.shape)) for n, i in tensors.infos.items())
    about = [FORMAT, component, config_text, origin.source, origin.stamp, part_bytes, infos]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _finished(folder: Path, job: str) -> str | None:
    """The digest, if this network is done: the import was stopped at another network."""
    if not (folder / MANIFEST).exists():
        return None
    manifest, _ = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("job") != job or "digest" not in manifest:
        raise UserError(f"{folder}: already holds a converted checkpoint; give another folder")
    return manifest["digest"]


def _start(folder: Path, job: str) -> tuple[dict[str, str], dict[str, str]]:
    """Makes the folder, or finds what an interrupted conversion left.

    Returns the digests of the tensors and of the parts that are saved.
    """
    if not (folder / JOURNAL).exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty; give another folder")
        try:
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        write_text(folder / JOURNAL, json.dumps({"job": job, "digests": {}, "sha256": {}}))
        return {}, {}
    fields = Fields(read_json(folder / JOURNAL)[0], str(folder / JOURNAL))
    digests, sums = fields.table("digests"), fields.table("sha256")
    fields.finish()
    if fields.json.get("job") != job:
        raise UserError(
            f"{folder}: holds an interrupted conversion of another source or with other settings; "
            "remove it, or give another folder"
        )
    return dict(digests), dict(sums)


def _read_part(tensors: Tensors, part: Sequence[Leaf]):
    arrays, digests = {}, {}
    for leaf in part:
        names = [source.name for source in leaf.sources]
        pieces = read_leaf(tensors, leaf)
        types = {piece.dtype for piece in pieces}
        if len(types) > 1:
            raise UserError(
                f"{tensors.where}: {', '.join(names)} are stored in different types but are "
                "one parameter here; choose one type (--dtype)"
            )
        digests |= {s.name: tensor_digest(p) for s, p in zip(leaf.sources, pieces, strict=True)}
        arrays[leaf.path] = contiguous(to_flax(leaf, pieces))
    return arrays, digests


def _save_part(path: Path, arrays: dict[str, np.ndarray]) -> None:
    for rest in (path, *path.parent.glob(f"{path.name}.orbax*")):  # not in the journal: incomplete
        shutil.rmtree(rest, ignore_errors=True)
    try:
        with storage_context():
            ocp.save(path.absolute(), arrays)
    except OSError as error:
        raise disk_error(error, path) from error
    except (ValueError, RuntimeError) as error:  # tensorstore's own words for a failed write
        if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(
                f"{path}: the disk is full; free some space and run again, it goes on from here"
            ) from error
        raise


def load_part(path: Path, entries: Sequence[Mapping], sha256: str) -> dict[str, np.ndarray]:
    """The arrays of a part, on the host. Raises `UserError` unless they are what was saved."""
    like = {e["path"]: np.empty(e["shape"], DTYPES[e["dtype"]]) for e in entries}
    try:
        with storage_context():
            arrays = ocp.load(path.absolute(), like)
        if part_digest(arrays) == sha256:
            return arrays
        reason = "its numbers are not those that were saved"
    except (OSError, ValueError, KeyError, TypeError, ocp.errors.InvalidLayoutError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
    raise UserError(f"{path}: is damaged ({reason}); convert the model again")
