"""A small Z-Image-Turbo with random weights, laid out as the published folder is.

For tests and for configs/zimage.py:random. Everything that takes a
model folder takes this one; so do diffusers and transformers. Its pictures are noise.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dopsd_jax.models import autoencoder, qwen3, qwen3_vl, zimage_config
from dopsd_jax.models.autoencoder_config import AutoencoderConfig
from dopsd_jax.models.names import Leaf, Source
from dopsd_jax.random_model import configs
from dopsd_jax.random_model.configs import Size
from dopsd_jax.random_model.tokenizer import QWEN3_TEMPLATE, QWEN3_VL_TEMPLATE, write_tokenizer
from dopsd_jax.weights.safetensors_write import write_sharded
from dopsd_jax.weights.tensors import DTYPES, ArrayTensors

__all__ = ["Size", "write_json", "write_network", "write_random_model"]


def write_random_model(folder: str | os.PathLike, seed: int = 0, size: Size | None = None) -> Path:
    """Writes the random model into `folder` (made if need be) and returns it.

    One seed and size give the same bytes. Types are the published ones: the transformer float32,
    everything else bfloat16. Beside the published folders stands `vlm`, a small Qwen3-VL
    with a language model of its own.
    """
    folder, size = Path(folder), size or Size()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", configs.SCHEDULER)
    write_tokenizer(folder / "tokenizer", QWEN3_TEMPLATE, max_length=131072)

    config = configs.transformer(size)
    leaves = zimage_config.names(zimage_config.ZImageConfig.from_dict(config, "transformer"))
    write_network(folder / "transformer", config, leaves, "F32", seed)

    config = configs.autoencoder(size)
    leaves = autoencoder.names(AutoencoderConfig.from_dict(config, "vae"))
    write_network(folder / "vae", config, leaves, "BF16", seed)

    config = configs.text_encoder(size)
    leaves = qwen3.names(qwen3.Qwen3Config.from_dict(config, "text_encoder"))
    write_network(folder / "text_encoder", config, leaves, "BF16", seed)

    config = configs.vlm(size)
    leaves = qwen3_vl.names(qwen3_vl.Qwen3VLConfig.from_dict(config, "vlm"))
    write_network(folder / "vlm", config, leaves, "BF16", seed)
    write_json(folder / "vlm" / "preprocessor_config.json", configs.PREPROCESSOR)
    write_json(folder / "vlm" / "chat_template.json", {"chat_template": QWEN3_VL_TEMPLATE})
    write_tokenizer(folder / "vlm", QWEN3_VL_TEMPLATE, max_length=262144)
    # The last: a folder that has it is whole.
    write_json(folder / "model_index.json", configs.MODEL_INDEX)
    return folder


def write_network(
    folder: Path,
    config: dict,
    leaves: Iterable[Leaf],
    dtype: str,
    seed: int,
    counters: Iterable[Source] = (),
) -> None:
    """A network's folder: `config` and weights drawn from `seed` and their names.

    `counters`: whole numbers that stand beside the weights, all zero.
    """
    base = "diffusion_pytorch_model" if "_class_name" in config else "model"
    write_json(folder / "config.json", config)
    tensors = {
        source.name: _draw(f"{folder.name}/{source.name}", source.shape, seed).astype(DTYPES[dtype])
        for leaf in leaves
        for source in leaf.sources
    }
    tensors |= {source.name: np.zeros(source.shape, np.int64) for source in counters}
    write_sharded(folder, base, ArrayTensors(tensors), metadata={"format": "pt"})


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A random tensor that keeps activations near unit size and leaves nothing idle."""
    x = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if len(shape) == 1 and name.endswith(".weight"):  # of a norm
        return 1 + 0.1 * x
    if name.endswith("running_var"):
        return 1 + 0.1 * x**2
    if len(shape) == 1:
        # Gates that are tanh of little more than a bias: far enough from zero to matter.
        return (0.5 if "adaLN_modulation" in name else 0.1) * x
    if "embed_tokens" in name or "pos_embed" in name or "pad_token" in name:
        return x
    return x / math.sqrt(math.prod(shape[1:]))


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
