"""The step of a configuration in shapes only: nothing is loaded, allocated or compiled."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from dopsd_jax import dopsd
from dopsd_jax.common.errors import raise_if
from dopsd_jax.estimation import flops
from dopsd_jax.families.zimage import family
from dopsd_jax.methods import registry
from dopsd_jax.methods.flow_matching import Batch
from dopsd_jax.models import attention, zimage
from dopsd_jax.parallel import sharding
from dopsd_jax.random_model import configs as random_configs
from dopsd_jax.run import build
from dopsd_jax.weights import networks
from dopsd_jax.weights.stored import read_config

SHIFT = 3.0  # of the published scheduler: a number in the program, it changes nothing else
VAE_FACTOR = 8  # pixels of a latent's side


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to compile: image sides in pixels, caption rows with their padding."""

    height: int
    width: int
    rows_student: int
    rows_teacher: int

    @property
    def latent(self) -> tuple[int, int]:
        return self.height // VAE_FACTOR, self.width // VAE_FACTOR

    def tokens(self, size: zimage.ZImageConfig) -> set[int]:
        """Lengths of the rows of tokens that the network sees: captions, image, both."""
        image = flops.image_tokens(size, *self.latent)
        captions = {self.rows_student, self.rows_teacher}
        return {image, *captions, *(image + rows for rows in captions)}


class Program(NamedTuple):
    """The step of a configuration with the shapes and placements of what it is given.

    latent: [b, h, w, c] of a micro-batch's noise. attention: the kernel.
    """

    plan: build.Plan
    graphdef: nnx.GraphDef
    base: nnx.State
    batch: Batch
    latent: tuple[int, int, int, int]
    attention: str


def network_size(model: str, full_size: bool) -> tuple[zimage.ZImageConfig, str]:
    """The network that is compiled, and where its sizes come from.

    That of the folder `model`; the published one if `model` is not a folder here or `full_size`.
    """
    path = Path(model).expanduser() / "transformer" / "config.json"
    if not full_size and model == build.RANDOM:
        sizes = zimage.ZImageConfig.from_dict(
            random_configs.transformer(random_configs.Size()), build.RANDOM
        )
        return sizes, "the miniature"
    if not full_size and path.parent.parent.is_dir():
        return read_config(path, networks.ZIMAGE["transformer"])[0], str(path)
    return zimage.ZImageConfig(), "the published Z-Image-Turbo"


def make_program(
    config: ConfigDict,
    size: zimage.ZImageConfig,
    case: Case,
    mesh: Mesh | AbstractMesh,
    platform: str,
) -> Program:
    """The step of `config` on a network of `size`, in shapes only.

    Raises `UserError` for what the configuration asks and the network or the mesh cannot do.
    """
    sharding.check(mesh, size, batch_size=config.batch_size)
    _check(size, case)
    kernel = attention.resolve(config.attention, platform, config.dtype, size.head_dim)
    plan, graphdef, base = build.abstract_plan(config, size, kernel, SHIFT, mesh)
    latent = (config.batch_size, *case.latent, size.channels)
    batch = _batch(config, size, case, mesh)
    return Program(plan, graphdef, base, batch, latent, kernel)


def _batch(config, size, case: Case, mesh: Mesh) -> Batch:
    samples, place = (config.accumulate, config.batch_size), sharding.batch_sharding(mesh)
    array = lambda shape, dtype: jax.ShapeDtypeStruct((*samples, *shape), dtype, sharding=place)

    def context(rows: int) -> family.Context:
        features = array((rows, size.caption_dim), jnp.dtype(config.dtype))
        return family.Context(features, array((), jnp.int32))

    needs, student = registry.needs(config), context(case.rows_student)
    return Batch(
        dopsd.Contexts(student, context(case.rows_teacher) if needs.teacher else None),
        array((*case.latent, size.channels), jnp.float32) if needs.target else None,
        student if needs.prior else None,
    )


def _check(size: zimage.ZImageConfig, case: Case) -> None:
    side = VAE_FACTOR * size.patch
    most = [limit * side for limit in size.axes_lens[1:]]
    raise_if(
        [
            f"--{name}: {pixels} must be a multiple of {side}, from {side} to {limit}"
            for name, pixels, limit in (
                ("height", case.height, most[0]),
                ("width", case.width, most[1]),
            )
            if pixels % side or not 0 < pixels <= limit
        ]
        + [
            f"--{name}: {rows} must be a multiple of {zimage.PAD_MULTIPLE}, from "
            f"{zimage.PAD_MULTIPLE} to {size.max_caption}"
            for name, rows in (
                ("student_rows", case.rows_student),
                ("teacher_rows", case.rows_teacher),
            )
            if rows % zimage.PAD_MULTIPLE or not 0 < rows <= size.max_caption
        ]
    )
