"""The networks of a FLUX.2-klein model folder."""

from dopsd_jax.families.texts import TEXT_ENCODER
from dopsd_jax.models import flux2, flux2_autoencoder, flux2_config
from dopsd_jax.weights.networks import DIFFUSERS_BASE, Network

NETWORKS = {
    "transformer": Network(
        "transformer",
        DIFFUSERS_BASE,
        flux2_config.Flux2Config.from_dict,
        lambda config, rngs: flux2.Flux2(config, rngs=rngs),
        flux2_config.names,
        lora="flux-2-klein/lora",
    ),
    "text_encoder": TEXT_ENCODER,
    "vae": Network(
        "vae",
        DIFFUSERS_BASE,
        flux2_autoencoder.Flux2AutoencoderConfig.from_dict,
        lambda config, rngs: flux2_autoencoder.Flux2Autoencoder(config, rngs=rngs),
        flux2_autoencoder.names,
        flux2_autoencoder.unused,
    ),
}
