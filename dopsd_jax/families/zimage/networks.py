"""The networks of a Z-Image model folder, and every name their tensors have."""

import dataclasses
from collections.abc import Sequence

from dopsd_jax.families.texts import TEXT_ENCODER
from dopsd_jax.families.zimage import layouts
from dopsd_jax.models import autoencoder, qwen3_vl, zimage, zimage_config
from dopsd_jax.models.names import Leaf
from dopsd_jax.weights import layouts_vae
from dopsd_jax.weights.layouts import Layout, canonical
from dopsd_jax.weights.networks import DIFFUSERS_BASE, TRANSFORMERS_BASE, Network


def _zimage_layouts(config: zimage_config.ZImageConfig, leaves: Sequence[Leaf]) -> list[Layout]:
    # ComfyUI also reads the diffusers names behind its own prefix.
    behind_prefix = dataclasses.replace(
        canonical(leaves), name="prefixed", prefixes=layouts.PREFIXES[1:]
    )
    return [layouts.original(leaves, config.dim), behind_prefix]


def _vae_layouts(config: autoencoder.AutoencoderConfig, leaves: Sequence[Leaf]) -> list[Layout]:
    return [layouts_vae.original(leaves, len(config.block_out_channels))]


ZIMAGE = {
    "transformer": Network(
        "transformer",
        DIFFUSERS_BASE,
        zimage_config.ZImageConfig.from_dict,
        lambda config, rngs: zimage.ZImage(config, rngs=rngs),
        zimage_config.names,
        others=_zimage_layouts,
        single=layouts.ORIGINAL,
        lora=lambda config: "Z-Image/lora",  # SAI model spec, as musubi-tuner writes it
        licence=lambda config: "Apache-2.0" if config == zimage_config.ZImageConfig() else "",
    ),
    "text_encoder": TEXT_ENCODER,
    "vae": Network(
        "vae",
        DIFFUSERS_BASE,
        autoencoder.AutoencoderConfig.from_dict,
        lambda config, rngs: autoencoder.Autoencoder(config, rngs=rngs),
        autoencoder.names,
        others=_vae_layouts,
    ),
}
# Not a part of the pipeline: it writes the teacher's context. Vision tower and language model are
# separate attributes; `load_component(..., room="vision")` loads one of them.
VLM = Network(
    "vlm",
    TRANSFORMERS_BASE,
    qwen3_vl.Qwen3VLConfig.from_dict,
    lambda config, rngs: qwen3_vl.Qwen3VL(config, rngs=rngs),
    qwen3_vl.names,
    qwen3_vl.unused,
    beside=True,
)
NETWORKS = {**ZIMAGE, "vlm": VLM}
