"""The configuration files of the random model, with the keys of the published ones."""

import dataclasses

from dopsd_jax.random_model.tokenizer import IDS, VOCABULARY


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the random model; the defaults make a folder of about five megabytes.

    `axes` are the rotary axes of the transformer, even numbers that add up to dim / heads. The
    VLM's language model has the sizes of the text encoder: the method swaps one for the other.
    """

    dim: int = 64
    layers: int = 3
    refiner_layers: int = 2
    heads: int = 4
    axes: tuple[int, int, int] = (4, 6, 6)
    latent_channels: int = 16
    text_dim: int = 64
    text_layers: int = 4
    vae_channels: tuple[int, int, int, int] = (16, 32, 32, 32)

    def __post_init__(self):
        if self.dim != self.heads * sum(self.axes) or any(a % 2 for a in self.axes):
            raise ValueError(f"axes {self.axes} must be even, with sum dim / heads")
        if self.text_layers < len(DEEPSTACK) + 2:
            raise ValueError(f"text_layers {self.text_layers}: at least {len(DEEPSTACK) + 2}")


TEXT_HEAD_DIM = 24
ROPE_SECTIONS = [6, 3, 3]  # of TEXT_HEAD_DIM / 2 frequencies: time, row, column
DEEPSTACK = [0, 1]

MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": "0.36.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.36.0",
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "shift": 3.0,
}

# The area bounds are small, so that a picture is few vision tokens (one for each 32 x 32 pixels).
PREPROCESSOR = {
    "size": {"longest_edge": 128 * 128, "shortest_edge": 64 * 64},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def transformer(size: Size) -> dict:
    return {
        "_class_name": "ZImageTransformer2DModel",
        "_diffusers_version": "0.36.0",
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "axes_dims": list(size.axes),
        "axes_lens": [1536, 512, 512],
        "cap_feat_dim": size.text_dim,
        "dim": size.dim,
        "in_channels": size.latent_channels,
        "n_heads": size.heads,
        "n_kv_heads": size.heads,
        "n_layers": size.layers,
        "n_refiner_layers": size.refiner_layers,
        "norm_eps": 1e-05,
        "qk_norm": True,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
    }


def text_encoder(size: Size) -> dict:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "rope_scaling": None,
        "rope_theta": 1000000,
        "max_position_embeddings": 40960,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": size.text_layers,
        "torch_dtype": "bfloat16",
        **_language(size),
    }


def vlm(size: Size) -> dict:
    text = {
        "model_type": "qwen3_vl_text",
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": ROPE_SECTIONS,
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "max_position_embeddings": 262144,
        "dtype": "bfloat16",
        **_language(size),
    }
    vision = {
        "deepstack_visual_indexes": DEEPSTACK,
        "depth": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "model_type": "qwen3_vl",
        "num_heads": 2,
        "num_position_embeddings": 36,
        "out_hidden_size": size.text_dim,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": IDS["<|image_pad|>"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "tie_word_embeddings": True,
        "video_token_id": IDS["<|video_pad|>"],
        "vision_config": vision,
        "vision_end_token_id": IDS["<|vision_end|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
    }


def autoencoder(size: Size) -> dict:
    levels = len(size.vae_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.36.0",
        "act_fn": "silu",
        "block_out_channels": list(size.vae_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": size.latent_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": 1,
        "mid_block_add_attention": True,
        "norm_num_groups": 8,
        "out_channels": 3,
        "sample_size": 64,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def _language(size: Size) -> dict:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": IDS["<|endoftext|>"],
        "eos_token_id": IDS["<|im_end|>"],
        "head_dim": TEXT_HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": size.text_dim,
        "initializer_range": 0.02,
        "intermediate_size": 2 * size.text_dim,
        "num_attention_heads": 4,
        "num_hidden_layers": size.text_layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }
