"""FLUX.2-klein, 4B and 9B.

`configs/flux2_klein.py` or `:4b`: a LoRA of an identity or a concept by the editing branch: the
teacher is given the picture as reference; set config.data.path. `:9b`: the same. `:4b_full`:
every parameter, for several large devices. `:random`, `:random_full`: the same programs on a
network with random weights and drawn pictures, for tests.
"""

from ml_collections import ConfigDict

from dopsd_jax.config.fields import defaults
from dopsd_jax.config.loading import choose


def get_config(arg: str | None = None) -> ConfigDict:
    name = choose(arg, ("4b", "9b", "4b_full", "9b_full", "random", "random_full"))
    c = defaults()
    c.family = "flux2_klein"
    c.teacher.context = "edit_ref"
    size = name.partition("_")[0]
    c.model = f"black-forest-labs/FLUX.2-klein-{size.upper()}"
    c.learning_rate = 2e-5  # the released recipe's
    c.steps = 3001
    if name.endswith("full"):
        full(c)
    if name.startswith("random"):
        random(c)
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
