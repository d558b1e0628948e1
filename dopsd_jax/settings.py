"""The fields a configuration has, and what each may hold."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dopsd_jax.errors import raise_if
from dopsd_jax.models import quantised
from dopsd_jax.models.attention import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class Field:
    """kind: int, float, bool, str, list, or `name or list`; bounds of numbers."""

    kind: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None


def _int(low: int) -> Field:
    return Field("int", low=low)


def _name(*choices: str) -> Field:
    return Field("str", choices)


FIELDS = {
    "family": _name("zimage"),
    "method": _name("dopsd"),
    "train": _name("lora"),
    "seed": _int(0),
    "steps": _int(1),
    "batch_size": _int(1),
    "accumulate": _int(1),
    "checkpoint_every": _int(1),
    "keep_checkpoints": _int(1),
    "keep_every": _int(0),
    "sample_every": _int(0),
    "sample_rows": _int(1),
    "model": Field("str"),
    "base_dtype": _name(*quantised.BASE_DTYPES),
    "dtype": _name(*quantised.WHOLE),
    "attention": _name("auto", *IMPLEMENTATIONS),
    "remat": _name("none", "dots", "full"),
    "grid": Field("name or list"),
    "loss": Field("name or list"),
    "loss_steps": Field("name or list"),
    "teacher.weights": _name("ema", "frozen", "live"),
    "teacher.decay": Field("float", low=0, high=1),
    "teacher.warmup_steps": _int(0),
    "teacher.warmup_decay": Field("float", low=0, high=1),
    "teacher.context": _name("vlm"),
    "teacher.vlm": Field("str"),
    "teacher.doubled_template": Field("bool"),
    "teacher.min_pixels": _int(1),
    "teacher.max_pixels": _int(1),
    "lora.rank": _int(1),
    "lora.alpha": Field("float", above=0),
    "lora.targets": Field("name or list"),
    "lora.init_from": Field("str"),
    "learning_rate": Field("float", above=0),
    "lr_schedule": _name("constant", "linear", "cosine"),
    "warmup_steps": _int(0),
    "grad_clip": Field("float", low=0),
    "adam_b1": Field("float", low=0, high=1),
    "adam_b2": Field("float", low=0, high=1),
    "adam_eps": Field("float", above=0),
    "weight_decay": Field("float", low=0),
    "data.path": Field("str"),
    "data.root": Field("str"),
    "data.resolution": _int(1),
    "data.buckets": Field("list"),
    "data.prompt_keys": Field("list"),
    "data.caption_extension": Field("str"),
    "data.caption_lines": Field("bool"),
    "data.prompt_draw": _name("batch", "row"),
    "data.max_pixels": _int(1),
    "data.cache": Field("str"),
    "mesh.data": Field("int"),
    "mesh.fsdp": Field("int"),
    "mesh.context": Field("int"),
    "mesh.tensor": Field("int"),
}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a nested configuration by dotted name, tuples as lists."""
    found = {}
    for name, value in config.items():
        if isinstance(value, Mapping) or hasattr(value, "items"):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def values(value: str | list | tuple) -> str | tuple:
    """A field that is a name or a list: `1, 0.9` on the command line means the list."""
    if not isinstance(value, str):
        return tuple(value)
    items = names(value)
    numbers = tuple(_number(item) for item in items)
    if items and None not in numbers:
        return numbers
    return items if "," in value else value


def names(value: str | list | tuple) -> tuple:
    """A field that is a list, or one string with commas between the items."""
    if not isinstance(value, str):
        return tuple(value)
    return tuple(item.strip() for item in value.strip("()[] ").split(",") if item.strip())


def check(config: Mapping[str, Any]) -> None:
    """Raises `UserError` with every field that is missing, unknown or off by itself."""
    given = flat(config)
    faults = [f"config.{name}: is missing" for name in FIELDS if name not in given]
    faults += [f"config.{name}: there is no such field" for name in given if name not in FIELDS]
    for name, field in FIELDS.items():
        if name in given:
            fault = _fault(field, given[name])
            faults += [f"config.{name}: {given[name]!r} {fault}"] if fault else []
    raise_if(faults)
    for name, what in (("model", "a model folder or hub id"), ("data.path", "a data set")):
        if not given[name]:
            faults.append(f"config.{name}: is empty; name {what}")
    if given["teacher.max_pixels"] < given["teacher.min_pixels"]:
        faults.append(
            f"config.teacher.max_pixels: {given['teacher.max_pixels']} is below "
            f"config.teacher.min_pixels, {given['teacher.min_pixels']}"
        )
    if given["base_dtype"] in quantised.SCHEMES:
        faults += quantised.faults()
        if given["train"] == "full":
            faults.append(
                f"config.base_dtype: {given['base_dtype']} is for a frozen base, and config.train "
                f"full trains every weight; set it to {' or '.join(quantised.WHOLE)}, or train lora"
            )
    if given["warmup_steps"] >= given["steps"]:
        faults.append(
            f"config.warmup_steps: {given['warmup_steps']} must be below config.steps, "
            f"{given['steps']}"
        )
    raise_if(faults)


def _fault(field: Field, value: Any) -> str | None:
    kinds = {
        "int": type(value) is int,
        "float": type(value) in (int, float),
        "bool": type(value) is bool,
        "str": isinstance(value, str),
        "list": isinstance(value, str | list | tuple),
        "name or list": isinstance(value, str | list | tuple) and len(value) > 0,
    }
    if not kinds[field.kind]:
        return f"must be of kind {field.kind}"
    if field.choices and value not in field.choices:
        return f"is not one of {', '.join(field.choices)}"
    if field.low is not None and value < field.low:
        return f"must be at least {field.low}"
    if field.high is not None and value > field.high:
        return f"must be at most {field.high}"
    if field.above is not None and not value > field.above:
        return f"must be above {field.above}"
    return None


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None
