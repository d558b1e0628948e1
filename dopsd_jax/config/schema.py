"""Checks a configuration: every field of its kind and range, and fields that go together."""

import difflib
import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

from dopsd_jax import families
from dopsd_jax.common.config_fields import UNSET, Field, as_list, as_option, as_paths, shown
from dopsd_jax.common.errors import raise_if
from dopsd_jax.config.fields import TRACKERS, choices, conditions, declared
from dopsd_jax.methods import anchor, registry
from dopsd_jax.methods.options import DECOUPLED, DISTANCE, OTHER_CAPTION
from dopsd_jax.methods.registry import METHODS
from dopsd_jax.models import kinds

FULL_CONFIGS = ("zimage:full", "flux2_klein:4b_identity_full")  # examples, as messages name them


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a nested configuration by dotted name, tuples as lists."""
    found = {}
    for name, value in config.items():
        if isinstance(value, Mapping) or hasattr(value, "items"):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def placeless(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are the same on every machine of a run: all that name no place on a disk."""
    kinds = {name: field.kind for name, field in declared().items()}
    return {
        f"config.{name}": value
        for name, value in flat(config).items()
        if not kinds[name].startswith("path")
    }


def check(config: Mapping[str, Any], asked: Collection[str] = ()) -> None:
    """Raises `UserError` with every field that is missing, unknown or off.

    `asked`: fields that were set on the command line; there, one that means nothing is a fault.
    """
    given, fields = flat(config), declared()
    faults = [f"config.{name}: is missing" for name in fields if name not in given]
    faults += [unknown(name) for name in given if name not in fields]
    faults += [
        f"config.{name}: {shown(given[name])} {fault}"
        for name, field in fields.items()
        if name in given and (fault := _fault(field, given[name]))
    ]
    raise_if(faults)
    faults += _empty(given)
    faults += [fault for own in families.options() for fault in own.faults(given)]
    if given["base_dtype"] in kinds.QUANTISED:
        faults += kinds.quantised_faults()
    if given["train"] == "full":
        faults += _full(given)
    faults += [idle for name in asked if name in fields and (idle := _idle(fields[name], given))]
    faults += [
        f"config.{name}: {item!r} is not one of {', '.join(field.listed)}"
        for name, field in fields.items()
        for item in (as_list(given[name]) if field.listed else ())
        if item not in field.listed
    ]
    faults += [
        f"config.trackers: {name} needs the library {TRACKERS[name]}; pip install "
        f"'dopsd_jax[{name}]', or leave it out"
        for name in as_list(given["trackers"])
        if name in TRACKERS and importlib.util.find_spec(TRACKERS[name]) is None
    ]
    if given["train"] == "full" and not as_list(given["export"]):
        faults.append(
            f"config.export: is empty; name {' or '.join(fields['export'].listed)}, or both"
        )
    if given["optimizer"] == "adafactor" and given["moments_dtype"] != "float32":
        faults.append(
            f"config.moments_dtype: {given['moments_dtype']} with config.optimizer = adafactor, "
            "which keeps rows and columns only; set it to float32"
        )
    faults += _teacher(given, registry.start(config) == "copy") + _base(given) + _distance(given)
    faults += anchor.faults(given, METHODS[given["method"]].keeps)
    if given["warmup_steps"] >= given["steps"]:
        faults.append(
            f"config.warmup_steps: {given['warmup_steps']} must be below config.steps, "
            f"{given['steps']}"
        )
    raise_if(faults)


def unknown(name: str) -> str:
    """The line about a field that there is not, with the one that may be meant."""
    known = declared()
    last = {key: key.rpartition(".")[2] for key in known}
    end = name.rpartition(".")[2]
    near = (
        [key for key in known if last[key] == end]  # `rank` is lora.rank, not train
        or difflib.get_close_matches(name, known, 1)
        or [key for key in known if difflib.get_close_matches(end, [last[key]], 1, 0.8)][:1]
    )
    meant = " or ".join(f"config.{key}" for key in near)
    hint = f"; did you mean {meant}?" if near else "; --help lists the fields"
    return f"config.{name}: there is no such field{hint}"


def _fault(field: Field, value: Any) -> str | None:
    fault, known = field.fault(value), choices(field)
    if fault is None and known and value not in known:
        return f"is not one of {', '.join(known)}"
    return fault


def _idle(field: Field, given: Mapping[str, Any]) -> str | None:
    """The line about a field that has no effect."""
    of_anchors = given["anchor.share"] and field.name in anchor.USED
    for other, needed in conditions(field).items():
        if of_anchors and other == "method":
            continue
        if given[other] not in needed:
            value, empty = given[other], f"while config.{other} is empty"
            why = empty if value in ("", []) else f"with config.{other} = {as_option(value)}"
            use = f", or empty config.{other}" if needed is UNSET else ""
            return f"config.{field.name}: has no effect {why}; leave it out{use}"
    return None


def _empty(given: Mapping[str, Any]) -> list[str]:
    """Fields that must name something and do not."""
    required = {"model": "name a model folder or hub id", "data.path": "name a data set"}
    method = METHODS[given["method"]]
    if method.keeps == "teacher" and given["teacher.context"] == OTHER_CAPTION:
        required["teacher.prompt_key"] = (
            "name the key of the teacher's captions, such as detailed_en"
        )
    required |= method.requires
    return [
        f"config.{name}: is empty; {what}"
        for name, what in required.items()
        if not "".join(as_paths(given[name])).strip()
    ]


def _full(given: Mapping[str, Any]) -> list[str]:
    """What does not go together with training every parameter."""
    faults = []
    if given["base_dtype"] != "float32":
        faults.append(
            f"config.base_dtype: {given['base_dtype']} with config.train = full, which trains "
            "every parameter in float32; set it to float32, or use a configuration for it, "
            f"--config {' or '.join(FULL_CONFIGS)}"
        )
    if given["lora.init_from"]:
        faults.append(
            "config.lora.init_from: config.train is full, there are no adapters; merge the "
            "file into the model with python -m dopsd_jax.convert merge and name that model"
        )
    return faults


def _distance(given: Mapping[str, Any]) -> list[str]:
    """A distance of velocities with a method whose loss is made of something else."""
    method = METHODS[given["method"]]
    used = {field.name for field in method.fields}
    if given["loss"] != DECOUPLED or "loss" not in used or used & {f.name for f in DISTANCE}:
        return []
    return [
        f"config.loss: {DECOUPLED} does not go with config.method = {method.name}, whose loss is "
        "no distance to a teacher; use x0, velocity, step or a list of weights"
    ]


def _base(given: Mapping[str, Any]) -> list[str]:
    """A frozen network in the host's memory where there is none, or where it would not stay."""
    if "base" not in as_list(given["offload"]):
        return []
    if given["train"] == "full":
        return [
            "config.offload: names the base, the frozen network of adapters, which "
            "config.train = full has not; leave it out, teacher and optimizer can be named"
        ]
    if given["remat"] in ("none", kinds.UNROLLED):
        return [
            f"config.offload: names the base, but config.remat = {given['remat']} keeps all its "
            "layers on the device for the backward pass; set config.remat to full or dots"
        ]
    if given["base_dtype"] in kinds.QUANTISED:  # the TPU compiler of jax 0.10.2 fails
        return [
            "config.offload: names the base, whose layers are fetched one by one only in "
            f"{' or '.join(kinds.WHOLE)}, not in {given['base_dtype']}; set config.base_dtype"
        ]
    return []


def _teacher(given: Mapping[str, Any], copied: bool) -> list[str]:
    """What names the teacher's weights where there are none, or its picture where it sees none.

    copied: whether the run keeps a copy of its start, which goes where the teacher goes.
    """
    method, faults, none = given["method"], [], None
    keeps = METHODS[method].keeps
    unseen = keeps == "teacher" and given["teacher.context"] == OTHER_CAPTION
    if unseen and given["teacher.vision_dropout"]:
        faults.append(
            "config.teacher.vision_dropout: has no effect with config.teacher.context = "
            f"{OTHER_CAPTION}, which shows the teacher no picture; set it to 0"
        )
    if keeps == "none":
        none = f"config.method = {method}"
    elif keeps == "teacher" and given["teacher.weights"] == "live":
        none = "config.teacher.weights = live"
    if none and not copied and "teacher" in as_list(given["offload"]):
        faults.append(
            f"config.offload: names the teacher, which has no weights of its own with {none}"
        )
    if given["export_weights"] == "teacher" and (none or keeps == "start"):
        why = none or f"config.method = {method}, which keeps the start only"
        faults.append(
            f"config.export_weights: names the teacher, which has no weights of its own with {why}"
        )
    if given["export_weights"] == "teacher" and keeps == "teacher" and (still := _still(given)):
        faults.append(
            f"config.export_weights: names the teacher, which stays as it begins with {still}; set "
            "it to student"
        )
    return faults


def _still(given: Mapping[str, Any]) -> str:
    """The field by which the teacher never leaves its start; empty: it does."""
    if given["teacher.weights"] == "frozen":
        return "config.teacher.weights = frozen"
    warm, used = given["teacher.warmup_steps"], []
    used += ["teacher.warmup_decay"] * (warm > 0) + ["teacher.decay"] * (warm < given["steps"])
    moves = given["teacher.weights"] == "live" or any(given[name] < 1 for name in used)
    return "" if moves else " and ".join(f"config.{name} = {given[name]}" for name in used)
