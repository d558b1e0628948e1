"""A model that can caption, as far as a random one can: it says one sentence of every picture."""

import itertools
import json

import numpy as np
from safetensors.numpy import load_file, save_file

from dopsd_jax.random_model import Size, write_random_model
from dopsd_jax.weights.tokenizers import read_tokenizer

SENTENCE = "a red circle on the snow."


def write_captioner(folder):
    """A random model, whose Qwen3-VL has a head of its own and continues "\\n" with `SENTENCE`.

    Its layers add nothing, so what follows depends on the last token alone, by the head.
    """
    vlm = write_random_model(folder, size=Size()) / "vlm"
    config = json.loads((vlm / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (vlm / "config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(vlm, config["text_config"]["vocab_size"], inside="")
    said = [*tokenizer(f"\n{SENTENCE}")["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert len(set(said)) == len(said) > 6
    (path,) = vlm.glob("*.safetensors")
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = np.zeros_like(tensor)
    embedding = tensors["model.language_model.embed_tokens.weight"]
    head = np.zeros_like(embedding)
    for before, after in itertools.pairwise(said):
        head[after] = embedding[before]
    save_file({**tensors, "lm_head.weight": head}, path, metadata={"format": "pt"})
    return folder
