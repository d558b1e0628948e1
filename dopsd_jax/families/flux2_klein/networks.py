"""The networks of a FLUX.2-klein model folder."""

import dataclasses

from dopsd_jax.families.flux2_klein import layouts
from dopsd_jax.families.texts import TEXT_ENCODER
from dopsd_jax.models import flux2, flux2_autoencoder, flux2_config
from dopsd_jax.weights.layouts import canonical
from dopsd_jax.weights.networks import DIFFUSERS_BASE, Network


def _transformer_layouts(config, leaves):
    # ComfyUI also reads the diffusers names behind its own prefix.
    behind_prefix = dataclasses.replace(
        canonical(leaves), name="prefixed", prefixes=layouts.PREFIXES[1:]
    )
    return [layouts.transformer(leaves), behind_prefix]


def _vae_layouts(config, leaves):
    levels, unused = len(config.block_out_channels), flux2_autoencoder.unused(config)
    return [layouts.autoencoder(leaves, levels, unused)]


PUBLISHED = {3072: "-4b", 4096: "-9b"}  # by width, as musubi-tuner names them
LICENCES = {3072: "Apache-2.0", 4096: "FLUX Non-Commercial License"}  # of their pages on the hub

NETWORKS = {
    "transformer": Network(
        "transformer",
        DIFFUSERS_BASE,
        flux2_config.Flux2Config.from_dict,
        lambda config, rngs: flux2.Flux2(config, rngs=rngs),
        flux2_config.names,
        others=_transformer_layouts,
        single=layouts.ORIGINAL,
        lora=lambda config: f"Flux.2-klein{PUBLISHED.get(config.dim, '')}/lora",
        licence=lambda config: LICENCES.get(config.dim, ""),
    ),
    "text_encoder": TEXT_ENCODER,
    "vae": Network(
        "vae",
        DIFFUSERS_BASE,
        flux2_autoencoder.Flux2AutoencoderConfig.from_dict,
        lambda config, rngs: flux2_autoencoder.Flux2Autoencoder(config, rngs=rngs),
        flux2_autoencoder.names,
        flux2_autoencoder.unused,
        _vae_layouts,
    ),
}
