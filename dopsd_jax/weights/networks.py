"""What is needed to read and write a network's weights; a family lists its networks."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from dopsd_jax.models.names import Leaf, Source
from dopsd_jax.weights.layouts import Layout, canonical

DIFFUSERS_BASE = "diffusion_pytorch_model"
TRANSFORMERS_BASE = "model"


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a family.

    A model is a mapping from components to networks: `transformer`, `vae`, text encoders.

    Attributes:
      component: the folder of the model that holds it.
      base: its weight files' name there, without `.safetensors`.
      read_config: JSON content of config.json and the file's name -> the network's config.
      build: config and random numbers -> the nnx module.
      names: config -> the correspondence of names.
      unused: config -> tensors that may be in a checkpoint but that the module has no use for.
      others: config and leaves -> layouts besides the canonical one.
      single: name of the layout of the authors' single file, if that is one of them.
      lora: config -> `modelspec.architecture` of LoRA files for it.
      licence: config -> the licence of the published weights of this size; "": none are published.
      beside: whether a model is complete without it, as published ones have no such folder.
    """

    component: str
    base: str
    read_config: Callable[[Mapping, str], Any]
    build: Callable[[Any, nnx.Rngs], nnx.Module]
    names: Callable[[Any], list[Leaf]]
    unused: Callable[[Any], Sequence[Source]] = lambda config: ()
    others: Callable[[Any, Sequence[Leaf]], Sequence[Layout]] = lambda config, leaves: ()
    single: str | None = None
    lora: Callable[[Any], str] = lambda config: ""
    licence: Callable[[Any], str] = lambda config: ""
    beside: bool = False

    def layouts(self, config: Any) -> list[Layout]:
        """Every layout in which the network's tensors are found; the canonical one first."""
        leaves = self.names(config)
        return [canonical(leaves, self.unused(config)), *self.others(config, leaves)]


def present(networks: Mapping[str, Network], folder: Path) -> dict[str, Network]:
    """The networks that a model folder must have, and those beside them that it does have."""
    return {
        name: network
        for name, network in networks.items()
        if not network.beside or (folder / name).is_dir()
    }
