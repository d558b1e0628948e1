"""The miniature as a model folder in Hugging Face layout, written and read back."""

import json
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import dopsd_jax
from dopsd_jax.common.atomic import atomic_folder
from dopsd_jax.miniature import configs, optimizer
from dopsd_jax.miniature.configs import Size
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.models import autoencoder as vae_model
from dopsd_jax.models import qwen3, qwen3_vl, zimage
from dopsd_jax.models.names import Leaf, to_torch
from dopsd_jax.random_model import configs as random_configs
from dopsd_jax.random_model.tokenizer import QWEN3_TEMPLATE, QWEN3_VL_TEMPLATE, write_tokenizer
from dopsd_jax.weights.safetensors_write import write_sharded
from dopsd_jax.weights.tensors import DTYPES, ArrayTensors


def write_model(
    folder: Path, size: Size, parameters: Parameters, vae: vae_model.Autoencoder
) -> None:
    """Writes `folder`, which must not exist; types are the published ones.

    The folder `vlm` holds the vision tower, and the text encoder once more as its language model:
    the programs take the one from `text_encoder`, but transformers wants a whole model.
    """
    transformer, text, vlm, _ = configs.parsed(size)
    scale = {"scaling": vae.cfg.scaling_factor, "shift": vae.cfg.shift_factor}
    language = {k.removeprefix("text."): v for k, v in parameters.items() if k.startswith("text.")}
    vision = {k: v for k, v in parameters.items() if k.startswith("vision.")}
    both = vision | {f"language.{k}": v for k, v in language.items()}
    only = lambda room: {
        k.removeprefix(f"{room}."): v for k, v in parameters.items() if k.startswith(f"{room}.")
    }
    state = nnx.to_flat_state(nnx.split(vae)[1])
    of_vae = {".".join(map(str, path)): var[...] for path, var in state}
    with atomic_folder(folder) as partial:
        _json(partial / "model_index.json", random_configs.MODEL_INDEX)
        _json(partial / "scheduler" / "scheduler_config.json", random_configs.SCHEDULER)
        write_words(partial / "tokenizer", QWEN3_TEMPLATE, 131072)
        _network(
            partial / "transformer",
            configs.transformer(size),
            zimage.names(transformer),
            only("transformer"),
            "F32",
        )
        _network(
            partial / "vae",
            configs.autoencoder(**scale),
            vae_model.names(vae.cfg),
            of_vae,
            "BF16",
        )
        _network(
            partial / "text_encoder",
            configs.text_encoder(size),
            qwen3.names(text),
            language,
            "BF16",
        )
        _network(partial / "vlm", configs.vlm(size), qwen3_vl.names(vlm), both, "BF16")
        _json(partial / "vlm" / "preprocessor_config.json", configs.preprocessor())
        _json(partial / "vlm" / "chat_template.json", {"chat_template": QWEN3_VL_TEMPLATE})
        write_words(partial / "vlm", QWEN3_VL_TEMPLATE, 262144)


def read_model(folder: Path) -> tuple[Parameters, vae_model.Autoencoder]:
    """What `write_model` was given, but for rounding to the stored types."""
    pipe = dopsd_jax.load_pipeline(folder)
    rooms = {"transformer": pipe.transformer, "text": pipe.text_encoder, "vision": pipe.vlm}
    parameters = {}
    for room, network in rooms.items():
        named = optimizer.flat(network)[1]
        # By way of the host: arrays that were read are bound to one device.
        parameters |= {f"{room}.{k}": jnp.asarray(np.float32(v)) for k, v in named.items()}
    return parameters, pipe.vae


def write_words(folder: Path, template: str, max_length: int) -> None:
    """Writes the tokenizer's files."""
    write_tokenizer(folder, template, max_length, words=configs.words(), count=configs.MERGES)


def _network(
    folder: Path, config: dict, leaves: Iterable[Leaf], parameters: Parameters, dtype: str
) -> None:
    base = "diffusion_pytorch_model" if "_class_name" in config else "model"
    _json(folder / "config.json", config)
    tensors = {}
    for leaf in leaves:
        array = np.asarray(parameters[leaf.path])
        array = array if leaf.index is None else array[leaf.index]
        pieces = to_torch(leaf, array)
        for source, piece in zip(leaf.sources, pieces, strict=True):
            tensors[source.name] = np.ascontiguousarray(piece.astype(DTYPES[dtype]))
    write_sharded(folder, base, ArrayTensors(tensors), metadata={"format": "pt"})


def _json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
