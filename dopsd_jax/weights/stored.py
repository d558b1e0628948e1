"""A network's weights on disk in any form we read: Hugging Face folder, file, converted."""

import functools
import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.json_fields import Fields, in_json
from dopsd_jax.common.json_files import read_json
from dopsd_jax.models.names import Leaf, to_flax, to_torch
from dopsd_jax.weights import converted
from dopsd_jax.weights.digest import remembered_digest
from dopsd_jax.weights.found_files import readable
from dopsd_jax.weights.layouts import CANONICAL, Found, as_canonical, recognise
from dopsd_jax.weights.networks import Network
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.tensors import (
    DTYPES,
    TensorInfo,
    Tensors,
    check_finite,
    contiguous,
    read_leaf,
    take,
)
from dopsd_jax.weights.validation import check_tensors, sources

AGAIN = "convert the model again"
KEPT_PARTS = 2  # parts in memory while reading: neighbours share fused parameters


class Stored(NamedTuple):
    """Weights whose tensors have all been checked.

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
    return any(os.path.exists(folder / name) for name in (converted.MANIFEST, converted.JOURNAL))


def read_config(path: Path, network: Network) -> tuple[Any, str]:
    """The network's configuration and the file's text. Raises `UserError`."""
    content, text = read_json(path)
    return network.read_config(content, str(path)), text


def open_stored(folder: Path, network: Network, weights: Path | None = None) -> Stored:
    """Opens a component's folder, converted or not, or the file `weights` with the folder's config.

    Raises `UserError` with every tensor that is missing, unexpected or mis-shaped.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; a model has one named {network.component}")
    if weights is None and is_converted(folder):
        return _open_converted(folder, network)
    config, text = read_config(folder / converted.CONFIG, network)
    files = TensorFiles.open(weights or folder)
    layouts = network.layouts(config)
    plain = readable(files, network.component)
    found = recognise(files.where, plain.infos, layouts)
    tensors = as_canonical(plain, found)
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


def source_digest(stored: Stored, memo: Path) -> str:
    """Digest of the content: from the manifest if converted, else computed once per file state."""
    if stored.files is None:
        return stored.tensors.digest
    return remembered_digest(stored.tensors, stored.files, memo)


def _open_converted(folder: Path, network: Network) -> Stored:
    if not os.path.exists(folder / converted.MANIFEST):
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
    spare = [source for leaf in unused for source in leaf.sources]
    check_tensors(str(folder), tensors.infos, sources(leaves), spare)
    found = Found(layout, manifest["layout"]["prefix"])
    return Stored(config, text, tensors, leaves, unused, found, None)


def _check_manifest(folder: Path, manifest: Any, network: Network) -> None:
    where = folder / converted.MANIFEST
    fields = Fields(manifest, f"{where}")
    fields.only("format", converted.FORMAT, required=True)
    if fields.problems:
        found = fields.json.get("format")
        raise UserError(f"{where}: format {in_json(found)} is not {converted.FORMAT}; {AGAIN}")
    for name in ("component", "digest", "config_sha256"):
        fields.text(name)
    layout, parts, sums = (fields.table(name) for name in ("layout", "parts", "sha256"))
    if not all(isinstance(layout.get(name), str) for name in ("name", "prefix")):
        fields.problem(f"field layout is malformed; {AGAIN}")
    for part, entries in parts.items():
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            fields.problem(f"part {part!r} is malformed; {AGAIN}")
        if not isinstance(sums.get(part), str):
            fields.problem(f"part {part!r} has no digest; {AGAIN}")
    fields.finish()
    if manifest["component"] != network.component:
        raise UserError(f"{where}: is a {manifest['component']}, not a {network.component}")
    raise_if(
        f"{folder / converted.PARTS / part}: is missing; {AGAIN}"
        for part in manifest["parts"]
        if Path(part).name != part or not os.path.isdir(folder / converted.PARTS / part)
    )


def _is_entry(entry: Any) -> bool:
    """Whether this is a manifest's description of one array of a part."""
    if not isinstance(entry, dict):
        return False
    shape, index = entry.get("shape"), entry.get("index", "")
    return (
        isinstance(entry.get("path"), str)
        and isinstance(entry.get("dtype"), str)
        and (index is None or type(index) is int)
        and isinstance(shape, list)
        and all(type(size) is int for size in shape)
    )


class ConvertedTensors:
    """A converted checkpoint as tensors with canonical names; reads part by part."""

    def __init__(self, folder: Path, manifest: Mapping, network: Network, config: Any):
        self.where, self.folder = str(folder), folder
        self.parts, self.sums = manifest["parts"], manifest["sha256"]
        self.digest = manifest["digest"]
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
            self._recent[part] = converted.load_part(path, self.parts[part], self.sums[part])
        self._recent.move_to_end(part)
        return self._recent[part]

    def home(self, leaf: Leaf) -> str:
        """The part that holds a leaf: leaves read in this order need every part once."""
        return self.homes[leaf.sources[0].name][0]

    def leaf(self, leaf: Leaf) -> np.ndarray:
        """The Flax array of a leaf, as it is stored."""
        return self._part(self.home(leaf))[leaf.path]


def verify(stored: Stored) -> None:
    """Reads every number. Raises `UserError` naming everything that is damaged or not finite."""
    tensors, faults = stored.tensors, []
    if isinstance(tensors, ConvertedTensors):
        reads = [functools.partial(tensors._part, part) for part in tensors.parts]
    else:
        reads = [functools.partial(_read_finite, tensors, name) for name in tensors.infos]
    for read in reads:
        try:
            read()
        except UserError as error:
            faults += error.problems
    raise_if(faults)


def _read_finite(tensors: Tensors, name: str) -> np.ndarray:
    return check_finite(tensors.read(name), tensors.where, name)


def host_leaf(leaf: Leaf, tensors: Tensors) -> np.ndarray:
    """The Flax array of a leaf on the host, in the stored type. Raises `UserError`.

    Digests were compared where a converted checkpoint was read; other numbers are looked at here.
    """
    if isinstance(tensors, ConvertedTensors):
        return tensors.leaf(leaf)
    names = [source.name for source in leaf.sources]
    if len({tensors.infos[name].dtype for name in names}) > 1:
        raise UserError(
            f"{tensors.where}: {', '.join(names)} are stored in different types but are one "
            "parameter here; convert the folder to one type (--dtype)"
        )
    return contiguous(to_flax(leaf, read_leaf(tensors, leaf)))
