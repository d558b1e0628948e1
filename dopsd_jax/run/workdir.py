"""The work directory of a run: whose configuration it is, and with which versions it ran."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

from etils import epath

from dopsd_jax.common.atomic import is_remote, write_text
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.json_files import read_json
from dopsd_jax.config.schema import flat
from dopsd_jax.data.prepared_parts import is_prepared

CONFIG = "config.json"
DEFAULT = "runs/zimage"  # the work directory
# What may change when a run goes on: everything else changes what is trained.
FREE = (
    "steps",
    "checkpoint_every",
    "keep_checkpoints",
    "export",
    "export_weights",
    "export_dtype",
    "offload",
    "export_every",
    "keep_every",
    "nonfinite",
    "sample_every",
    "sample_rows",
    "attention",
    "remat",
    "data.cache",
    "data.path",  # the digest of the data decides: a prepared copy is the same data
    "mesh.data",
    "mesh.fsdp",
    "mesh.context",
    "mesh.tensor",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def find_workdir(name: str | None, config: Mapping[str, Any]) -> epath.Path:
    """The work directory that --workdir names, which may be `gs://`.

    Raises `UserError` for what a run would keep there that needs a file system.
    """
    if name is None:
        name = DEFAULT
    if not name:
        raise UserError("--workdir: is empty; name a folder, or leave it out for " + DEFAULT)
    workdir = epath.Path(name)
    if not is_remote(name):
        return workdir.expanduser()
    faults = [
        f"{field}: 'random' is made in the work directory, which cannot be {name}; use a folder"
        for field, value in (
            ("config.model", config["model"]),
            ("config.data.path", config["data"]["path"]),
        )
        if value == "random"
    ]
    if not config["data"]["cache"] and not is_prepared(config["data"]["path"]):
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


def open_workdir(
    workdir: epath.Path, config: Mapping[str, Any], facts: Mapping[str, Any], write: bool = True
) -> None:
    """Makes the folder, or checks that it belongs to this configuration; writes config.json.

    `write`: False for a process that leaves writing to another.

    `facts`: what else decides what is trained (digest of the data, revision of the model). Raises
    `UserError` naming every field that differs.
    """
    path = workdir / CONFIG
    new = {"config": flat(config), "facts": dict(facts), "versions": versions()}
    # A run that has saved nothing yet may be corrected.
    folder = workdir / "checkpoints"
    saved = folder.exists() and any(p.name.isdigit() for p in folder.iterdir())
    if path.exists() and saved:
        old, _ = read_json(path)
        if not isinstance(old, dict) or not {"config", "facts"} <= old.keys():
            raise UserError(f"{path}: is not a configuration of a run; use another --workdir")
        was, now = old["config"], new["config"]
        faults = [
            f"{workdir}: belongs to a run with config.{name} = {was.get(name)!r}, now "
            f"{now.get(name)!r}; use another --workdir, or the old value"
            for name in sorted(was.keys() | now.keys())
            if name not in FREE and was.get(name) != now.get(name)
        ]
        faults += [
            f"{workdir}: was trained with {name} {old['facts'].get(name)}, now it is {value}; use "
            "another --workdir"
            for name, value in new["facts"].items()
            if old["facts"].get(name) != value
        ]
        if faults:
            raise UserError(*faults)
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
