"""Z-Image-Turbo.

`configs/zimage.py` or `:lora`: the released LoRA recipe with anchors, which hold ordinary prompts
where they were (docs/results.md); set config.data.path, and config.model and config.teacher.vlm to
folders if you have them. `:released`: the recipe as released, without anchors. `:12gb`, `:16gb`,
`:24gb`, `:48gb`, `:80gb`: `:lora` for one GPU with so much memory (docs/gpus.md). `:full`: every
parameter of the transformer, for several large devices. `:tiny`, `:tiny_full`: the same programs on
the trained miniature, minutes on a laptop. `:random`, `:random_full`: on a network with random
weights and drawn pictures, for tests.
"""

from ml_collections import ConfigDict

from dopsd_jax.config.fields import defaults
from dopsd_jax.config.find import shipped
from dopsd_jax.config.loading import choose

ANCHORS = 0.125  # the least share that kept ordinary prompts: docs/results.md
# What the recipe must give up on one GPU. A step is of four images, as in the recipe.
ONE_IMAGE = {"batch_size": 1, "accumulate": 4}
KEPT = {"remat": "dots"}  # where one image leaves room for what it makes: no product is done twice
CARDS = {
    "12gb": {
        **ONE_IMAGE,
        **{"base_dtype": "int8", "data.resolution": 768, "lora.rank": 32, "lora.alpha": 64.0},
    },
    "16gb": {**ONE_IMAGE, "base_dtype": "int8"},
    "24gb": ONE_IMAGE,
    "48gb": {**ONE_IMAGE, **KEPT},
    "80gb": {**ONE_IMAGE, **KEPT},
}


def get_config(arg: str | None = None) -> ConfigDict:
    small = "tiny", "tiny_full", "random", "random_full"
    name = choose(arg, ("lora", "released", *CARDS, "full", *small))
    c = defaults()
    c.model = "Tongyi-MAI/Z-Image-Turbo"
    c.teacher.vlm = "Qwen/Qwen3-VL-4B-Instruct"
    if name in ("lora", *CARDS):
        c.anchor.share = ANCHORS
    c.update_from_flattened_dict(CARDS.get(name, {}))
    if name.endswith("full"):
        full(c)
    if name.startswith("tiny"):
        tiny(c)
    if name.startswith("random"):
        random(c)
    if name in ("tiny_full", "random_full"):
        c.learning_rate = 1e-4
    return c


def full(c: ConfigDict) -> ConfigDict:
    """No settings are published for it; these are the usual ones for its size."""
    c.train = "full"
    c.base_dtype = "float32"  # what is trained is kept in float32
    c.learning_rate = 1e-5  # a tenth of the adapters': every weight moves
    c.warmup_steps = 100
    c.batch_size = 8
    c.mesh.data = 1
    c.mesh.fsdp = -1  # student, teacher, moments and gradient: 24.6 GB each, split over all devices
    c.keep_checkpoints = 2  # of 98 GB each
    c.sample_every = 250
    return c


def tiny(c: ConfigDict) -> ConfigDict:
    """Minutes on two CPU cores: a new word, from six pictures (examples/miniature/README.md)."""
    miniature = shipped("examples", "miniature")
    c.model = str(miniature / "model")
    c.teacher.vlm = ""
    c.teacher.min_pixels = c.teacher.max_pixels = 64 * 64
    c.data.path = str(miniature / "dax")
    c.data.resolution = 64
    c.data.buckets = "64x64"
    c.anchor.share = 0.25
    c.anchor.prompts = str(miniature / "ordinary.txt")
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


def random(c: ConfigDict) -> ConfigDict:
    """A minute on two CPU cores. The model is randomly initialised: its pictures are noise."""
    c.model = "random"  # made in the work directory
    c.teacher.vlm = ""
    c.teacher.min_pixels = 64 * 64
    c.teacher.max_pixels = 128 * 128
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
