"""The work directory of a run: whose configuration it is, and with which versions it ran."""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dopsd_jax import families
from dopsd_jax.common.atomic import is_remote, write_text
from dopsd_jax.common.config_fields import as_paths
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.json_files import read_json
from dopsd_jax.config.changes import compare
from dopsd_jax.config.schema import flat
from dopsd_jax.data.prepared_parts import names_prepared
from dopsd_jax.parallel import multihost
from dopsd_jax.weights import converted, hub

CONFIG = "config.json"
# Fields that may name a model on the hub, and the facts that hold the commit it was of.
MODELS = {"model": "model_revision", "teacher.vlm": "vlm_revision"}
RUNS = "runs"  # in it lies the work directory of a family, where none is named
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def find_workdir(name: str | None, config: Mapping[str, Any]) -> epath.Path:
    """The work directory that --workdir names, which may be `gs://`; else that of the family.

    Raises `UserError` for files of a run that need a file system.
    """
    name = name or f"{RUNS}/{families.named(config['family'])}"
    workdir = epath.Path(name)
    if not is_remote(name):
        workdir = workdir.expanduser()
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir {name}: is a file; name a folder")
        return workdir
    faults = [
        f"{field}: 'random' is made in the work directory, which cannot be {name}; use a folder"
        for field, value in (
            ("config.model", config["model"]),
            ("config.data.path", config["data"]["path"]),
        )
        if "random" in as_paths(value)
    ]
    if not config["data"]["cache"] and not names_prepared(config["data"]["path"]):
        faults.append(
            f"config.data.cache: is empty, and features cannot be cached in {name}; name a folder"
        )
    if config["train"] == "full":
        faults.append(
            f"--workdir {name}: the model of a full run is written to a folder only; give one that "
            "is mounted"
        )
    raise_if(faults)
    return workdir


def began_with(workdir: epath.Path) -> tuple[dict[str, Any], list[int]]:
    """config.json of the run in `workdir`, and the steps it has saved.

    Empty for a run that has saved nothing yet: it may be corrected.
    """
    path, folder = workdir / CONFIG, workdir / "checkpoints"
    saved = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    if not (saved and path.exists()):
        return {}, []
    found, _ = read_json(path)
    parts = [found.get(name) for name in ("config", "facts")] if isinstance(found, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: is not a configuration of a run; use another --workdir")
    return found, saved


def as_begun(workdir: epath.Path, config: Mapping[str, Any], field: str) -> str:
    """The model of a field of `MODELS`, on the hub at the commit that the run began with.

    Else every commit there would end a run that names no revision.
    """
    name, (old, _) = flat(config)[field], began_with(workdir)
    was = old and old["config"].get(field)
    commit = old and old["facts"].get(MODELS[field])
    unpinned = "@" not in name or name == was
    if not (isinstance(commit, str) and unpinned and hub.same_model(was, name)):
        return name
    pinned = f"{name.partition('@')[0]}@{commit}"
    if pinned != name:
        multihost.say(f"config.{field}: {pinned}, which this run began with")
    return pinned


def open_workdir(
    workdir: epath.Path,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    write: bool = True,
    allowed: Sequence[str] = (),
    command: str = "",
    chosen: Mapping[str, Any] = {},
) -> None:
    """Makes the folder, or checks that it belongs to this configuration; writes config.json.

    facts: what else decides what is trained (digest of the data, revision of the model). write:
    False for a process that leaves writing to another. allowed: fields that may change now; every
    such change is kept in config.json with the step after which it takes effect. command: what was
    typed; kept too, with the day on which the run began, and `chosen`, what the program has
    settled by itself. Raises `UserError` naming every other field that differs.
    """
    path, (old, saved) = workdir / CONFIG, began_with(workdir)
    started = datetime.date.today().isoformat()
    new = {"config": flat(config), "facts": dict(facts), "versions": versions()}
    if new["config"].get("train") == "full":  # an adapter's arrays have PyTorch's order
        new["facts"]["weights_arrangement"] = converted.FORMAT
    if old:
        for field in MODELS:  # the facts tell of another commit
            if hub.same_model(old["config"].get(field), new["config"].get(field)):
                old["config"][field] = new["config"][field]
        changes, faults = compare(old, new, allowed)
        raise_if(f"{workdir}: {fault}" for fault in faults)
        before = old.get("changes")
        changes = [{"step": max(saved), **change} for change in changes]
        started = old.get("started", started)
        if kept := [*(before if isinstance(before, list) else []), *changes]:
            new["changes"] = kept
    new |= {"started": started} | ({"command": command} if command else {})
    new |= {"chosen": dict(chosen)} if chosen else {}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir}: cannot be made ({error.strerror}); choose another") from None
    if write:
        write_text(path, json.dumps(new, indent=1) + "\n")


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }
