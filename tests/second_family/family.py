"""The family: see `dopsd_jax.families.base`."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax import random_model
from dopsd_jax.common.flow import check_grid, shifted_grid
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.data.padding import pad_stack
from dopsd_jax.dopsd import Denoiser
from dopsd_jax.families.base import STUDENT, TEACHER
from dopsd_jax.families.work import Work
from dopsd_jax.families.zimage.networks import ZIMAGE
from dopsd_jax.families.zimage.pipeline import ZImagePipeline
from dopsd_jax.parallel.sharding import to_device
from dopsd_jax.weights.networks import DIFFUSERS_BASE, Network
from second_family.network import Config, Transformer, names
from second_family.options import CONTEXTS, EDITING

__all__ = ["CONTEXTS", "EDITING"]

NAME, LATENT_FACTOR, DEPLOYED_STEPS = "second", 8, 4
PUBLISHED, SCHEDULER, RANDOM = {"Second": Config(64, 4, 2560)}, 1.0, Config(32, 2, 64)
TEXT_ENCODERS = {}
LORA_PRESETS = {"blocks": ("to_q", "to_k", "to_v", "to_out")}
TEXT_ROWS = 64
ROWS = (TEXT_ROWS, TEXT_ROWS)


def build(size, *, rngs, **options):
    return Transformer(size, rngs=rngs, **options)


NETWORKS = ZIMAGE | {
    "transformer": Network(
        "transformer", DIFFUSERS_BASE, Config.from_dict, lambda c, rngs: build(c, rngs=rngs), names
    )
}


def read_scheduler(content, where):
    fields = Fields(content, where)
    shift = fields.positive("shift")
    fields.finish()
    return shift


def shift(scheduler, height, width):
    return scheduler * (1 + height * width / 64)


def deployed_grid(steps, scheduler, height, width):
    return shifted_grid(steps, shift(scheduler, height, width))


def grid(name, scheduler, height, width):
    own = name == "own4"
    return deployed_grid(4, scheduler, height, width) if own else check_grid(name, "config.grid")


class Context(NamedTuple):
    features: Any
    lengths: Any
    reference: Any = None


def denoiser(graphdef):
    network = lambda trained, base: nnx.merge(graphdef, to_device(trained), base)

    def velocity(trained, base, x, sigma, context, text):
        sigma = jnp.broadcast_to(sigma, len(x))
        return network(trained, base)(x, sigma, text, context.lengths, context.reference)

    return Denoiser(lambda t, b, context: network(t, b).embed(context.features), velocity)


def collate(features, rows=None):
    texts = [one["features"] for one in features]
    padded = pad_stack(texts, rows["features"] if rows else max(map(len, texts)))
    given = [one["reference"] for one in features if "reference" in one]
    return Context(*padded, np.stack(given) if given else None)


def abstract_features(size, role, rows, dtype, height, width, references=0):
    shape = jax.ShapeDtypeStruct
    reference = shape((height, width, size.channels), jnp.float32) if role == TEACHER else None
    return Context(shape((rows, size.text), dtype), shape((), jnp.int32), reference)


def positions(context):
    cells = () if context.reference is None else context.reference.shape[-3:-1]
    return context.features.shape[-2] + (math.prod(cells) if cells else 0)


def largest_latent(size):
    return 64, 64


def image_tokens(size, height, width):
    return height * width


def context_work(size, rows, chosen, products, full=False):
    return Work(once=2 * rows * size.text * size.dim)


def velocity_work(size, height, width, rows, chosen, products, full=False):
    tokens = height * width + rows
    linear = 2 * tokens * 4 * size.dim**2 * size.layers
    return Work(trained=linear, attention=4 * tokens**2 * size.dim * size.layers)


class Pipeline(ZImagePipeline):
    """Z-Image's text encoder; the teacher is shown the picture by the autoencoder."""

    ENCODERS = (("text_encoder",), ("text_encoder", "vae"))

    def options(self, role, teacher):
        return {}

    def limits(self, role):
        return {"features": jax.ShapeDtypeStruct((TEXT_ROWS, self.config.text), self.dtype)}

    def request(self, role, prompt, *, sizes=(), options=None, limits_of=None, where=""):
        found = super().request(STUDENT, prompt, limits_of=limits_of)
        if role == STUDENT:
            return found
        latent = jax.ShapeDtypeStruct(self.latent_shape(*sizes[0]), jnp.float32)
        shapes = found.shapes | {"reference": latent}
        return found._replace(shapes=shapes, group=(found.group, sizes[0]))

    def encode(self, role, requests, pictures, options=None):
        found = super().encode(STUDENT, requests, [])
        if role == STUDENT:
            return found
        latents = np.asarray(self.encode_image(np.stack([picture for (picture,) in pictures])))
        return [one | {"reference": own} for one, own in zip(found, latents, strict=True)]


def random_size():
    return RANDOM


def write_random_model(folder):
    folder = random_model.write_random_model(Path(folder))
    shutil.rmtree(folder / "vlm")
    shutil.rmtree(folder / "transformer")
    random_model.write_network(folder / "transformer", RANDOM.to_dict(), names(RANDOM), "F32", 0)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "SecondPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
