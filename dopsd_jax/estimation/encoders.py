"""What the encoders need before the first step, when the transformer is not loaded yet."""

import math
import os

import jax.numpy as jnp
from ml_collections import ConfigDict

from dopsd_jax.common.files import expand
from dopsd_jax.data.prepared_parts import names_prepared
from dopsd_jax.estimation.abstract_step import Workload
from dopsd_jax.weights.stored import read_config

STORED = "bfloat16"  # the type of the published text encoders
# Beside the text encoder: vision tower, autoencoder, and the activations of a few captions.
BESIDE = 1.5 * 2**30
ELSEWHERE = (
    "it does not fit: encode on the CPU, JAX_PLATFORMS=cpu python -m dopsd_jax.prepare, and train "
    "on what that writes (docs/gpus.md)"
)


def text_encoder(config: ConfigDict, case: Workload) -> int | None:
    """Bytes of the text encoder's weights; None if they are not known.

    It is that of the published model where the transformer is, else of the folder config.model.
    """
    family = case.family
    network = family.NETWORKS.get("text_encoder")
    known = (i for i, size in family.PUBLISHED.items() if size == case.size)
    size = family.TEXT_ENCODERS.get(next(known, ""))
    path = expand(config.model) / "text_encoder" / "config.json"
    if network and size is None and os.path.isfile(path):
        size = read_config(path, network)[0]
    if network is None or size is None:
        return None
    numbers = sum(math.prod(leaf.shape) for leaf in network.names(size))
    return numbers * jnp.dtype(STORED).itemsize


def fits(weights: int, capacity: float) -> bool:
    """Whether a device has room to encode."""
    return weights + BESIDE <= capacity


def describe(config: ConfigDict, case: Workload, capacity: float | None) -> list[str]:
    """A line about it, if captions are encoded in the run."""
    weights = text_encoder(config, case)
    if weights is None or names_prepared(config.data.path):
        return []
    line = f"before the first step: {weights / 2**30:.2f} GiB of text encoder"
    if capacity and not fits(weights, capacity):
        line += f", and up to {BESIDE / 2**30:.1f} beside it; {ELSEWHERE}"
    return [line]
