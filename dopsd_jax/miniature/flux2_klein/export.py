"""The miniature FLUX.2-klein as a model folder in Hugging Face layout, written and read back.

The published text encoder gives the outputs of layers 9, 18 and 27. Here the layers before those
add nothing to what they are given, so that there are as many that work as there are outputs.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import transformers

import dopsd_jax
from dopsd_jax.common.atomic import atomic_folder
from dopsd_jax.common.errors import UserError
from dopsd_jax.families.flux2_klein.pipeline import LAYERS
from dopsd_jax.families.flux2_klein.random import MODEL_INDEX, SCHEDULER
from dopsd_jax.miniature import optimizer
from dopsd_jax.miniature.files import part, read_parts, write_network
from dopsd_jax.miniature.flux2_klein import autoencoder, configs
from dopsd_jax.miniature.flux2_klein.configs import Size
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.models import flux2_autoencoder, flux2_config, qwen3
from dopsd_jax.models.flux2_autoencoder import Flux2Autoencoder
from dopsd_jax.random_model import write_json
from dopsd_jax.random_model.tokenizer import QWEN3_TEMPLATE, write_tokenizer

WORKING = [layer - 1 for layer in LAYERS]  # where the trained layers stand


def write_model(folder: Path, size: Size, parameters: Parameters, vae: Flux2Autoencoder) -> None:
    """Writes `folder`, which must not exist; types are the published ones."""
    cfg = configs.transformer(size)
    leaves, drawn = flux2_config.names(cfg), part(parameters, "transformer")
    text, language = configs.language(size), _deep(part(parameters, "text"))
    of_vae, counters = optimizer.flat(vae)[1], flux2_autoencoder.unused(vae.cfg)
    with atomic_folder(folder) as partial:
        write_json(partial / "model_index.json", MODEL_INDEX)
        write_json(partial / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_words(partial / "tokenizer")
        write_network(partial / "transformer", cfg.to_dict(), leaves, drawn, "BF16")
        encoder = partial / "text_encoder"
        write_network(encoder, configs.text_encoder(size), qwen3.names(text), language, "BF16")
        names = flux2_autoencoder.names(vae.cfg)
        write_network(partial / "vae", configs.autoencoder(), names, of_vae, "BF16", counters)


def read_model(folder: Path, words: Path) -> tuple[Parameters, Flux2Autoencoder]:
    """What `write_model` was given, but for rounding; of a miniature Z-Image the text encoder and
    the autoencoder. `words`: the folder of the tokenizer that is trained with.

    Raises `UserError`.
    """
    pipe = dopsd_jax.load_pipeline(folder)
    same = pipe.family.NAME == "flux2_klein"
    depth = pipe.part_config("text_encoder").num_layers
    if depth != (configs.DEPTH if same else len(LAYERS) + 1):
        raise UserError(
            f"{folder}: its text encoder has {depth} layers; name a folder that miniature.train "
            "wrote"
        )
    text = read_parts({"text": pipe.text_encoder})
    if same:
        return _shallow(text) | read_parts({"transformer": pipe.transformer}), pipe.vae
    own = transformers.AutoTokenizer.from_pretrained(words)
    text["text.embedding"] = _reordered(text["text.embedding"], pipe.tokenizer, own)
    return text, autoencoder.normalized(autoencoder.of_zimage(pipe.vae), 0)


def write_words(folder: Path) -> None:
    """Writes the tokenizer's files."""
    write_tokenizer(folder, QWEN3_TEMPLATE, 131072, words=configs.words(), count=configs.MERGES)


def _deep(text: Parameters) -> Parameters:
    """The text encoder with layers between its own that change nothing."""

    def spread(name: str, value):
        if not name.startswith("layers."):
            return value
        whole = np.full((configs.DEPTH, *value.shape[1:]), name.endswith(".scale"), np.float32)
        whole[WORKING] = value[: len(WORKING)]
        return whole

    return {name: spread(name, value) for name, value in text.items()}


def _shallow(text: Parameters) -> Parameters:
    """The inverse; the last layer, which is not used, is another."""
    pick = jnp.asarray([*WORKING, configs.DEPTH - 1])
    return {k: v[pick] if k.startswith("text.layers.") else v for k, v in text.items()}


def _reordered(embedding, theirs, own):
    """Rows of a tokenizer's tokens in the order of another; of what it lacks, those of its parts:
    their mean."""
    rows = np.asarray(embedding)
    found = np.resize(rows, (configs.VOCABULARY, rows.shape[1]))
    known = theirs.get_vocab()
    for token, place in own.get_vocab().items():
        said = own.convert_tokens_to_string([token])
        parts = theirs(said, add_special_tokens=False)["input_ids"]
        found[place] = rows[known[token]] if token in known else rows[parts].mean(0)
    return jnp.asarray(found)
