"""Trees of arrays in safetensors files, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dopsd_jax.common.atomic import atomic_file
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.json_files import parse_json


def save_tree(path: Path, tree: Any, about: dict | None = None) -> None:
    """Writes a tree of arrays; `about` is JSON kept in the file's header."""
    flat = {name: np.asarray(leaf, order="C") for name, leaf in _named(tree)}
    with atomic_file(path) as file:
        file.write(save(flat, metadata={"about": json.dumps(about or {})}))


def load_tree(path: Path, like: Any) -> tuple[Any, dict]:
    """The tree with the structure of `like`, and what was said about it.

    Raises `UserError` for a file that is not that tree.
    """
    try:
        with safe_open(path, "numpy") as file:
            about = parse_json((file.metadata() or {}).get("about", "{}"), str(path))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to start again") from None
    wanted = dict(_named(like))
    raise_if(
        f"{path}: {name} is missing or has another shape or type; the file is of another version: "
        "delete it to start again"
        for name, leaf in wanted.items()
        if name not in found
        or found[name].shape != leaf.shape
        or found[name].dtype != np.dtype(leaf.dtype)
    )
    leaves = [found[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), about


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
