"""Describes a file or folder in lines of text: networks, counts, types, sizes, faults."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from dopsd_jax import families
from dopsd_jax.common.errors import UserError, few, one_line
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.common.json_files import parse_json, read_json
from dopsd_jax.common.progress import size
from dopsd_jax.weights import converted
from dopsd_jax.weights.found_files import components, readable
from dopsd_jax.weights.hub import MODEL_MANIFEST
from dopsd_jax.weights.layouts import Found, as_canonical, recognise
from dopsd_jax.weights.lora_dialects import UNSUPPORTED_PARTS, Layers, layers_of, split_name
from dopsd_jax.weights.lora_files import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    LoraModule,
    closest,
    read_adapter,
)
from dopsd_jax.weights.lora_settings import BASE
from dopsd_jax.weights.model_folder import INDEX, check_assets, is_converted_model
from dopsd_jax.weights.networks import Network, present
from dopsd_jax.weights.safetensors_io import TensorFiles, read_header
from dopsd_jax.weights.stored import Stored, open_stored, read_config
from dopsd_jax.weights.stored import verify as verify_numbers
from dopsd_jax.weights.tensors import TensorInfo, Tensors


def inspect(path: Path, model: Path | None = None, verify: bool = False) -> Iterator[str]:
    """Lines about `path`; `model` is the folder whose config.json a lone file belongs to.

    `verify` reads every number of a model: digests must match, and all be finite.

    Raises `UserError` for an unknown kind of file; faults of a known kind are lines.
    """
    if os.path.isdir(path):
        if os.path.isfile(path / MODEL_MANIFEST) or os.path.isfile(path / INDEX):
            yield from _model(path, verify)
            return
        if os.path.isfile(path / PEFT_CONFIG):
            yield from _lora(path, model)
            return
        if os.path.isfile(path / converted.CONFIG):
            yield from _component(path, verify)
            return
    files = TensorFiles.open(path)
    if any(split_name(name)[1] or _is_adapter(name) for name in files.infos):
        yield from _lora(path, model)
    else:
        yield from _single(path, files, model)


def layers_for(model: Path | None, lora: Path | None = None) -> Layers:
    """The layers of a model's transformer.

    Without a model, of the one that the LoRA file `lora` says it was made for; else of the
    published one that its factors fit.
    """
    if model is not None:
        whole = is_converted_model(model) or os.path.isfile(model / INDEX)
        family = families.of_folder(model) if whole else families.load(families.AUTO)
        network = family.NETWORKS["transformer"]
        config, _ = read_config(model / network.component / converted.CONFIG, network)
        return layers_of(network, config)
    file = lora / PEFT_WEIGHTS if lora is not None and os.path.isdir(lora) else lora
    text = read_header(file).metadata.get(BASE) if file is not None else None
    if text is None:
        published = [
            layers_of(family.NETWORKS["transformer"], size)
            for family in families.every()
            for size in family.PUBLISHED.values()
        ]
        return published[0] if file is None else closest(file, published)
    where = f"{file}: header string {BASE}"
    content = parse_json(text, where)
    candidates = [family.NETWORKS["transformer"] for family in families.every()]
    faults = []
    for network in candidates:
        try:
            return layers_of(network, network.read_config(content, where))
        except UserError as error:
            faults += error.problems
    raise UserError(*faults)


def _is_adapter(name: str) -> bool:
    return any(part in name for part in UNSUPPORTED_PARTS)


def _model(path: Path, verify: bool) -> Iterator[str]:
    family = families.of_folder(path)
    form = "converted model" if is_converted_model(path) else "Hugging Face folder"
    yield f"{path}: {form}, family {family.NAME}"
    if is_converted_model(path):
        about = Fields(read_json(path / MODEL_MANIFEST)[0], str(path / MODEL_MANIFEST))
        source, revision = about.text("source"), about.text("revision", "not recorded")
        about.finish()
        yield f"  source {source}, revision {revision}"
    try:
        check_assets(path)
    except UserError as error:
        yield from (f"  {problem}" for problem in few(error.problems))
    for name, network in present(family.NETWORKS, path).items():
        try:
            yield from _stored(name, open_stored(path / name, network), verify)
        except UserError as error:
            yield f"  {name}: {len(error.problems)} faults"
            yield from (f"    {problem}" for problem in few(error.problems))


def _component(path: Path, verify: bool) -> Iterator[str]:
    """A folder with one network: whichever accepts its config.json."""
    faults = []
    for network in (n for f in families.every() for n in f.NETWORKS.values()):
        try:
            read_config(path / converted.CONFIG, network)
        except UserError as error:
            faults += error.problems
            continue
        yield f"{path}:"
        yield from _stored(network.component, open_stored(path, network), verify)
        return
    found, _ = read_json(path / converted.CONFIG)
    if isinstance(found, dict) and {"config", "facts"} <= found.keys():
        raise UserError(
            f"{path}: is the folder of a run; name its result, lora/step_N.safetensors or "
            "model/step_N in it"
        )
    raise UserError(f"{path / converted.CONFIG}: is of no network we know", *faults)


def _stored(name: str, stored: Stored, verify: bool) -> Iterator[str]:
    layout = stored.found.layout.name + (
        f" behind {stored.found.prefix!r}" * bool(stored.found.prefix)
    )
    form = "converted from" if stored.files is None else "in"
    yield f"  {name}: {_summary(stored.tensors.infos.values())}, {form} {layout} names"
    for leaf in stored.unused:
        yield f"    {leaf.sources[0].name}: kept, but the network has no use for it"
    if verify:
        verify_numbers(stored)
        yield "    every number was read and is as it should be"


def _summary(infos: Iterable[TensorInfo]) -> str:
    infos = list(infos)
    types = Counter(info.dtype for info in infos)
    listed = ", ".join(f"{count} {code}" for code, count in types.most_common())
    return f"{len(infos)} tensors ({listed}), {size(sum(info.nbytes for info in infos))}"


def _lora(path: Path, model: Path | None) -> Iterator[str]:
    lora = read_adapter(path, layers_for(model, path))
    scales = Counter(f"{module.scale:g}" for module in lora.modules.values())
    listed = lambda counts: ", ".join(f"{value} ({count})" for value, count in counts.most_common())
    plain = [m for m in lora.modules.values() if isinstance(m, LoraModule)]
    kronecker = [m for m in lora.modules.values() if not isinstance(m, LoraModule)]
    kind = " and ".join(["LoRA"] * bool(plain) + ["LoKr"] * bool(kronecker))
    yield (
        f"{path}: {kind}, dialect {lora.dialect}, {lora.dtype}, {len(lora.modules)} layers adapted"
    )
    sizes = [f"rank {listed(Counter(module.rank for module in plain))}"] * bool(plain)
    if kronecker:
        small = Counter(f"{list(m.w1.shape)}" for m in kronecker)
        sizes.append(f"first factor {listed(small)}")
    yield f"  {'; '.join(sizes)}; scale {listed(scales)}"
    for key, value in sorted(lora.metadata.items()):
        yield "  " + one_line(f"{key}: {value if len(value) <= 80 else value[:77] + '...'}")


def _single(path: Path, files: TensorFiles, model: Path | None) -> Iterator[str]:
    """A file of one network. Without a model, only published transformers can be recognised.

    It is compared with every published size, and described by the one with the fewest faults.
    """
    yield f"{path}: {_summary(files.infos.values())}"
    candidates: list[tuple[Network, object, str]] = [
        (family.NETWORKS["transformer"], size, f" ({family.NAME} {name})")
        for family in families.every()
        for name, size in family.PUBLISHED.items()
    ]
    if model is not None:
        networks = families.of_folder(model).NETWORKS.values()
        candidates = [
            (network, read_config(model / network.component / converted.CONFIG, network)[0], "")
            for network in networks
            if not network.beside
        ]
    several = components(files.infos)
    if several:
        yield f"  holds several networks: {', '.join(sorted(several))}"
    closest: dict[str, tuple[str, tuple[str, ...]]] = {}  # what a network is called, its faults
    for network, config, size_name in candidates:
        try:
            plain = readable(files, network.component)
            found = recognise(str(path), plain.infos, network.layouts(config))
        except UserError:
            continue
        behind = f" behind {found.prefix!r}" if found.prefix else ""
        called = f"{network.component}{size_name} in {found.layout.name} names{behind}"
        key = network.component if several else ""
        faults = _faults(plain, found)
        if key not in closest or len(faults) < len(closest[key][1]):
            closest[key] = called, faults
    if not closest:
        advice = "" if model else "; --model names the model it belongs to"
        yield f"  of no network we know{advice}"
    for called, faults in closest.values():
        yield f"  {called}: {f'{len(faults)} faults' if faults else 'complete'}"
        yield from (f"    {problem}" for problem in few(faults))


def _faults(tensors: Tensors, found: Found) -> tuple[str, ...]:
    try:
        as_canonical(tensors, found)
    except UserError as error:
        return tuple(error.problems)
    return ()
