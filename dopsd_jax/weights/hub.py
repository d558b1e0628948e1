"""A model's folder from what a user writes: a path, or a Hugging Face hub id."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dopsd_jax.common.errors import FULL, UserError
from dopsd_jax.common.files import can_enter, expand
from dopsd_jax.common.json_files import read_json

MODEL_MANIFEST = "dopsd_jax.json"  # of a converted model
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
ROOT = ("*.json", "*.safetensors", "*.txt", "*.jinja")  # a repository that is one network
# A pipeline's components; the weights of others (safety checkers, ONNX copies) stay where they are.
PIPELINE = (
    "model_index.json",
    "transformer/*.json",
    "transformer/*.safetensors",
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "vae/*.json",
    "vae/*.safetensors",
    "tokenizer/*",
    "scheduler/*.json",
)
# All failures of the hub client, with any HTTP library.
NETWORK_ERRORS = HfHubHTTPError.__bases__


class Resolved(NamedTuple):
    """A folder, and the commit it is of; None for a folder of the user's own."""

    path: Path
    revision: str | None


def resolve(
    model: str | os.PathLike, revision: str | None = None, patterns: Sequence[str] = PIPELINE
) -> Resolved:
    """The folder of `model`: a path, or `owner/name[@revision]` on the hub.

    A hub model is downloaded into the hub's cache once, and is taken from there when the network is
    away. Raises `UserError`.
    """
    model = os.fspath(model)  # Python users give a Path, too
    path = expand(model)
    if model and os.path.isdir(path):
        if not can_enter(path):
            raise UserError(f"{model}: may not be entered; check its permissions")
        return Resolved(path, _recorded_revision(path))
    if os.path.isfile(path):
        raise UserError(
            f"{model}: is a file; give the model's folder, or a hub id; a single file of weights "
            f"becomes a model with `dopsd-jax convert import {model} NEW --base MODEL`"
        )
    if model.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(model):
        raise UserError(
            f"{model!r}: no such folder, and not a hub id (owner/name or owner/name@revision)"
        )
    name, _, pinned = model.partition("@")
    if pinned and revision and pinned != revision:
        raise UserError(f"{model}: revision {pinned!r} and revision {revision!r} are both given")
    return _download(name, pinned or revision, patterns)


def same_model(a: object, b: object) -> bool:
    """Whether both are ids on the hub, and of one model; their revisions may differ."""
    on_hub = lambda x: isinstance(x, str) and HUB_ID.fullmatch(x) and not os.path.isdir(x)
    return bool(on_hub(a) and on_hub(b)) and a.partition("@")[0] == b.partition("@")[0]


def _recorded_revision(path: Path) -> str | None:
    """The commit a local folder is of, if it says so: a converted model, or the hub's cache."""
    if os.path.isfile(path / MODEL_MANIFEST):
        manifest, _ = read_json(path / MODEL_MANIFEST)
        revision = manifest.get("revision") if isinstance(manifest, dict) else None
        return revision if isinstance(revision, str) else None
    return path.name if path.parent.name == "snapshots" else None


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Resolved:
    at = f"{name}@{revision}" if revision else name
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise UserError(
            f"{at}: is gated; accept its terms at https://huggingface.co/{name}, then log in with "
            "`hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{at}: no such folder here and no such model on the hub; check the name "
            "(a private one needs `hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: has no revision {revision!r} on the hub; check it") from None
    except HFValidationError as error:
        raise UserError(f"{at}: is not a hub id ({error})") from None
    except LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise UserError(
            f"{at}: no such folder, not (wholly) in the hub's cache, and {why}; download it while "
            "online, or give a folder"
        ) from None
    except NETWORK_ERRORS as error:
        if getattr(error, "errno", None) in FULL:
            raise UserError(f"{at}: the disk is full while downloading; free some space") from error
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{at}: download failed ({reason}); try again, or give a folder") from error
    if not any(path.rglob("*.json")):
        raise UserError(f"{at}: holds none of the files needed; is it a diffusers-layout model?")
    return Resolved(path, path.name)
