"""Sizes of the trained miniature Z-Image, in the published configuration files' own keys."""

import dataclasses

from dopsd_jax.miniature import captions
from dopsd_jax.miniature.render import SIDE
from dopsd_jax.models import qwen3, qwen3_vl, zimage_config
from dopsd_jax.models.autoencoder_config import AutoencoderConfig
from dopsd_jax.random_model import configs as random_configs
from dopsd_jax.random_model.tokenizer import added_ids

MERGES = 400  # pairs that the tokenizer merges: every word of the grammar is one token
IDS = added_ids(MERGES)
VOCABULARY = 704
LATENT_CHANNELS = 8
FACTOR = 4
PATCH = 2
IMAGE_PATCH = 8  # pixels: one image token in the context for each of the transformer's


@dataclasses.dataclass(frozen=True)
class Size:
    """Widths and depths; `axes` are the rotary axes of a head of the transformer."""

    dim: int = 96
    layers: int = 6
    refiner_layers: int = 1
    heads: int = 4
    axes: tuple[int, int, int] = (8, 8, 8)
    text_dim: int = 96
    text_layers: int = 4
    vision_dim: int = 96
    vision_layers: int = 2


_RANDOM = random_configs.Size()


def autoencoder(scaling: float = 1.0, shift: float = 0.0) -> dict:
    """vae/config.json: three levels, so a latent has a quarter of the picture's side."""
    widths = [16, 32, 64]
    return {
        **random_configs.autoencoder(_RANDOM),
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "latent_channels": LATENT_CHANNELS,
        "layers_per_block": 1,
        "mid_block_add_attention": False,
        "scaling_factor": scaling,
        "shift_factor": shift,
    }


def transformer(size: Size) -> dict:
    """transformer/config.json."""
    return {
        **random_configs.transformer(_RANDOM),
        "all_patch_size": [PATCH],
        "axes_dims": list(size.axes),
        "cap_feat_dim": size.text_dim,
        "dim": size.dim,
        "in_channels": LATENT_CHANNELS,
        "n_heads": size.heads,
        "n_kv_heads": size.heads,
        "n_layers": size.layers,
        "n_refiner_layers": size.refiner_layers,
        "rope_theta": 32.0,  # positions go to 8, not to 64
    }


def text_encoder(size: Size) -> dict:
    """text_encoder/config.json."""
    return {**random_configs.text_encoder(_RANDOM), **_language(size)}


def vlm(size: Size) -> dict:
    """vlm/config.json: its language model has the text encoder's sizes."""
    base = random_configs.vlm(_RANDOM)
    text = {**base["text_config"], **_language(size)}
    text["rope_scaling"] = {**text["rope_scaling"], "mrope_section": [4, 4, 4]}
    vision = {
        **base["vision_config"],
        "deepstack_visual_indexes": [0],
        "depth": size.vision_layers,
        "hidden_size": size.vision_dim,
        "intermediate_size": 2 * size.vision_dim,
        "num_heads": 4,
        "num_position_embeddings": (SIDE // IMAGE_PATCH) ** 2,
        "out_hidden_size": size.text_dim,
        "patch_size": IMAGE_PATCH,
        "spatial_merge_size": 1,
    }
    tokens = {
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
    }
    return {**base, **tokens, "text_config": text, "vision_config": vision}


def preprocessor() -> dict:
    """vlm/preprocessor_config.json."""
    return {
        **random_configs.PREPROCESSOR,
        "size": {"longest_edge": SIDE**2, "shortest_edge": SIDE**2},
        "patch_size": IMAGE_PATCH,
        "merge_size": 1,
    }


def _language(size: Size) -> dict:
    return {
        "bos_token_id": IDS["<|endoftext|>"],
        "eos_token_id": IDS["<|im_end|>"],
        "head_dim": 24,
        "hidden_size": size.text_dim,
        "intermediate_size": 2 * size.text_dim,
        "num_attention_heads": 4,
        "num_hidden_layers": size.text_layers,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    }


def parsed(size: Size, scaling: float = 1.0, shift: float = 0.0):
    """The configurations as the networks take them: transformer, encoder, VLM, autoencoder."""
    return (
        zimage_config.ZImageConfig.from_dict(transformer(size), "miniature"),
        qwen3.Qwen3Config.from_dict(text_encoder(size), "miniature"),
        qwen3_vl.Qwen3VLConfig.from_dict(vlm(size), "miniature"),
        AutoencoderConfig.from_dict(autoencoder(scaling, shift), "miniature"),
    )


def words() -> list[str]:
    """What the tokenizer's merges are learned from."""
    return captions.vocabulary()
