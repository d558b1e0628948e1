"""Which network reads which folder of a model, and the names its tensors may have."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from dopsd_jax.models import autoencoder, qwen3, qwen3_vl, zimage
from dopsd_jax.models.names import Leaf, Source
from dopsd_jax.weights import layouts_vae, layouts_zimage
from dopsd_jax.weights.layouts import Layout, canonical, renamed

DIFFUSERS_BASE = "diffusion_pytorch_model"
TRANSFORMERS_BASE = "model"


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a family.

    Attributes:
      component: the folder of the model that holds it.
      base: its weight files' name there, without `.safetensors`.
      read_config: JSON content of config.json and the file's name -> the network's config.
      build: config and random numbers -> the nnx module.
      names: config -> the correspondence of names.
      unused: config -> tensors that may be in a checkpoint but that the module has no use for.
      others: config and leaves -> layouts besides the canonical one.
      single: name of the layout of the authors' single file, if that is one of them.
    """

    component: str
    base: str
    read_config: Callable[[Mapping, str], Any]
    build: Callable[[Any, nnx.Rngs], nnx.Module]
    names: Callable[[Any], list[Leaf]]
    unused: Callable[[Any], Sequence[Source]] = lambda config: ()
    others: Callable[[Any, Sequence[Leaf]], Sequence[Layout]] = lambda config, leaves: ()
    single: str | None = None

    def layouts(self, config: Any) -> list[Layout]:
        """Every layout in which the network's tensors are found; the canonical one first."""
        leaves = self.names(config)
        return [canonical(leaves, self.unused(config)), *self.others(config, leaves)]


def _zimage_layouts(config: zimage.ZImageConfig, leaves: Sequence[Leaf]) -> list[Layout]:
    # ComfyUI also reads the diffusers names behind its own prefix.
    behind_prefix = dataclasses.replace(
        canonical(leaves), name="prefixed", prefixes=layouts_zimage.PREFIXES[1:]
    )
    return [layouts_zimage.original(leaves, config.dim), behind_prefix]


def _qwen3_layouts(config: qwen3.Qwen3Config, leaves: Sequence[Leaf]) -> list[Layout]:
    # Qwen3Model saves without the `model.` that Qwen3ForCausalLM puts in front.
    return [renamed("bare", canonical(leaves), {"model.": ""})]


def _vae_layouts(config: autoencoder.AutoencoderConfig, leaves: Sequence[Leaf]) -> list[Layout]:
    return [layouts_vae.original(leaves, len(config.block_out_channels))]


ZIMAGE = {
    "transformer": Network(
        "transformer",
        DIFFUSERS_BASE,
        zimage.ZImageConfig.from_dict,
        lambda config, rngs: zimage.ZImage(config, rngs=rngs),
        zimage.names,
        others=_zimage_layouts,
        single=layouts_zimage.ORIGINAL,
    ),
    "text_encoder": Network(
        "text_encoder",
        TRANSFORMERS_BASE,
        qwen3.Qwen3Config.from_dict,
        lambda config, rngs: qwen3.Qwen3(config, rngs=rngs),
        qwen3.names,
        qwen3.unused,
        _qwen3_layouts,
    ),
    "vae": Network(
        "vae",
        DIFFUSERS_BASE,
        autoencoder.AutoencoderConfig.from_dict,
        lambda config, rngs: autoencoder.Autoencoder(config, rngs=rngs),
        autoencoder.names,
        others=_vae_layouts,
    ),
}
FAMILIES = {"zimage": ZIMAGE}

# Not a part of any pipeline: it writes the teacher's context. Vision tower and language model are
# separate attributes; `load_component(..., room="vision")` loads one of them.
VLM = Network(
    "vlm",
    TRANSFORMERS_BASE,
    qwen3_vl.Qwen3VLConfig.from_dict,
    lambda config, rngs: qwen3_vl.Qwen3VL(config, rngs=rngs),
    qwen3_vl.names,
    qwen3_vl.unused,
)
