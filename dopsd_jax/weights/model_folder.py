"""A whole model as a folder: one per network, tokenizer and scheduler beside them.

The same shape whether it is a Hugging Face folder or a converted one; the latter has
`dopsd_jax.json`.
"""

import os
import shutil
from pathlib import Path

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.json_files import read_json
from dopsd_jax.weights.hub import MODEL_MANIFEST
from dopsd_jax.weights.tokenizers import check_tokenizer

INDEX = "model_index.json"
ASSET_FOLDERS = ("tokenizer", "scheduler")
ASSET_SUFFIXES = (".json", ".txt", ".jinja", ".model")
NOT_ASSETS = ("config.json", "manifest.json", "incomplete.json")  # written for each network


def is_converted_model(folder: Path) -> bool:
    return os.path.isfile(folder / MODEL_MANIFEST)


def check_assets(folder: Path) -> None:
    """Raises `UserError` unless all that stands beside the networks is there, and readable."""
    faults = []
    checks = [
        lambda: check_tokenizer(folder),
        lambda: read_json(folder / "scheduler" / "scheduler_config.json"),
    ]
    if os.path.isdir(folder / "vlm"):
        checks.append(lambda: read_json(folder / "vlm" / "preprocessor_config.json"))
    for check in checks:
        try:
            check()
        except UserError as error:
            faults += error.problems
    raise_if(faults)


def copy_assets(source: Path, target: Path) -> None:
    """Copies the small files beside a network's weights: settings, processors, tokenizers."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        index = file.name.endswith(".index.json")
        if file.suffix in ASSET_SUFFIXES and file.name not in NOT_ASSETS and not index:
            shutil.copyfile(file, target / file.name)


def copy_shared_assets(source: Path, target: Path) -> None:
    """Copies what belongs to the whole model: index, tokenizer, scheduler. Raises `UserError`."""
    shutil.copyfile(source / INDEX, target / INDEX)
    for name in ASSET_FOLDERS:
        if not os.path.isdir(source / name):
            raise UserError(f"{source / name}: no such folder; download the whole model")
        copy_assets(source / name, target / name)
