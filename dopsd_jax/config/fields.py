"""Every field of a configuration, declared once; those of methods stand with their methods.

From here come the defaults, the checks, what may change when a run is continued, `--help` and
docs/configuration.md.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from dopsd_jax import families
from dopsd_jax.common.config_fields import (
    ALWAYS,
    GIVEN,
    NEVER,
    POSITIVE,
    TRUE,
    UNSET,
    Field,
    Naming,
)
from dopsd_jax.methods import anchor
from dopsd_jax.methods.options import OTHER_CAPTION
from dopsd_jax.methods.registry import METHODS
from dopsd_jax.models import kinds

COUNT = 10**9  # a bound of numbers of steps
PIXELS = 2**34  # of the area of a picture
ADAPTERS, FULL, ADAM = {"train": ("lora",)}, {"train": ("full",)}, {"optimizer": ("adamw",)}
SHUFFLED = {"data.shuffle_tags": TRUE}
METHOD = "The method"
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # each an extra of its name


def _steps(name: str, default: int, help: str, low: int = 0, **more) -> Field:
    return Field(name, default, help, low=low, high=COUNT, unit="steps", **more)


def _axis(name: str, default: int, help: str) -> Field:
    return Field(f"mesh.{name}", default, help, low=-1, high=2**20, change=ALWAYS)


# fmt: off
_RUN = (
    Field("family", families.AUTO, "model family; auto: the one that the model's folder names",
          choices=(families.AUTO, *families.FAMILIES), change=NEVER),
    Field("method", "dopsd", "training method (docs/methods.md)", change=NEVER),
    Field("train", "lora", "lora: adapters beside the frozen network; full: every parameter",
          choices=("lora", "full"), change=NEVER),
    Field("seed", 30, "seed of all random numbers of the run", low=0, high=2**32 - 1),
    _steps("steps", 2000,
           "optimizer steps; a linear or cosine lr_schedule ends here, and a change is on request "
           "then", 1, change=ALWAYS,
           asked_with={"lr_schedule": ("linear", "cosine")}),
    Field("batch_size", 4, "images per micro-batch, on all devices together", low=1, high=65536),
    Field("accumulate", 1, "micro-batches per step, all from one bucket", low=1, high=65536),
    _steps("checkpoint_every", 500,
           "steps between two checkpoints; each writes a LoRA file, if there are adapters", 1,
           change=ALWAYS),
    Field("keep_checkpoints", 3, "newest checkpoints that are kept; LoRA files are all kept",
          low=1, high=10**6, change=ALWAYS),
    Field("nonfinite", "stop",
          "if loss, gradient or new state is not finite: stop the run, or skip the step (ten in a "
          "row stop it)",
          choices=("stop", "skip"), change=ALWAYS),
    _steps("keep_every", 0, "checkpoints at multiples of this step are never removed; 0: none",
           change=ALWAYS),
    Field("export", "diffusers", "what a full run writes: a model folder, a ComfyUI file, or both",
          "list", listed=("diffusers", "comfyui"), when=FULL, change=ALWAYS),
    Field("export_dtype", "bfloat16", "type of the exported weights",
          choices=(*kinds.WHOLE, "float16"), when=FULL, change=ALWAYS),
    Field("export_weights", "student", "whose weights are exported, also as a LoRA file",
          choices=("student", "teacher"), change=ALWAYS),
    _steps("export_every", 0,
           "exports at checkpoints whose step is a multiple of this, the newest is kept; 0: only "
           "at the end", when=FULL, change=ALWAYS),
    _steps("sample_every", 100, "steps between grids of pictures; 0: only start and end",
           change=ALWAYS),
    Field("trackers", "", "where numbers and pictures go besides metrics.jsonl", "list",
          listed=tuple(TRACKERS), change=ALWAYS),
    Field("stop.patience", 0,
          "end the run after this many checkpoints in a row without a better score on the "
          "pictures of data.holdout; 0: never",
          low=0, high=10**6, unit="checkpoints", change=ALWAYS),
    Field("stop.tolerance", 0.01,
          "how much better than the best so far, as a share, a score must be for stop.patience; "
          "best.safetensors is the plain best", low=0, high=1, when={"data.holdout": POSITIVE},
          change=ALWAYS),
    Field("stop.scorers", "",
          "scorers of evaluate that judge pictures of the held-out captions at every checkpoint, "
          "such as clip, dino, lpips, crispness or module:attribute", "list", change=ALWAYS),
    Field("stop.rank_by", "gap",
          "what ranks the checkpoints and ends the run: gap, or one of config.stop.scorers",
          change=ALWAYS),
    Field("stop.class_word", "", "word in place of [V] in captions, for scorers that read them",
          when={"stop.scorers": GIVEN}, change=ALWAYS),
    Field("stop.clip", "", "folder or hub id of CLIP; empty: that of evaluate", "path",
          when={"stop.scorers": Naming(("clip",))}, change=ALWAYS),
    Field("stop.dino", "", "folder or hub id of DINOv3; empty: that of evaluate", "path",
          when={"stop.scorers": Naming(("dino",))}, change=ALWAYS),
    Field("stop.vgg", "", "folder or hub id of VGG-16; empty: that of evaluate", "path",
          when={"stop.scorers": Naming(("lpips",))}, change=ALWAYS),
    Field("stop.lpips_weights", "", "file of LPIPS's linear layers, safetensors", "path",
          when={"stop.scorers": Naming(("lpips",))}, change=ALWAYS),
    Field("sample_rows", 4, "rows of the data set in the grids", low=1, high=1024, change=ALWAYS),
    Field("sample_prompts", "",
          "extra prompts to draw: one prompt, or .txt files with one prompt a line", "list",
          change=ALWAYS),
)
_MODEL = (
    Field("model", "", "model folder, converted checkpoint, or hub id owner/name", "path",
          change=NEVER),
    Field("teacher.vlm", "",
          "folder or hub id of the vision-language model; empty: the folder vlm in config.model",
          "path", change=NEVER),
    Field("base_dtype", "bfloat16", "type of the frozen weights; must be float32 if train is full",
          choices=(*kinds.WHOLE, *kinds.QUANTISED), change=NEVER),
    Field("dtype", "bfloat16", "type of activations; states, losses and adapters stay float32",
          choices=kinds.WHOLE),
    Field("attention", "auto", "attention kernel; auto: the best one for the platform",
          choices=(kinds.AUTO, *kinds.ATTENTION), change=ALWAYS),
    Field("remat", "full",
          "activations recomputed to save memory: none is fastest, full needs the least memory; "
          "auto: the fastest of them that leaves a tenth of the device's memory free; unrolled: "
          "none without a loop over layers, for small networks (docs/running.md)",
          choices=("none", "dots", "full", kinds.AUTO, kinds.UNROLLED), change=ALWAYS),
)
_GRID = (
    Field("grid", "nodes4",
          "noise levels of a rollout: nodes4, of Z-Image also nodes8 and legacy8, of FLUX.2-klein "
          "upstream4; or a list that begins at 1 (its end, 0, is added)", "name or list"),
)
_ADAPTERS = (
    Field("lora.kind", "lora", "lora: a product of two matrices; lokr: a Kronecker product of two",
          choices=("lora", "lokr"), when=ADAPTERS, change=NEVER),
    Field("lora.rank", 64, "rank of every adapter", low=1, high=8192, when=ADAPTERS, change=NEVER),
    Field("lora.factor", 8,
          "sides of LoKr's first, small matrix: this number, or the largest divisor of the layer's "
          "side below it; 0: nearly square", low=0, high=8192, when={"lora.kind": ("lokr",)},
          change=NEVER),
    Field("lora.alpha", 128.0,
          "adapters are scaled by alpha / rank; a LoKr whose second matrix is whole is not",
          above=0, high=10**6, when=ADAPTERS, change=NEVER),
    Field("lora.targets", "blocks",
          "adapted layers: blocks (all linear layers of the blocks), of Z-Image also attention, "
          "main (without the refiners) and before_pr5, of FLUX.2-klein double, single and "
          "klein_upstream; or a list of patterns",
          "name or list", when=ADAPTERS, change=NEVER),
    Field("lora.init_from", "", "LoRA file to start from; empty: none", "path", change=NEVER),
)
_OPTIMIZER = (
    Field("optimizer", "adamw", "adafactor has no first moment, the second by rows and columns",
          choices=("adamw", "adafactor"), change=NEVER),
    Field("moments_dtype", "float32",
          "type of the moments of adamw; bfloat16: half the memory, rounded stochastically",
          choices=kinds.WHOLE, change=NEVER),
    Field("offload", "", "what is kept in host memory while it is not used; base: frozen layers",
          "list", listed=("teacher", "optimizer", "base"), change=ALWAYS),
    Field("learning_rate", 1e-4, "highest learning rate", above=0, high=1e29),
    Field("lr_schedule", "constant", "the learning rate after the warm-up",
          choices=("constant", "linear", "cosine")),
    _steps("warmup_steps", 0, "first steps, in which the learning rate rises"),
    Field("grad_clip", 1.0, "largest global norm of a gradient; 0: no clipping", low=0, high=1e9),
    Field("adam_b1", 0.9, "decay of the first moment", low=0, high=0.9999999, when=ADAM),
    Field("adam_b2", 0.999, "decay of the second moment", low=0, high=0.9999999, when=ADAM),
    Field("adam_eps", 1e-8, "added to the root of the second moment", above=0, high=1e3, when=ADAM),
    Field("weight_decay", 0.0, "of all but norms, biases and learned tokens", low=0, high=1e3),
)
_DATA = (
    Field("data.path", "", "folder of images with captions, jsonl file, or more; or a list of them",
          "paths or store", change=ALWAYS),
    Field("data.weights", "", "shares of the data sets in a list; empty: each row once an epoch",
          "list"),
    Field("data.root", "", "second folder in which the relative paths of a table are looked for",
          "path"),
    Field("data.resolution", 1024,
          "buckets have about the area of a square with this side, a multiple of 16; of a list, "
          "every picture is used at each that it fills", "int or list", low=1, high=65536,
          unit="pixels", when={"data.buckets": UNSET}),
    Field("data.buckets", "",
          "bucket sizes instead of these, width x height, such as 832x1248,1024x1024", "list"),
    Field("data.prompt_keys", "",
          "caption keys to use; empty: all that every row has, but for teacher.prompt_key", "list"),
    Field("data.image_key", "", "column of pictures or their paths; empty: one of the known names"),
    Field("data.caption_key", "", "column with the caption; empty: see data.prompt_keys"),
    Field("data.caption_extension", ".txt", "file name ending of the captions beside the pictures"),
    Field("data.caption_lines", False, "every line of a caption file is an alternative caption"),
    Field("data.folder_captions", False, "a subfolder's name replaces a missing caption"),
    Field("data.folder_repeats", False, "pictures of a folder 10_name are used ten times an epoch"),
    Field("data.references", "",
          "where the pictures are that rows edit: auto or columns of a table, or folders; empty: "
          "rows edit none", "list"),
    Field("data.reference_crop", "own",
          "own: references keep their sizes, as in sampling; bucket: they are cut to the bucket of "
          "their row (as in the released code)", choices=("own", "bucket"),
          when={"data.references": GIVEN}),
    Field("data.holdout", 0,
          "pictures that are not trained on; the gap on them, or stop.rank_by, ranks the "
          "checkpoints",
          low=0, high=COUNT, unit="pictures"),
    Field("data.trigger", "",
          "word that replaces [trigger] and [name] in captions; captions without it are reported; "
          "it is the concept's word for anchors and evaluate"),
    Field("data.prompt_draw", "batch",
          "a caption key is drawn for each batch, or for each row (the released code draws one for "
          "each GPU)",
          choices=("batch", "row")),
    Field("data.caption_dropout", 0.0,
          "share of draws in which the student gets the empty caption, and the teacher the row's",
          low=0, high=1),
    Field("data.shuffle_tags", False, "captions are lists of tags with commas, in any order"),
    Field("data.tag_variants", 8, "orders of the tags of each caption, the written one among them",
          low=1, high=1000, when=SHUFFLED),
    Field("data.keep_tags", 0, "tags that stay in front of every order", low=0, high=1000,
          when=SHUFFLED),
    Field("data.flip", False, "every picture is used mirrored too"),
    Field("data.crops", 1, "crops of every picture: the centre, and others at random places in it",
          low=1, high=1000),
    Field("data.masks", "off",
          "which places of a picture count in the loss: off (all), files (white of a_mask.png, "
          "a-masklabel.png or masks/a.png beside a.png), alpha (what is not transparent)",
          choices=("off", "files", "alpha")),
    Field("data.mask_floor", 0.0, "how much a black place of a mask counts; a white one counts 1",
          low=0, high=0.99, when={"data.masks": ("files", "alpha")}),
    Field("data.max_pixels", 200_000_000, "larger pictures are refused before they are decoded",
          low=1, high=PIXELS, unit="pixels"),
    Field("data.cache", "",
          "folder of cached features; empty: in the work folder, or on this machine if that is in "
          "an object store", "path", change=ALWAYS),
)
_MESH = (
    _axis("data", -1, "copies of the network, each with its own images; -1: all remaining devices"),
    _axis("fsdp", 1, "splits images and weights; the weights of a layer are gathered when it runs"),
    _axis("context", 1, "splits tokens: for large images, or fewer images than devices"),
    _axis("tensor", 1, "splits attention heads and hidden units: between devices with fast links"),
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
        "The anchor": anchor.FIELDS,
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
    """Values that other fields must have so that this one has an effect."""
    users = tuple(m.name for m in METHODS.values() if field.name in {f.name for f in m.fields})
    found = {"method": users} if users else {}
    for other in field.when:
        found = conditions(declared()[other]) | found
    return found | field.when


def defaults() -> ConfigDict:
    """The default configuration: the values of the released recipe, as far as they are known."""
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
