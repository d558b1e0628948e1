"""FLUX.2's autoencoder: AutoencoderKL, with latents folded 2 x 2 and normalised by channel.

Dimension names: b batch, h w rows and columns of a latent, z channels that the decoder takes,
c = 4 z. Facts: the published checkpoints and diffusers 0.42.1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dopsd_jax.common.json_fields import Fields
from dopsd_jax.models import autoencoder
from dopsd_jax.models.autoencoder import Autoencoder
from dopsd_jax.models.autoencoder_config import AutoencoderConfig
from dopsd_jax.models.names import Leaf, Source, vector

FOLD = 2  # cells a side of z that make one of the latent


@dataclasses.dataclass(frozen=True)
class Flux2AutoencoderConfig(AutoencoderConfig):
    """What the network is; the fields are named as in the file."""

    batch_norm_eps: float = 1e-4

    @property
    def factor(self) -> int:
        """Image side over latent side."""
        return self.stride * FOLD

    @property
    def channels(self) -> int:
        """Of the latent."""
        return self.latent_channels * FOLD**2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "Flux2AutoencoderConfig":
        """Reads a config.json; see `AutoencoderConfig.from_dict`."""
        fields = Fields(config, where)
        fields.only("_class_name", "AutoencoderKLFlux2")
        if fields.counts("patch_size", 2) != (FOLD, FOLD):
            fields.problem(f"patch_size must be [{FOLD}, {FOLD}]")
        eps = fields.positive("batch_norm_eps")
        own = {"batch_norm_eps": eps, "scaling_factor": 1.0}
        return cls.read(fields, own, ("patch_size", "batch_norm_momentum", *own))


class Flux2Autoencoder(Autoencoder):
    """See `Autoencoder`; the statistics stand in the checkpoint."""

    def __init__(self, cfg: Flux2AutoencoderConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.mean = nnx.Param(jnp.zeros((cfg.channels,)))
        self.variance = nnx.Param(jnp.ones((cfg.channels,)))

    def to_latent(self, z: Float[Array, "b h2 w2 z"]) -> Float[Array, "b h w c"]:
        """The latent that the transformer sees; its channel is z * 4 + row * 2 + column."""
        b, h, w, channels = z.shape
        cells = z.reshape(b, h // FOLD, FOLD, w // FOLD, FOLD, channels)
        folded = cells.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // FOLD, w // FOLD, -1)
        mean, deviation = self._statistics(z.dtype)
        return (folded - mean) / deviation

    def from_latent(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 z"]:
        """Inverse of `to_latent`."""
        mean, deviation = self._statistics(latent.dtype)
        b, h, w, _ = latent.shape
        cells = (latent * deviation + mean).reshape(b, h, w, -1, FOLD, FOLD)
        return cells.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * FOLD, w * FOLD, -1)

    def _statistics(self, dtype) -> tuple[Array, Array]:
        # Rounded to the latents' type before use, as in diffusers.
        variance = self.variance[...].astype(jnp.float32)
        deviation = jnp.sqrt(variance + self.cfg.batch_norm_eps)
        return self.mean[...].astype(dtype), deviation.astype(dtype)


def names(cfg: Flux2AutoencoderConfig) -> list[Leaf]:
    """Every parameter and the diffusers tensors it is made of."""
    return [
        *autoencoder.names(cfg),
        vector("mean", None, "bn.running_mean", cfg.channels),
        vector("variance", None, "bn.running_var", cfg.channels, low=0.0),
    ]


def unused(cfg: Flux2AutoencoderConfig) -> list[Source]:
    """A counter of the makers' training."""
    return [Source("bn.num_batches_tracked", ())]
