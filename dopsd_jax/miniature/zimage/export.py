"""The miniature Z-Image as a model folder in Hugging Face layout, written and read back."""

from pathlib import Path

import dopsd_jax
from dopsd_jax.common.atomic import atomic_folder
from dopsd_jax.miniature import optimizer
from dopsd_jax.miniature.files import part, read_parts, write_network
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.zimage import configs
from dopsd_jax.miniature.zimage.configs import Size
from dopsd_jax.models import autoencoder as vae_model
from dopsd_jax.models import qwen3, qwen3_vl, zimage_config
from dopsd_jax.random_model import configs as random_configs
from dopsd_jax.random_model import write_json
from dopsd_jax.random_model.tokenizer import QWEN3_TEMPLATE, QWEN3_VL_TEMPLATE, write_tokenizer


def write_model(
    folder: Path, size: Size, parameters: Parameters, vae: vae_model.Autoencoder
) -> None:
    """Writes `folder`, which must not exist; types are the published ones.

    The folder `vlm` holds the vision tower, and the text encoder once more as its language model:
    the programs take the one from `text_encoder`, but transformers wants a whole model.
    """
    transformer, text, vlm, _ = configs.parsed(size)
    of_vae = configs.autoencoder(vae.cfg.scaling_factor, vae.cfg.shift_factor)
    of_text, language = configs.text_encoder(size), part(parameters, "text")
    both = {f"vision.{k}": v for k, v in part(parameters, "vision").items()}
    both |= {f"language.{k}": v for k, v in language.items()}
    drawn = part(parameters, "transformer")
    with atomic_folder(folder) as partial:
        write_json(partial / "model_index.json", random_configs.MODEL_INDEX)
        write_json(partial / "scheduler" / "scheduler_config.json", random_configs.SCHEDULER)
        write_words(partial / "tokenizer")
        leaves_of = zimage_config.names(transformer)
        for room, config, leaves, weights, dtype in (
            ("transformer", configs.transformer(size), leaves_of, drawn, "F32"),
            ("vae", of_vae, vae_model.names(vae.cfg), optimizer.flat(vae)[1], "BF16"),
            ("text_encoder", of_text, qwen3.names(text), language, "BF16"),
            ("vlm", configs.vlm(size), qwen3_vl.names(vlm), both, "BF16"),
        ):
            write_network(partial / room, config, leaves, weights, dtype)
        write_json(partial / "vlm" / "preprocessor_config.json", configs.preprocessor())
        write_json(partial / "vlm" / "chat_template.json", {"chat_template": QWEN3_VL_TEMPLATE})
        write_words(partial / "vlm", QWEN3_VL_TEMPLATE, 262144)


def read_model(folder: Path) -> tuple[Parameters, vae_model.Autoencoder]:
    """What `write_model` was given, but for rounding to the stored types."""
    pipe = dopsd_jax.load_pipeline(folder)
    rooms = {"transformer": pipe.transformer, "text": pipe.text_encoder, "vision": pipe.vlm}
    return read_parts(rooms), pipe.vae


def write_words(folder: Path, template: str = QWEN3_TEMPLATE, max_length: int = 131072) -> None:
    """Writes the tokenizer's files."""
    write_tokenizer(folder, template, max_length, words=configs.words(), count=configs.MERGES)
