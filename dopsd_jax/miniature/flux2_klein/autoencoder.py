"""The miniature FLUX.2-klein's autoencoder: latents are folded and normalized by channel."""

import jax.numpy as jnp
from flax import nnx

from dopsd_jax.miniature import optimizer
from dopsd_jax.miniature.autoencoder import posterior_means
from dopsd_jax.miniature.flux2_klein import configs
from dopsd_jax.models.autoencoder import Autoencoder
from dopsd_jax.models.flux2_autoencoder import Flux2Autoencoder


def build() -> Flux2Autoencoder:
    """The network, at random."""
    return Flux2Autoencoder(configs.autoencoder_config(), rngs=nnx.Rngs(0))


def of_zimage(vae: Autoencoder) -> Flux2Autoencoder:
    """The same convolutions; the two that Z-Image's has not change nothing. Not normalized."""
    own = build()
    _, parameters = optimizer.flat(own)
    for name in ("quant_conv", "post_quant_conv"):
        kernel = parameters[f"{name}.kernel"]
        parameters[f"{name}.kernel"] = jnp.eye(kernel.shape[-1])[None, None]
    return optimizer.merge(own, parameters | optimizer.flat(vae)[1])


def normalized(model: Flux2Autoencoder, seed: int) -> Flux2Autoencoder:
    """The same network whose latents have mean 0 and deviation 1 over the world, each channel."""
    channels = model.cfg.channels
    plain = {"mean": jnp.zeros(channels), "variance": jnp.ones(channels)}
    parameters = optimizer.flat(model)[1] | plain
    latents = optimizer.merge(model, parameters).to_latent(posterior_means(model, seed))
    # As they are used: the variance has the normalization's eps added to it.
    scale, eps = 1 + model.cfg.batch_norm_eps, model.cfg.batch_norm_eps
    statistics = {
        "mean": jnp.mean(latents, (0, 1, 2)) * scale**0.5,
        "variance": jnp.var(latents, (0, 1, 2)) * scale - eps,
    }
    return optimizer.merge(model, parameters | statistics)
