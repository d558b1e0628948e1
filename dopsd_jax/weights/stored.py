"""A network's weights on disk in any form we read: Hugging Face folder, file, converted."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.json_files import read_json
from dopsd_jax.models.names import Leaf, to_flax, to_torch
from dopsd_jax.weights import converted
from dopsd_jax.weights.digest import remembered_digest
from dopsd_jax.weights.layouts import CANONICAL, Found, as_canonical, recognise
from dopsd_jax.weights.networks import Network
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.tensors import DTYPES, TensorInfo, Tensors, take
from dopsd_jax.weights.validation import account, sources

AGAIN = "convert the model again"
KEPT_PARTS = 2  # parts in memory while reading: neighbours share fused parameters


class Stored(NamedTuple):
    """Weights that are all accounted for.

    `tensors` has canonical names; `leaves` are the module's, and `unused` those that only an export
    needs. `found` is the layout of the files (the original ones, if converted).
    """

    config: Any
    config_text: str
    tensors: Tensors
    leaves: list[Leaf]
    unused: list[Leaf]
    found: Found
    files: TensorFiles | None  # None: converted


def is_converted(folder: Path) -> bool:
    """Whether a folder is a converted checkpoint of one network, complete or not."""
    return any((folder / name).exists() for name in (converted.MANIFEST, converted.JOURNAL))


def read_config(path: Path, network: Network) -> tuple[Any, str]:
    """The network's configuration and the file's text. Raises `UserError`."""
    content, text = read_json(path)
    return network.read_config(content, str(path)), text


def open_stored(folder: Path, network: Network, weights: Path | None = None) -> Stored:
    """Opens a component's folder, converted or not, or the file `weights` with the folder's config.

    Raises `UserError` with every tensor that is missing, unexpected or mis-shaped.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a model has one named {network.component}")
    if weights is None and is_converted(folder):
        return _open_converted(folder, network)
    config, text = read_config(folder / converted.CONFIG, network)
    files = TensorFiles.open(weights or folder)
    layouts = network.layouts(config)
    found = recognise(files.where, files.infos, layouts)
    tensors = as_canonical(files, found)
    leaves, unused = _leaves(network, config, tensors)
    return Stored(config, text, tensors, leaves, unused, found, files)


def _leaves(network: Network, config: Any, tensors: Tensors) -> tuple[list[Leaf], list[Leaf]]:
    leaves = network.names(config)
    used = sources(leaves)
    known = _extras(network, config)
    return leaves, [known[name] for name in tensors.infos if name not in used]


def _extras(network: Network, config: Any) -> dict[str, Leaf]:
    """Tensors that a checkpoint may hold beyond the module's, by canonical name."""
    return {
        source.name: converted.unused_leaf(source)
        for layout in network.layouts(config)
        for entry in layout.extras
        for source in entry.sources
    }


def source_digest(stored: Stored, folder: Path, memo: Path) -> str:
    """Digest of the content: from the manifest if converted, else computed once per file state."""
    if stored.files is None:
        return read_json(folder / converted.MANIFEST)[0]["digest"]
    return remembered_digest(stored.tensors, stored.files, memo)


def _open_converted(folder: Path, network: Network) -> Stored:
    if not (folder / converted.MANIFEST).exists():
        raise UserError(
            f"{folder}: its conversion was interrupted; run the same import again, it goes on"
        )
    manifest, _ = read_json(folder / converted.MANIFEST)
    _check_manifest(folder, manifest, network)
    _, text = read_json(folder / converted.CONFIG)
    if hashlib.sha256(text.encode()).hexdigest() != manifest["config_sha256"]:
        raise UserError(f"{folder / converted.CONFIG}: was changed after the conversion; {AGAIN}")
    config, _ = read_config(folder / converted.CONFIG, network)
    layouts = network.layouts(config)
    named = {layout.name: layout for layout in layouts}
    layout = named.get(manifest["layout"]["name"], named[CANONICAL])
    tensors = ConvertedTensors(folder, manifest, network, config)
    leaves, unused = _leaves(network, config, tensors)
    account(str(folder), tensors.infos, sources(leaves), [s for u in unused for s in u.sources])
    found = Found(layout, manifest["layout"]["prefix"])
    return Stored(config, text, tensors, leaves, unused, found, None)


def _check_manifest(folder: Path, manifest: Any, network: Network) -> None:
    where = folder / converted.MANIFEST
    if not isinstance(manifest, dict) or manifest.get("format") != converted.FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{where}: format {found!r} is not {converted.FORMAT}; {AGAIN}")
    fields = {"component": str, "digest": str, "config_sha256": str, "layout": dict, "parts": dict}
    raise_if(
        f"{where}: field {name} is missing or malformed; {AGAIN}"
        for name, kind in fields.items()
        if not isinstance(manifest.get(name), kind)
    )
    if manifest["component"] != network.component:
        raise UserError(f"{where}: is a {manifest['component']}, not a {network.component}")
    raise_if(
        f"{folder / converted.PARTS / part}: is missing; {AGAIN}"
        for part in manifest["parts"]
        if Path(part).name != part or not (folder / converted.PARTS / part).is_dir()
    )


class ConvertedTensors:
    """A converted checkpoint as tensors with canonical names; reads part by part."""

    def __init__(self, folder: Path, manifest: Mapping, network: Network, config: Any):
        self.where, self.folder, self.parts = str(folder), folder, manifest["parts"]
        known = {(leaf.path, leaf.index): leaf for leaf in network.names(config)}
        known |= {(leaf.path, None): leaf for leaf in _extras(network, config).values()}
        self.infos: dict[str, TensorInfo] = {}
        self.homes: dict[str, tuple[str, Leaf]] = {}  # tensor -> part, leaf
        self._recent: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()
        faults = []
        for part, entries in self.parts.items():
            for entry in entries:
                leaf = known.get((entry["path"], entry["index"]))
                if (
                    leaf is None
                    or list(leaf.shape) != entry["shape"]
                    or entry["dtype"] not in DTYPES
                ):
                    what = f"{entry['path']}[{entry['index']}] {entry['dtype']} {entry['shape']}"
                    faults.append(f"{folder}: parameter {what} is not of this network; {AGAIN}")
                    continue
                for source in leaf.sources:
                    self.infos[source.name] = TensorInfo(entry["dtype"], source.shape)
                    self.homes[source.name] = part, leaf
        raise_if(faults)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        part, leaf = self.homes[name]
        pieces = to_torch(leaf, self._part(part)[leaf.path])
        names = [source.name for source in leaf.sources]
        return take(pieces[names.index(name)], rows)

    def _part(self, part: str) -> dict[str, np.ndarray]:
        if part not in self._recent:
            while len(self._recent) >= KEPT_PARTS:
                self._recent.popitem(last=False)
            path = self.folder / converted.PARTS / part
            self._recent[part] = converted.load_part(path, self.parts[part])
        self._recent.move_to_end(part)
        return self._recent[part]

    def restore(self, part: str, shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The parameters of a part that `shardings` names, on devices, each with its sharding."""
        like = {}
        for entry in self.parts[part]:
            path, shape, dtype = entry["path"], tuple(entry["shape"]), DTYPES[entry["dtype"]]
            like[path] = converted.SKIP
            if path in shardings:
                like[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path])
        return converted.restore(self.folder / converted.PARTS / part, like)


def host_leaf(leaf: Leaf, tensors: Tensors) -> np.ndarray:
    """The Flax array of a leaf on the host, in the stored type."""
    pieces: Sequence[np.ndarray] = [tensors.read(source.name) for source in leaf.sources]
    return to_flax(leaf, pieces)
