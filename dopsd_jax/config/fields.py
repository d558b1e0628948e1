"""Every field of a configuration, declared once; those of methods stand with their methods.

From here come the defaults, the checks, what may change when a run is continued, `--help` and
docs/configuration.md.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from dopsd_jax import families
from dopsd_jax.common.config_fields import ALWAYS, NEVER, Field
from dopsd_jax.methods.options import OTHER_CAPTION
from dopsd_jax.methods.registry import METHODS
from dopsd_jax.models import kinds

COUNT = 10**9  # a bound of numbers of steps
PIXELS = 2**34  # of the area of a picture
ADAPTERS, FULL, ADAM = {"train": ("lora",)}, {"train": ("full",)}, {"optimizer": ("adamw",)}
METHOD = "The method"


def _steps(name: str, default: int, help: str, low: int = 0, **more) -> Field:
    return Field(name, default, help, low=low, high=COUNT, unit="steps", **more)


def _axis(name: str, default: int, help: str) -> Field:
    return Field(f"mesh.{name}", default, help, low=-1, high=2**20, change=ALWAYS)


# fmt: off
_RUN = (
    Field("family", families.AUTO, "kind of model; auto: the one that the model's folder names",
          choices=(families.AUTO, *families.FAMILIES), change=NEVER),
    Field("method", "dopsd", "how the student learns", change=NEVER),
    Field("train", "lora", "adapters beside the frozen network, or every parameter of it",
          choices=("lora", "full"), change=NEVER),
    Field("seed", 30, "of all random numbers of the run", low=0, high=2**63 - 1),
    _steps("steps", 2000, "optimizer steps of the run", 1, change=ALWAYS),
    Field("batch_size", 4, "images of a micro-batch, over all devices", low=1, high=65536),
    Field("accumulate", 1, "micro-batches of a step, all from one bucket", low=1, high=65536),
    _steps("checkpoint_every", 500, "steps between two checkpoints, with a result each", 1,
           change=ALWAYS),
    Field("keep_checkpoints", 3, "how many of the newest; LoRA files are all kept", low=1,
          high=10**6, change=ALWAYS),
    Field("nonfinite", "stop",
          "a step whose loss, gradient or new state is not finite: stop, or skip it",
          choices=("stop", "skip"), change=ALWAYS),
    _steps("keep_every", 0, "checkpoints at multiples of it are kept for ever; 0: none",
           change=ALWAYS),
    Field("export", "diffusers", "what a full run writes: a model folder, one file, or both",
          "list", listed=("diffusers", "comfyui"), when=FULL, change=ALWAYS),
    Field("export_dtype", "bfloat16", "type of the weights in it",
          choices=(*kinds.WHOLE, "float16"), when=FULL, change=ALWAYS),
    Field("export_weights", "student", "whose weights are the result, also for adapters",
          choices=("student", "teacher"), change=ALWAYS),
    _steps("export_every", 0, "steps between two exports, the newest is kept; 0: at the end",
           when=FULL, change=ALWAYS),
    _steps("sample_every", 100, "steps between grids of pictures; 0: start and end", change=ALWAYS),
    Field("sample_rows", 4, "rows of the data set in them", low=1, high=1024, change=ALWAYS),
)
_MODEL = (
    Field("model", "", "folder, converted checkpoint, or hub id owner/name", change=NEVER),
    Field("teacher.vlm", "",
          "folder or hub id of the vision-language model; empty: the folder vlm of the model",
          change=NEVER),
    Field("base_dtype", "bfloat16", "type of frozen weights; float32 if train is full",
          choices=(*kinds.WHOLE, *kinds.QUANTISED), change=NEVER),
    Field("dtype", "bfloat16", "type of activations; states, losses and adapters are float32",
          choices=kinds.WHOLE),
    Field("attention", "auto", "kernel; auto: the best for the platform",
          choices=("auto", *kinds.ATTENTION), change=ALWAYS),
    Field("remat", "full",
          "what is computed again to save memory: none is fastest, full needs the least",
          choices=("none", "dots", "full"), change=ALWAYS),
)
_GRID = (Field("grid", "nodes4", "noise levels of a rollout: a name, or a list", "name or list"),)
_ADAPTERS = (
    Field("lora.rank", 64, "rank of every update", low=1, high=8192, when=ADAPTERS, change=NEVER),
    Field("lora.alpha", 128.0, "an update is scaled by alpha / rank", above=0, high=10**6,
          when=ADAPTERS, change=NEVER),
    Field("lora.targets", "blocks", "which layers: a preset of the family, or a list of patterns",
          "name or list", when=ADAPTERS, change=NEVER),
    Field("lora.init_from", "", "a LoRA file to start from", change=NEVER),
)
_OPTIMIZER = (
    Field("optimizer", "adamw", "adafactor: no first moment, the second by rows and columns",
          choices=("adamw", "adafactor"), change=NEVER),
    Field("moments_dtype", "float32",
          "moments of adamw; bfloat16: half the memory, rounded at random", choices=kinds.WHOLE,
          change=NEVER),
    Field("offload", "", "kept in the host's memory between uses", "list",
          listed=("teacher", "optimizer"), change=ALWAYS),
    Field("learning_rate", 1e-4, "its highest value", above=0, high=1e29),
    Field("lr_schedule", "constant", "the learning rate after the warm-up",
          choices=("constant", "linear", "cosine")),
    _steps("warmup_steps", 0, "first steps, in which the learning rate rises"),
    Field("grad_clip", 1.0, "global norm of a gradient; 0: no clipping", low=0, high=1e9),
    Field("adam_b1", 0.9, "decay of the first moment", low=0, high=1, when=ADAM),
    Field("adam_b2", 0.999, "decay of the second moment", low=0, high=1, when=ADAM),
    Field("adam_eps", 1e-8, "added to the root of the second", above=0, high=1e3, when=ADAM),
    Field("weight_decay", 0.0, "of all but norms, biases and learned tokens", low=0, high=1e3),
)
_DATA = (
    Field("data.path", "", "jsonl file, folder of images with captions, or more", change=ALWAYS),
    Field("data.root", "", "a further folder in which a jsonl's paths are looked for"),
    Field("data.resolution", 1024, "buckets have about the area of a square with this side", low=1,
          high=65536, unit="pixels"),
    Field("data.buckets", "", "sizes instead, such as 832x1248,1024x1024", "list"),
    Field("data.prompt_keys", "", "captions to train on; empty: all that every row has", "list"),
    Field("data.image_key", "", "column that names the picture; empty: one of the known names"),
    Field("data.caption_key", "", "column of the caption; empty: as data.prompt_keys says"),
    Field("data.caption_extension", ".txt", "ending of caption files beside pictures"),
    Field("data.caption_lines", False, "every line of a caption file is an alternative"),
    Field("data.folder_captions", False, "the folder's name where there is no caption file"),
    Field("data.folder_repeats", False, "pictures of a folder 10_name count ten times"),
    Field("data.trigger", "", "word that is put for [trigger] in captions"),
    Field("data.prompt_draw", "batch",
          "one caption key is drawn for a batch, as in the released code, or for a row",
          choices=("batch", "row")),
    Field("data.max_pixels", 200_000_000, "larger pictures are refused unread", low=1, high=PIXELS,
          unit="pixels"),
    Field("data.cache", "", "folder for features; empty: in the work directory", change=ALWAYS),
)
_MESH = (
    _axis("data", -1, "copies of the network, each with its own images; -1: the rest"),
    _axis("fsdp", 1, "splits images and weights; a layer is gathered when it runs"),
    _axis("context", 1, "splits tokens: for large images, and fewer images than devices"),
    _axis("tensor", 1, "splits heads and hidden units"),
)
# fmt: on


def sections() -> dict[str, tuple[Field, ...]]:
    """The fields in the order of the documents, by section."""
    of_methods = {f.name: f for m in METHODS.values() for f in m.fields}
    of_families = {f.name: f for own in families.options() for f in own.FIELDS}
    return {
        "The run": _RUN,
        "The model": _MODEL,
        METHOD: (*_GRID, *of_methods.values(), *of_families.values()),
        "The adapters": _ADAPTERS,
        "The optimizer": _OPTIMIZER,
        "The data": _DATA,
        "Devices": _MESH,
    }


def declared() -> dict[str, Field]:
    """Every field by its dotted name."""
    return {field.name: field for group in sections().values() for field in group}


def choices(field: Field) -> tuple[str, ...]:
    """The names that a field may have; empty: any."""
    if field.name == "teacher.context":
        shown = dict.fromkeys(name for own in families.options() for name in own.CONTEXTS)
        return (*shown, OTHER_CAPTION)
    return tuple(METHODS) if field.name == "method" else field.choices


def conditions(field: Field) -> Mapping[str, tuple[str, ...]]:
    """Values of other fields with which alone this one has an effect."""
    users = tuple(m.name for m in METHODS.values() if field.name in {f.name for f in m.fields})
    found = {"method": users} if users else {}
    for other in field.when:
        found |= conditions(declared()[other])
    return found | field.when


def defaults() -> ConfigDict:
    """A configuration of all fields: the released recipe where it is known, else a plain choice."""
    config = ConfigDict(type_safe=False)  # some fields are a name or a list; `schema.check` knows
    for name, field in declared().items():
        *groups, last = name.split(".")
        node = config
        for group in groups:
            if group not in node:
                node[group] = ConfigDict(type_safe=False)
            node = node[group]
        node[last] = field.default
    return config
