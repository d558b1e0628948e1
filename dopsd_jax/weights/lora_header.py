"""The header strings of a LoRA file, under the names that other programs show.

`modelspec.` is the SAI model spec, `ss_` is kohya's, `dopsd_jax.` is our own. Loaders do not need
any of them.
"""

import json
from collections.abc import Mapping

from dopsd_jax.weights.lokr import LokrModule
from dopsd_jax.weights.lora_dialects import Layers
from dopsd_jax.weights.lora_files import Module
from dopsd_jax.weights.lora_settings import ALPHAS, BASE, HEADER, OWN, RANKS

KEPT = ("modelspec.", "ss_", OWN)  # beginnings of the strings that a rewritten file keeps
# What a rewritten file must not keep: it was said of the source's tensors.
NETWORK = tuple(f"ss_network_{name}" for name in ("module", "args", "dim", "alpha"))
STALE = (*ALPHAS, *RANKS, *NETWORK, HEADER, "modelspec.hash_sha256")


def kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """The strings of a source that are still true of the file that it is rewritten to."""
    return {k: v for k, v in metadata.items() if k.startswith(KEPT) and k not in STALE}


def header(
    title: str, modules: Mapping[str, Module], layers: Layers, given: Mapping[str, str]
) -> dict[str, str]:
    """The strings of a file with these adapters; those `given` go before what is known anyway."""
    found = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": layers.architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "ss_output_name": title,
        "ss_base_model_version": layers.architecture.removesuffix("/lora"),
    }
    if layers.licence:
        found["modelspec.license"] = f"of the base model: {layers.licence}"
    found |= {name: text for name, text in given.items() if name not in STALE}
    if layers.config is not None:
        found[BASE] = json.dumps(dict(layers.config), sort_keys=True)
    return found | _network(modules)


def _network(modules: Mapping[str, Module]) -> dict[str, str]:
    """Rank and alpha, where all layers have the same: the field has one number for a file."""
    found = {"ss_network_module": "networks.lora"}
    kronecker = [m for m in modules.values() if isinstance(m, LokrModule)]
    if kronecker:
        factor = max(max(module.w1.shape) for module in kronecker)
        arguments = {"algo": "lokr", "factor": str(factor)}
        found = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}
    # Of a LoKr whose second factors are whole there is none.
    sizes = {(m.rank, f"{m.scale * m.rank:g}") for m in modules.values() if m.rank}
    if len(sizes) == 1:
        ((rank, alpha),) = sizes
        found |= {"ss_network_dim": str(rank), "ss_network_alpha": alpha}
    return found
