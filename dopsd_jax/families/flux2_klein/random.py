"""A small FLUX.2-klein with random weights, laid out as the published folder is."""

import os
from pathlib import Path

from dopsd_jax.families.flux2_klein.networks import NETWORKS
from dopsd_jax.models.flux2_autoencoder import FOLD
from dopsd_jax.models.flux2_config import Flux2Config
from dopsd_jax.random_model import configs, write_json, write_network
from dopsd_jax.random_model.tokenizer import QWEN3_TEMPLATE, write_tokenizer

LAYERS = 27  # of the text encoder: the features are those of layers 9, 18 and 27
LATENT_CHANNELS = 4
SIZE = configs.Size(text_layers=LAYERS + 1, text_dim=32)

MODEL_INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "_diffusers_version": "0.37.0",
    "is_distilled": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.37.0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


def random_size() -> Flux2Config:
    """The transformer's."""
    return Flux2Config(
        heads=4,
        head_dim=16,
        double_layers=2,
        single_layers=2,
        channels=LATENT_CHANNELS * FOLD**2,
        text_dim=3 * SIZE.text_dim,
        axes_dims=(4, 4, 4, 4),
        time_frequencies=32,
    )


def autoencoder() -> dict:
    """Its config.json."""
    shared = configs.autoencoder(SIZE)
    gone = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {name: value for name, value in shared.items() if name not in gone} | {
        "_class_name": "AutoencoderKLFlux2",
        "batch_norm_eps": 0.0001,
        "batch_norm_momentum": 0.1,
        "latent_channels": LATENT_CHANNELS,
        "patch_size": [FOLD, FOLD],
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    }


def write_random_model(folder: str | os.PathLike, seed: int = 0) -> Path:
    """Writes it into `folder` (made if need be) and returns it. One seed gives the same bytes."""
    folder = Path(folder)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_tokenizer(folder / "tokenizer", QWEN3_TEMPLATE, max_length=131072)
    parts = {
        "transformer": (random_size().to_dict(), "F32"),
        "text_encoder": (configs.text_encoder(SIZE), "BF16"),
        "vae": (autoencoder(), "BF16"),
    }
    for name, (config, dtype) in parts.items():
        network = NETWORKS[name]
        size = network.read_config(config, name)
        counters = network.unused(size) if name == "vae" else ()
        write_network(folder / name, config, network.names(size), dtype, seed, counters)
    # The last: a folder that has it is whole.
    write_json(folder / "model_index.json", MODEL_INDEX)
    return folder
