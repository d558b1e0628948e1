"""The fields a configuration has, and what each may hold."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from dopsd_jax.common.errors import raise_if
from dopsd_jax.models import kinds


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


METHODS = ("dopsd", "sft", "sft_teacher", "offpolicy", "pso", "dreambooth")
TEACHES = ("dopsd", "sft_teacher", "offpolicy")  # ask the teacher of config.teacher
KEEPS_START = ("pso", "dreambooth")  # compare with the network before training
EXPORTS = ("diffusers", "comfyui")
OFFLOADED = ("teacher", "optimizer")
FIELDS = {
    "family": _name("zimage"),
    "method": _name(*METHODS),
    "train": _name("lora", "full"),
    "seed": _int(0),
    "steps": _int(1),
    "batch_size": _int(1),
    "accumulate": _int(1),
    "checkpoint_every": _int(1),
    "keep_checkpoints": _int(1),
    "keep_every": _int(0),
    "nonfinite": _name("stop", "skip"),
    "export": Field("list"),
    "export_weights": _name("student", "teacher"),
    "export_dtype": _name("bfloat16", "float32", "float16"),
    "export_every": _int(0),
    "sample_every": _int(0),
    "sample_rows": _int(1),
    "model": Field("str"),
    "base_dtype": _name(*kinds.WHOLE, *kinds.QUANTISED),
    "dtype": _name(*kinds.WHOLE),
    "attention": _name("auto", *kinds.ATTENTION),
    "remat": _name("none", "dots", "full"),
    "grid": Field("name or list"),
    "loss": Field("name or list"),
    "loss_steps": Field("name or list"),
    "teacher.weights": _name("ema", "frozen", "live"),
    "teacher.decay": Field("float", low=0, high=1),
    "teacher.warmup_steps": _int(0),
    "teacher.warmup_decay": Field("float", low=0, high=1),
    "teacher.context": _name("vlm", "prompt"),
    "teacher.prompt_key": Field("str"),
    "teacher.vlm": Field("str"),
    "teacher.doubled_template": Field("bool"),
    "teacher.min_pixels": _int(1),
    "teacher.max_pixels": _int(1),
    "sft.sigma": _name("logit_normal", "uniform", "shifted", "nodes"),
    "sft.samples": _int(1),
    "offpolicy.states": _name("teacher", "targets"),
    "pso.beta": Field("float", low=0),
    "pso.kappa": Field("float", low=0),
    "pso.prior": Field("float", low=0),
    "pso.negatives": _name("student", "start"),
    "dreambooth.concept_word": Field("str"),
    "dreambooth.class_word": Field("str"),
    "dreambooth.weight": Field("float", low=0),
    "lora.rank": _int(1),
    "lora.alpha": Field("float", above=0),
    "lora.targets": Field("name or list"),
    "lora.init_from": Field("str"),
    "optimizer": _name("adamw", "adafactor"),
    "moments_dtype": _name(*kinds.WHOLE),
    "offload": Field("list"),
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
    "data.image_key": Field("str"),
    "data.caption_key": Field("str"),
    "data.caption_extension": Field("str"),
    "data.caption_lines": Field("bool"),
    "data.folder_captions": Field("bool"),
    "data.folder_repeats": Field("bool"),
    "data.trigger": Field("str"),
    "data.prompt_draw": _name("batch", "row"),
    "data.max_pixels": _int(1),
    "data.cache": Field("str"),
    "mesh.data": Field("int"),
    "mesh.fsdp": Field("int"),
    "mesh.context": Field("int"),
    "mesh.tensor": Field("int"),
}

# The methods for which a field means something; all others mean something for all.
_OF_TEACHER = ("weights", "decay", "warmup_steps", "warmup_decay", "context")
_OF_CONTEXT = ("prompt_key", "doubled_template", "min_pixels", "max_pixels")
ONLY_FOR = {
    **{f"teacher.{name}": TEACHES for name in (*_OF_TEACHER, *_OF_CONTEXT)},
    **dict.fromkeys(("loss", "loss_steps"), ("dopsd", "offpolicy", "pso")),
    **dict.fromkeys(("sft.sigma", "sft.samples"), ("sft", "sft_teacher", "dreambooth")),
    **{
        name: (method,)
        for name in FIELDS
        for method in ("offpolicy", "pso", "dreambooth")
        if name.startswith(f"{method}.")
    },
}

# A field's value, and the fields that mean nothing with it.
UNUSED = (
    ("train", "full", ("lora.rank", "lora.alpha", "lora.targets")),
    ("train", "lora", ("export", "export_dtype", "export_every")),
    ("optimizer", "adafactor", ("adam_b1", "adam_b2", "adam_eps")),
    ("teacher.context", "vlm", ("teacher.prompt_key",)),
    (
        "teacher.context",
        "prompt",
        ("teacher.doubled_template", "teacher.min_pixels", "teacher.max_pixels"),
    ),
    *(
        ("method", method, tuple(name for name, of in ONLY_FOR.items() if method not in of))
        for method in METHODS
    ),
)


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


def check(config: Mapping[str, Any], asked: Collection[str] = ()) -> None:
    """Raises `UserError` with every field that is missing, unknown or off.

    `asked`: fields that were set on the command line; there, one that means nothing is a fault.
    """
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
    if given["base_dtype"] in kinds.QUANTISED:
        faults += kinds.quantised_faults()
    if given["train"] == "full":
        if given["base_dtype"] != "float32":
            faults.append(
                f"config.base_dtype: {given['base_dtype']} with config.train = full, which trains "
                "every parameter in float32; set it to float32, or use configs/zimage.py:full"
            )
        if given["lora.init_from"]:
            faults.append(
                "config.lora.init_from: config.train is full, there are no adapters; merge the "
                "file into the model with tools/convert_weights.py merge and name that model"
            )
    faults += [
        f"config.{name}: has no effect with config.{field} = {value}; leave it out"
        for field, value, idle in UNUSED
        for name in idle
        if given[field] == value and name in asked
    ]
    faults += _listed("export", given["export"], EXPORTS)
    faults += _listed("offload", given["offload"], OFFLOADED)
    if given["train"] == "full" and not names(given["export"]):
        faults.append(f"config.export: is empty; name {' or '.join(EXPORTS)}, or both")
    if given["optimizer"] == "adafactor" and given["moments_dtype"] != "float32":
        faults.append(
            f"config.moments_dtype: {given['moments_dtype']} with config.optimizer = adafactor, "
            "which keeps rows and columns only; set it to float32"
        )
    faults += _teacher(given)
    told = given["method"] in TEACHES and given["teacher.context"] == "prompt"
    if told and not given["teacher.prompt_key"].strip():
        faults.append(
            "config.teacher.prompt_key: is empty; name the key of the captions that the teacher is "
            "told, such as detailed_en"
        )
    if given["method"] == "dreambooth":
        faults += [
            f"config.dreambooth.{name}: is empty; {what}"
            for name, what in (
                ("concept_word", "name the word that stands for the concept in the captions"),
                ("class_word", "name what the concept is an example of, such as dog"),
            )
            if not given[f"dreambooth.{name}"].strip()
        ]
    if given["warmup_steps"] >= given["steps"]:
        faults.append(
            f"config.warmup_steps: {given['warmup_steps']} must be below config.steps, "
            f"{given['steps']}"
        )
    raise_if(faults)


def _teacher(given: Mapping[str, Any]) -> list[str]:
    """What names the teacher's weights where there are none, or none that are trained."""
    method, faults = given["method"], []
    none = None
    if method not in (*TEACHES, *KEEPS_START):
        none = f"config.method = {method}"
    elif method in TEACHES and given["teacher.weights"] == "live":
        none = "config.teacher.weights = live"
    if none and "teacher" in names(given["offload"]):
        faults.append(
            f"config.offload: names the teacher, which has no weights of its own with {none}"
        )
    if given["export_weights"] == "teacher" and (none or method in KEEPS_START):
        why = none or f"config.method = {method}, which keeps the start only"
        faults.append(
            f"config.export_weights: names the teacher, which has no weights of its own with {why}"
        )
    return faults


def _listed(name: str, value: Any, known: tuple[str, ...]) -> list[str]:
    return [
        f"config.{name}: {item!r} is not one of {', '.join(known)}"
        for item in names(value)
        if item not in known
    ]


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
