"""The tokenizer of a model folder: it must be complete and fit the text encoder."""

import hashlib
from pathlib import Path
from typing import Any

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.files import read_bytes
from dopsd_jax.common.json_files import read_json

FOLDER = "tokenizer"
RULES, SETTINGS = "tokenizer.json", "tokenizer_config.json"
MAX_RULES = 16 << 20  # bytes of tokenizer.json; Qwen's takes 11 MB, and 30 times as much parsed
BYTES = 256  # a byte-level tokenizer has at least a token for each


def read_tokenizer(model: Path, vocabulary: int, inside: str = FOLDER) -> Any:
    """The tokenizer of a model whose text encoder knows `vocabulary` tokens. Raises `UserError`.

    `inside`: where in the model's folder it is; "": the model is one network, and it stands beside
    the weights. Without `tokenizer.json` transformers would silently make one with special tokens
    only.
    """
    import transformers  # a second, which most starts need not take: features are cached

    folder = model / inside
    check_tokenizer(model, inside)
    try:
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
        count, last = len(tokenizer), max(tokenizer.get_vocab().values(), default=0)
    except Exception as error:  # whatever its parsers, which are not Python, may raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder}: no tokenizer can be read there ({reason})") from None
    if count < BYTES or last >= vocabulary:
        raise UserError(
            f"{folder / RULES}: has {count} tokens with ids up to {last}; the text encoder knows "
            f"{vocabulary}: use the tokenizer of this very model"
        )
    return tokenizer


def check_tokenizer(model: Path, inside: str = FOLDER) -> None:
    """Raises `UserError` unless the files of a tokenizer are there; `inside`: `read_tokenizer`."""
    faults = []
    for name in (RULES, SETTINGS):
        try:
            content, _ = read_json(model / inside / name, limit=MAX_RULES)
            if not isinstance(content, dict):
                faults.append(f"{model / inside / name}: is not a JSON object; download it again")
        except UserError as error:
            faults += error.problems
    raise_if(faults)


def tokenizer_digest(model: Path) -> str:
    """sha256 of the files that make a tokenizer: what is cached depends on it."""
    content = hashlib.sha256()
    for name in (RULES, SETTINGS):
        content.update(hashlib.sha256(read_bytes(model / FOLDER / name, MAX_RULES)).digest())
    return content.hexdigest()
