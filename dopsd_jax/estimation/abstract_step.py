"""The step of a configuration in shapes only: nothing is loaded, allocated or compiled."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from dopsd_jax import dopsd, families
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.files import expand
from dopsd_jax.conditioning.cached import sees_picture
from dopsd_jax.data.masks import OFF
from dopsd_jax.families.base import STUDENT, TEACHER, Family, Size
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods import anchor, registry
from dopsd_jax.methods.flow_matching import Batch
from dopsd_jax.models import attention
from dopsd_jax.parallel import sharding
from dopsd_jax.run import build
from dopsd_jax.weights import hub
from dopsd_jax.weights.stored import read_config


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step to compile: image sides in pixels, caption rows with their padding.

    family, size: of the network. references: pictures of the same sides that are edited. factor:
    pixels a side of one cell of the latent; 0: as in the family's published models.
    """

    family: Family
    size: Size

    height: int
    width: int
    rows_student: int
    rows_teacher: int
    references: int = 0
    factor: int = 0

    @property
    def cell(self) -> int:
        return self.factor or self.family.LATENT_FACTOR

    @property
    def latent(self) -> tuple[int, int]:
        return self.height // self.cell, self.width // self.cell


class Program(NamedTuple):
    """The step of a configuration with the shapes and placements of what it is given.

    anchors: contexts of anchors, if there are any.
    latent: [b, h, w, c] of a micro-batch's noise. attention: the kernel. positions: of the contexts
    of student and teacher, and of anchors.
    """

    plan: build.Plan
    graphdef: nnx.GraphDef
    base: nnx.State
    batch: Batch
    anchors: Any
    latent: tuple[int, int, int, int]
    attention: str
    positions: tuple[int, ...]


class Network(NamedTuple):
    """factor: see `Workload`. origin: where the sizes come from, for people."""

    family: Family
    size: Size
    factor: int
    origin: str


def workload(pipe: Pipeline, height: int, width: int) -> Workload:
    """A step on pictures of a model folder, whose contexts come from data."""
    shape = {"height": height, "width": width, "rows_student": 0, "rows_teacher": 0}
    return Workload(pipe.family, pipe.config, **shape, factor=pipe.vae_config.factor)


def find_network(config: ConfigDict, full_size: bool) -> Network:
    """The network that is compiled, and where its sizes come from.

    That of the folder config.model; a published one if that is a name on the hub, or with
    `full_size`: the one with this name, else the family's first.
    """
    folder = expand(config.model)
    family = families.load(config.family)
    known = config.model == build.RANDOM or os.path.isdir(folder)
    if not (full_size or known) and (
        os.path.exists(folder) or not hub.HUB_ID.fullmatch(config.model)
    ):
        hub.resolve(config.model)  # says what is wrong with it
    if full_size or not known:
        ids = list(family.PUBLISHED)
        own = next((end for end in ids if config.model.lower().endswith(end.lower())), ids[0])
        origin = f"the published {own} of the family {family.NAME}"
        return Network(family, family.PUBLISHED[own], family.LATENT_FACTOR, origin)
    if config.model == build.RANDOM:
        size, factor = family.random_size(), family.LATENT_FACTOR
        return Network(family, size, factor, "the random model")
    family = families.of_folder(folder, config.family)
    path, vae = (folder / name / "config.json" for name in ("transformer", "vae"))
    size = read_config(path, family.NETWORKS["transformer"])[0]
    known = os.path.isfile(vae) and read_config(vae, family.NETWORKS["vae"])[0].factor
    return Network(family, size, known or family.LATENT_FACTOR, str(path))


def abstract_mesh(config: ConfigDict, devices: int) -> AbstractMesh:
    """config.mesh, of so many devices that are not here."""
    shape = sharding.mesh_shape(config.mesh, devices)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def make_program(
    config: ConfigDict,
    case: Workload,
    mesh: Mesh | AbstractMesh,
    platform: str,
    contexts: Sequence | None = None,
) -> Program:
    """The step of `config` on the network of `case`, in shapes only.

    `contexts`: one sample's of student and teacher, and an anchor's where there are any, instead of
    those with the rows of `case`. Raises `UserError` for what the configuration asks and the
    network or the mesh cannot do.
    """
    size = case.size
    sharding.check(mesh, size, batch_size=config.batch_size)
    features = contexts[:2] if contexts else _features(config, case)
    kernel = attention.resolve(config.attention, platform, config.dtype, size.head_dim)
    own = case.family, size, kernel, mesh
    plan, graphdef, base = build.abstract_plan(config, *own, factor=case.cell)
    latent = (config.batch_size, *case.latent, size.channels)
    batch = batch_shapes(config, case, features, mesh)
    micro = anchor.micro_batches(config, sharding.sample_devices(mesh))
    held = micro and (contexts[2] if contexts else _anchor_features(config, case))
    anchors = micro and jax.tree.map(samples(mesh, *micro), held)
    positions = tuple(map(case.family.positions, [*features, held] if micro else features))
    return Program(plan, graphdef, base, batch, anchors, latent, kernel, positions)


def samples(mesh: Mesh | AbstractMesh, count: int, size: int) -> Callable:
    """One sample's array -> that of `count` micro-batches of `size` samples."""
    place = sharding.batch_sharding(mesh)
    return lambda x: jax.ShapeDtypeStruct((count, size, *x.shape), x.dtype, sharding=place)


def batch_shapes(
    config: ConfigDict, case: Workload, contexts: Sequence, mesh: Mesh | AbstractMesh
) -> Batch:
    """The batch of a step; `contexts`: one sample's of student and teacher."""
    put = samples(mesh, config.accumulate, config.batch_size)
    student, teacher = (jax.tree.map(put, own) for own in contexts)
    needs = registry.needs(config)
    target = jax.ShapeDtypeStruct((*case.latent, case.size.channels), jnp.float32)
    region = jax.ShapeDtypeStruct((*case.latent, 1), jnp.float32)
    return Batch(
        dopsd.Contexts(student, teacher if needs.teacher else None),
        put(target) if needs.target else None,
        student if needs.prior else None,
        None if config.data.masks == OFF else put(region),
    )


def _anchor_features(config, case: Workload):
    """One anchor's context: a caption as long as the student's, with its references or none."""
    dtype, rows = jnp.dtype(config.dtype), case.rows_student
    shape = (*case.latent, case.references * config.anchor.edit)
    return case.family.abstract_features(case.size, STUDENT, rows, dtype, *shape)


def _features(config, case: Workload) -> list:
    """One sample's context of each role. Raises `UserError` for sizes that cannot be."""
    family, side = case.family, case.cell * case.size.patch
    shown = TEACHER if sees_picture(config, family) else STUDENT
    most = [cells * case.cell for cells in family.largest_latent(case.size)]
    faults = [
        f"--{name}: {pixels} must be a multiple of {side}, from {side} to {limit}"
        for name, pixels, limit in (
            ("height", case.height, most[0]),
            ("width", case.width, most[1]),
        )
        if pixels % side or not 0 < pixels <= limit
    ]
    if case.references and not family.EDITING:
        faults.append(
            f"--references: {case.references}: models of the family {family.NAME} edit no "
            "pictures; leave it out, and config.data.references too"
        )
    found, dtype = [], jnp.dtype(config.dtype)
    for role, name, rows in (
        (STUDENT, "student_rows", case.rows_student),
        (shown, "teacher_rows", case.rows_teacher),
    ):
        try:
            shape = (*case.latent, case.references)
            found.append(family.abstract_features(case.size, role, rows, dtype, *shape))
        except UserError as error:
            faults += [f"--{name}: {problem}" for problem in error.problems]
    raise_if(faults)
    return found
