"""FLUX.2-klein. Presets are named SIZE_TASK_TRAIN, such as `4b_prompt_full`; `4b` alone (also what
`configs/flux2_klein.py` is) and `9b` are SIZE_identity_lora.

SIZE: `4b`, `9b`. TASK: `identity`, the teacher is shown the picture as the reference of the editing
branch; `edit`, rows with pictures to edit, and the teacher is shown the result as its last
reference; `prompt`, the teacher has another caption, under the key detailed_en. TRAIN: `lora`;
`full`, every parameter, for several large devices. SIZE_identity_lora and SIZE_edit_lora have
anchors, which hold ordinary prompts where they were (docs/results.md), or other edits
(docs/flux2-klein.md); `4b_released`, `9b_released`, `4b_released_edit`, `9b_released_edit`: the
same without them, as in the released scripts; what the released code does besides is in
docs/flux2-klein.md, "As released". `4b_12gb`, `9b_24gb` and so on: `4b` and `9b` for one GPU with
12, 16, 24, 48 or 80 GB (docs/gpus.md). Set config.data.path, and config.model to a
folder if you have one. `:tiny`, `:tiny_edit`: the same programs, for both tasks, on the trained
miniature, minutes on a laptop. `:random`, `:random_full`: on a network with random weights and
drawn pictures, for tests.
"""

import itertools

from ml_collections import ConfigDict

from dopsd_jax.config.fields import defaults
from dopsd_jax.config.find import shipped
from dopsd_jax.config.loading import choose

SIZES, TASKS, TRAIN = ("4b", "9b"), ("identity", "edit", "prompt"), ("lora", "full")
PRESETS = tuple("_".join(parts) for parts in itertools.product(SIZES, TASKS, TRAIN))

RELEASED = tuple(f"{size}_{name}" for size in SIZES for name in ("released", "released_edit"))
ANCHORS = 0.125  # as in configs/zimage.py
# What the recipe must give up on one GPU. A step is of four images, as in the recipe.
ONE_IMAGE = {"batch_size": 1, "accumulate": 4}
KEPT = {"remat": "dots"}  # where one image leaves room for what it makes: no product is done twice
SMALLER = {"data.resolution": 768, "lora.rank": 32, "lora.alpha": 64.0}
CARDS = {
    "4b_12gb": {**ONE_IMAGE, "base_dtype": "int8"},
    "4b_16gb": ONE_IMAGE,
    "4b_24gb": {**ONE_IMAGE, **KEPT},
    "4b_48gb": {**ONE_IMAGE, **KEPT},
    "4b_80gb": {**ONE_IMAGE, **KEPT},
    # On these two the text encoder does not fit: see docs/gpus.md.
    "9b_12gb": {**ONE_IMAGE, **SMALLER, "base_dtype": "nf4"},
    "9b_16gb": {**ONE_IMAGE, **SMALLER, "data.resolution": 704, "base_dtype": "int8"},
    "9b_24gb": {**ONE_IMAGE, "base_dtype": "int8"},
    "9b_48gb": {**ONE_IMAGE, **KEPT},
    "9b_80gb": {**ONE_IMAGE, **KEPT},
}


def get_config(arg: str | None = None) -> ConfigDict:
    small = "tiny", "tiny_edit", "random", "random_full"
    name = choose(arg, (*SIZES, *PRESETS, *RELEASED, *CARDS, *small))
    size, *rest = name.split("_")
    c = defaults()
    c.family = "flux2_klein"
    c.model = f"black-forest-labs/FLUX.2-klein-{size.upper()}"
    c.teacher.context = "edit_ref"
    c.learning_rate = 2e-5  # the released recipes'
    c.steps = 3001
    if name in (*SIZES, *CARDS) or rest == ["identity", "lora"]:
        c.anchor.share = ANCHORS
    c.update_from_flattened_dict(CARDS.get(name, {}))
    if size == "tiny":
        tiny(c)
    if name == "tiny_edit":
        tiny_edit(c)
    elif "edit" in rest:
        edit(c)
    if rest == ["edit", "lora"]:
        editing_anchors(c)
    if "prompt" in rest:
        prompt(c)
    if "full" in rest:
        full(c)
    if size == "random":
        random(c)
    return c


def edit(c: ConfigDict) -> ConfigDict:
    """The editor itself; the released recipe has 8 rows a step."""
    c.teacher.context = "gt_ref"
    c.data.references = "auto"
    c.batch_size = 8
    return c


def editing_anchors(c: ConfigDict) -> ConfigDict:
    """A share that kept all other edits: docs/flux2-klein.md, "A miniature"."""
    c.anchor.share = 0.25
    c.anchor.edit = True
    c.anchor.prompts = "edits"
    return c


def prompt(c: ConfigDict) -> ConfigDict:
    """A short prompt learns from a long one, as in a public variant of the released code."""
    c.teacher.context = "prompt"
    c.teacher.prompt_key = "detailed_en"
    c.teacher.weights = "frozen"  # that variant's decay of 1
    return c


def full(c: ConfigDict) -> ConfigDict:
    """No settings are published for it; these are the usual ones for its size."""
    c.train = "full"
    c.base_dtype = "float32"  # what is trained is kept in float32
    c.learning_rate = 1e-5
    c.warmup_steps = 100
    c.batch_size = 8
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.keep_checkpoints = 2
    c.sample_every = 250
    return c


def tiny(c: ConfigDict) -> ConfigDict:
    """A minute or two on two CPU cores: the quickstart's word, from its six pictures."""
    world, klein = shipped("examples", "miniature"), shipped("examples", "klein_miniature")
    c.model = str(klein / "model")
    c.teacher.instruction = "as shown"  # the miniature knows no other words for it
    c.data.path = str(world / "dax")
    c.data.resolution = 64
    c.data.buckets = "64x64"
    c.anchor.share = 0.25
    c.anchor.prompts = str(world / "ordinary.txt")
    c.anchor.concept_word = "dax"
    c.steps = 100
    c.batch_size = 6  # all of them
    c.checkpoint_every = 50
    c.sample_every = 50
    c.sample_rows = 6  # as many as the table's batches: one program draws both
    c.learning_rate = 1e-3
    c.warmup_steps = 0
    c.loss = "velocity"
    c.lora.rank = 16
    c.lora.alpha = 16.0
    c.base_dtype = c.dtype = "float32"
    c.remat = "unrolled"
    return c


def tiny_edit(c: ConfigDict) -> ConfigDict:
    """The same word for the editor, from twelve pairs: `a dax in its place`."""
    klein = shipped("examples", "klein_miniature")
    c.data.path = str(klein / "pairs" / "after")
    c.data.references = str(klein / "pairs" / "before")
    c.teacher.context = "gt_ref"
    c.teacher.instruction = "like the last"
    c.steps = 160
    c.checkpoint_every = c.sample_every = 80
    c.anchor.edit = True
    c.anchor.prompts = str(klein / "edits.txt")
    return c


def random(c: ConfigDict) -> ConfigDict:
    """A minute on two CPU cores. The model is randomly initialised: its pictures are noise."""
    c.model = "random"  # made in the work directory
    c.data.path = "random"  # drawn in the work directory
    c.data.resolution = 128
    c.data.buckets = "128x128,144x112"  # few shapes: each is compiled once
    c.steps = 30
    c.warmup_steps = 0
    c.batch_size = 2
    c.checkpoint_every = 15
    c.sample_every = 15
    c.sample_rows = 3
    c.learning_rate = 1e-3
    c.lora.rank = 8
    c.lora.alpha = 16.0
    c.base_dtype = c.dtype = "float32"
    c.remat = "none"
    return c
