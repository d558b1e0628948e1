"""The families of models: a room each, and one line in `FAMILIES`.

What is particular to a family stands in its room: networks and their PyTorch names, contexts,
grids, sign and time, work, adapter targets. All programs ask the `Family` (see `families.base`) and
name none. A family may import common, parallel, models, weights, data, adapters, `dopsd` and
random_model. This file imports no large library.
"""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.common.json_files import read_json
from dopsd_jax.weights.hub import MODEL_MANIFEST
from dopsd_jax.weights.model_folder import INDEX

if TYPE_CHECKING:
    from dopsd_jax.families.base import Family, Options

AUTO = "auto"  # config.family: the model's own


class Listing(NamedTuple):
    """pipeline: the `_class_name` in model_index.json. room: the package with its modules `family`,
    a `base.Family`, and `options`, a `base.Options`.
    """

    pipeline: str
    room: str


FAMILIES = {
    "zimage": Listing("ZImagePipeline", "dopsd_jax.families.zimage"),
    "flux2_klein": Listing("Flux2KleinPipeline", "dopsd_jax.families.flux2_klein"),
}


def named(name: str) -> str:
    """The name of a family; that of `AUTO`, where no model says it: the first of `FAMILIES`."""
    return next(iter(FAMILIES)) if name == AUTO else name


def load(name: str) -> "Family":
    """The family of a name, or of `AUTO`: see `named`."""
    return importlib.import_module(f"{FAMILIES[named(name)].room}.family")


def every() -> list["Family"]:
    """All families."""
    return [load(name) for name in FAMILIES]


def options() -> list["Options"]:
    """What all families add to the configuration; imports no JAX."""
    return [importlib.import_module(f"{listing.room}.options") for listing in FAMILIES.values()]


def of_folder(folder: Path, asked: str = AUTO) -> "Family":
    """The family of a model folder. Raises `UserError`, also if it is not the one `asked` for."""
    name, where = _named(folder)
    if asked not in (AUTO, name):
        raise UserError(
            f"config.family: is {asked}, but {where} says {name}; set it to {AUTO} or {name}"
        )
    return load(name)


def _named(folder: Path) -> tuple[str, Path]:
    path = folder / MODEL_MANIFEST
    if os.path.isfile(path):
        name = _text(path, "family")
        if name not in FAMILIES:
            raise UserError(f"{path}: family {name!r} is unknown; {', '.join(FAMILIES)} is known")
        return name, path
    path = folder / INDEX
    if not os.path.isfile(path):
        raise UserError(
            f"{folder}: has neither {INDEX} nor {MODEL_MANIFEST}: not a model folder, or an "
            "interrupted import (run it again)"
        )
    pipeline = _text(path, "_class_name")
    known = {listing.pipeline: name for name, listing in FAMILIES.items()}
    if pipeline not in known:
        raise UserError(f"{path}: pipeline {pipeline!r} is not supported; {', '.join(known)} is")
    return known[pipeline], path


def _text(path: Path, field: str) -> str:
    """A field of a JSON file that is text."""
    fields = Fields(read_json(path)[0], str(path))
    text = fields.text(field)
    fields.finish()
    return text
