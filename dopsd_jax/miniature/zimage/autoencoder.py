"""The miniature Z-Image's autoencoder: one scale and one shift for all of a latent."""

import jax.numpy as jnp
from flax import nnx

from dopsd_jax.miniature.autoencoder import posterior_means
from dopsd_jax.miniature.zimage import configs
from dopsd_jax.models.autoencoder import Autoencoder
from dopsd_jax.models.autoencoder_config import AutoencoderConfig


def build(scaling: float = 1.0, shift: float = 0.0) -> Autoencoder:
    """The network, at random."""
    cfg = AutoencoderConfig.from_dict(configs.autoencoder(scaling, shift), "miniature")
    return Autoencoder(cfg, rngs=nnx.Rngs(0))


def normalized(model: Autoencoder, seed: int) -> Autoencoder:
    """The same network whose latents have mean 0 and deviation 1 over the world."""
    mean = posterior_means(model, seed)
    shift, deviation = float(jnp.mean(mean)), float(jnp.std(mean))
    graphdef, _ = nnx.split(build(1 / deviation, shift))
    return nnx.merge(graphdef, nnx.state(model))
