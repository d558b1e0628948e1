"""A miniature's networks in a model folder of Hugging Face layout."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax.miniature import optimizer
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.models.names import Leaf, Source, to_torch
from dopsd_jax.random_model import write_json
from dopsd_jax.weights.safetensors_write import write_sharded
from dopsd_jax.weights.tensors import DTYPES, ArrayTensors


def part(parameters: Parameters, room: str) -> Parameters:
    """The parameters of one network, by their names within it."""
    own = f"{room}."
    return {k.removeprefix(own): v for k, v in parameters.items() if k.startswith(own)}


def read_parts(rooms: Mapping[str, nnx.Module]) -> Parameters:
    """The parameters of loaded networks, by room and name."""
    parameters = {}
    for room, network in rooms.items():
        named = optimizer.flat(network)[1]
        # By way of the host: arrays that were read are bound to one device.
        parameters |= {f"{room}.{k}": jnp.asarray(np.float32(v)) for k, v in named.items()}
    return parameters


def write_network(
    folder: Path,
    config: dict,
    leaves: Iterable[Leaf],
    parameters: Parameters,
    dtype: str,
    counters: Iterable[Source] = (),
) -> None:
    """A network's folder. `counters`: whole numbers that stand beside the weights, all zero."""
    base = "diffusion_pytorch_model" if "_class_name" in config else "model"
    write_json(folder / "config.json", config)
    tensors = {source.name: np.zeros(source.shape, np.int64) for source in counters}
    for leaf in leaves:
        array = np.asarray(parameters[leaf.path])
        array = array if leaf.index is None else array[leaf.index]
        pieces = to_torch(leaf, array)
        for source, piece in zip(leaf.sources, pieces, strict=True):
            tensors[source.name] = np.ascontiguousarray(piece.astype(DTYPES[dtype]))
    write_sharded(folder, base, ArrayTensors(tensors), metadata={"format": "pt"})
