"""Makes what a configuration describes: model and step. Shared by all programs."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from dopsd_jax import dopsd, families
from dopsd_jax.common.config_fields import as_list, name_or_list
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.files import expand
from dopsd_jax.conditioning.cached import sees_picture
from dopsd_jax.data.prepared_parts import names_prepared
from dopsd_jax.dopsd import Denoiser
from dopsd_jax.families.base import Family, Size
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods import registry
from dopsd_jax.methods.losses import Schedule
from dopsd_jax.methods.options import OTHER_CAPTION
from dopsd_jax.models import fp8, kinds, layers, quantised
from dopsd_jax.parallel import sharding
from dopsd_jax.run.data_set import RANDOM, largest_size
from dopsd_jax.run.workdir import as_begun
from dopsd_jax.training import optimizers, state, train_step
from dopsd_jax.training.trainable import VARIABLES, Trained, trained
from dopsd_jax.weights import hub
from dopsd_jax.weights.model_folder import INDEX


class Plan(NamedTuple):
    """The step of a configuration.

    grid: the noise levels of a picture of the largest size of the data; schedule: of any size.
    abstract_state: shapes, types and placement of the training state; nothing is allocated.
    initial_state: the state before step 1, from the trained part of the network (donated).
    step: the compiled optimizer step; see `train_step.make_step`. gap: see `train_step.make_gap`.
    """

    grid: tuple[float, ...]
    schedule: Schedule
    net: Denoiser
    trained: Trained
    abstract_state: state.TrainState
    initial_state: Callable[[nnx.State], state.TrainState]
    step: Callable
    gap: Callable

    def describe(self) -> list[str]:
        """What is trained, in a few lines."""
        lines = self.trained.describe(self.abstract_state.student)
        return [*lines, "grid: " + ", ".join(f"{sigma:.4f}" for sigma in self.grid)]


def open_pipeline(
    config: ConfigDict, workdir: Path, mesh: Mesh | None = None, shown: bool | None = None
) -> tuple[Pipeline, dict]:
    """The model of config.model and what to record of its origin; nothing is loaded yet.

    `shown`: whether a teacher is shown pictures; None: as config.method says. Its `remat` is none
    with config.remat = auto: a program that trains asks `estimation.remat`.
    """
    if config.model == RANDOM:
        folder = workdir / "random_model"
        if not os.path.exists(folder / INDEX):
            families.load(config.family).write_random_model(folder)
        model = hub.Resolved(folder, None)
    else:
        model = hub.resolve(as_begun(workdir, config, "model"))
    family = families.of_folder(model.path, config.family)
    contexts = (*family.CONTEXTS, OTHER_CAPTION)
    asked = shown or registry.needs(config).teacher  # else the field cannot be set
    if asked and config.teacher.context not in contexts:
        raise UserError(
            f"config.teacher.context: {config.teacher.context!r} is not one of "
            f"{', '.join(contexts)}, which the model's family, {family.NAME}, has"
        )
    shown = sees_picture(config, family) if shown is None else shown
    encodes = shown and not names_prepared(config.data.path)
    vlm = find_vlm(config, workdir, model, family, encodes)
    place = None
    if mesh is not None:
        away = keeps_base_away(config)
        place = lambda path, shape: sharding.base_sharding(path, shape, mesh, away)
    pipe = family.Pipeline(
        family,
        model.path,
        beside={} if vlm is None else {"vlm": vlm.path},
        dtype=config.dtype,
        base_dtype=config.base_dtype,
        attention="xla",
        remat="none" if config.remat == kinds.AUTO else config.remat,
        sharding_for=place,
        mesh=mesh,
        trained=VARIABLES[config.train],
    )
    pipe.use_attention(config.attention)
    return pipe, {"model_revision": model.revision, "vlm_revision": vlm and vlm.revision}


def chosen(pipe: Pipeline) -> dict[str, str]:
    """What was settled at the start, for the record of a run."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {"attention": pipe.attention, "remat": pipe.remat, "xla_flags": flags}


def keeps_base_away(config: ConfigDict) -> bool:
    """Whether the layers of the frozen network lie in the host's memory."""
    return "base" in as_list(config.offload)


def find_vlm(
    config: ConfigDict, workdir: Path, model: hub.Resolved, family: Family, encodes: bool
) -> hub.Resolved | None:
    """The vision-language model of config.teacher.vlm, or in the model's folder; None without one.

    `encodes`: whether it will be asked: else none is downloaded.
    """
    if "vlm" not in family.NETWORKS or config.model == RANDOM:
        return None
    here = os.path.isdir(expand(config.teacher.vlm))
    if config.teacher.vlm and (here or encodes):
        return hub.resolve(as_begun(workdir, config, "teacher.vlm"), patterns=hub.ROOT)
    inside = hub.Resolved(model.path / "vlm", model.revision)
    if encodes and not os.path.isdir(inside.path):
        raise UserError(
            f"config.teacher.vlm: is empty and {inside.path} does not exist; name the folder or "
            "hub id of the vision-language model"
        )
    return inside


def notes(config: ConfigDict, pipe: Pipeline) -> list[str]:
    """What to say of the model before a run."""
    own = [] if registry.method(config).base else pipe.notes()
    return [*own, *registry.notes(config)]


def check_method(
    config: ConfigDict, pipe: Pipeline, begun: bool = False, asked: Collection[str] = ()
) -> None:
    """Raises `UserError` for a grid, a loss, targets or a LoRA file that do not fit the model, and
    for products that the devices have not.

    begun: the run has a checkpoint, which holds what the file gave; the file may be gone. asked:
    fields that were set on the command line; those of other families are faults.
    """
    raise_if(
        f"config.{name}: has no effect with models of the family {pipe.family.NAME}; leave it out"
        for name in asked
        if name in _of_others(pipe.family)
    )
    check_products(config, pipe.mesh)
    schedule = make_schedule(config, pipe.family, pipe.scheduler)
    grid = schedule.grid(*_largest_latent(config, pipe.vae_config.factor, pipe.size_multiple))
    loss, loss_steps = name_or_list(config.loss), name_or_list(config.loss_steps)
    dopsd.make_nodes(grid, loss, loss_steps, jax.random.key(0), registry.told(config))
    what = trained(config, pipe.family, pipe.config)
    if not begun:
        what.check()


def check_products(config: ConfigDict, mesh: Mesh | AbstractMesh | None) -> None:
    """Raises `UserError` for config.teacher.products that the devices here have not."""
    if registry.rounds(config) and isinstance(mesh, Mesh):
        device = mesh.devices.flat[0]
        capability = str(getattr(device, "compute_capability", ""))
        fp8.check_device(device.platform, device.device_kind, capability)


def _of_others(family: Family) -> set[str]:
    """Fields that have an effect with models of other families only."""
    fields = {
        name: {field.name for field in own.FIELDS}
        for name, own in zip(families.FAMILIES, families.options(), strict=True)
    }
    vlm = {"teacher.vlm"} if "vlm" not in family.NETWORKS else set()
    return (set().union(*fields.values()) | vlm) - fields[family.NAME]


def make_schedule(config: ConfigDict, family: Family, scheduler: Any) -> Schedule:
    """config.grid, and the shift of noise levels, for latents of any size."""
    name = name_or_list(config.grid)
    return Schedule(
        lambda height, width: family.grid(name, scheduler, height, width),
        lambda height, width: family.shift(scheduler, height, width),
    )


def _largest_latent(config: ConfigDict, factor: int, step: int = 1) -> tuple[int, int]:
    """Height and width of the latent of the largest size of the data; see `largest_size`."""
    size = largest_size(config, step)
    return size.height // factor, size.width // factor


def make_plan(
    config: ConfigDict,
    pipe: Pipeline,
    mesh: Mesh,
    before: tuple[Plan, nnx.GraphDef] | None = None,
) -> Plan:
    """The training step around the pipeline's transformer, which is loaded.

    before: an `abstract_plan`, which is the answer if the network came out as it foresaw.
    """
    what = trained(config, pipe.family, pipe.config)
    what.attach(pipe.transformer)
    parts = pipe.split
    if before is not None and before[1] == parts[0]:
        return before[0]
    made_for = pipe.scheduler, pipe.vae_config.factor
    return _plan(config, pipe.family, what, parts, *made_for, mesh)


def abstract_plan(
    config: ConfigDict,
    family: Family,
    size: Size,
    attention: str,
    mesh: Mesh,
    scheduler: Any = None,
    factor: int | None = None,
) -> tuple[Plan, nnx.GraphDef, nnx.State]:
    """`make_plan` for a network that is not loaded, with its graph and base: shapes, placements.

    `attention`: a resolved name of `attention.IMPLEMENTATIONS`. scheduler, factor: of the
    model and of its latent, pixels a side of a cell; None: those of the published one.
    """
    what = trained(config, family, size)

    def build():
        network = family.build(
            size, dtype=config.dtype, attention=attention, remat=config.remat, rngs=nnx.Rngs(0)
        )
        if config.base_dtype in quantised.SCHEMES:
            quantised.quantised(network, config.base_dtype)
        what.attach(network)
        return network

    graphdef, student, base = nnx.split(nnx.eval_shape(build), what.variables, ...)
    stored = jnp.dtype(quantised.stored_type(config.base_dtype))
    cast = lambda leaf: leaf.replace(jax.ShapeDtypeStruct(leaf.shape, stored))
    flat = [(p, cast(v) if type(v) is nnx.Param else v) for p, v in nnx.to_flat_state(base)]
    base = nnx.from_flat_state(flat)
    scheduler = family.SCHEDULER if scheduler is None else scheduler
    made_for = scheduler, factor or family.LATENT_FACTOR
    plan = _plan(config, family, what, (graphdef, student, base), *made_for, mesh)
    places = sharding.state_shardings(base, mesh, keeps_base_away(config))
    return plan, graphdef, sharding.abstract(base, places)


def _plan(
    config, family: Family, what: Trained, parts: tuple, scheduler, factor: int, mesh: Mesh
) -> Plan:
    graphdef, student, _ = parts
    schedule = make_schedule(config, family, scheduler)
    exact = net = family.denoiser(graphdef)
    if registry.rounds(config):
        check_products(config, mesh)
        net = exact._replace(rounded=family.denoiser(layers.rounded(*parts)))
    teacher = registry.teacher(config)
    tx = optimizers.optimizer(config)
    keep_start = registry.start(config) == "copy"
    create = lambda student: state.create(student, teacher, tx, keep_start)
    abstract = jax.eval_shape(create, student)
    placement = state.offload(
        sharding.state_shardings(abstract, mesh), abstract, as_list(config.offload)
    )
    jitted = jax.jit(create, out_shardings=placement, donate_argnums=0)
    step = make_step(config, net, schedule, tx, placement)

    def initial_state(student: nnx.State) -> state.TrainState:
        return jitted(jax.device_put(what.start(student), placement.student))

    return Plan(
        schedule.grid(*_largest_latent(config, factor)),
        schedule,
        net,
        what,
        sharding.abstract(abstract, placement),
        initial_state,
        step,
        make_gap(config, exact, schedule),  # a judge does not round
    )


def make_gap(config: ConfigDict, net: Denoiser, schedule: Schedule) -> Callable:
    """The gap of a state on one batch, by config.method; see `train_step.make_gap`.

    Of all nodes where the steps draw some: a batch would be judged at the same few for ever.
    """
    if isinstance(name_or_list(config.loss_steps), str):
        config = config.copy_and_resolve_references()
        config.loss_steps = "all"
    own = registry.loss_function(config, net, schedule), registry.draw(config)
    return train_step.make_gap(*own, registry.start(config), registry.told(config) != "all")


def make_step(
    config: ConfigDict,
    net: Denoiser,
    schedule: Schedule,
    tx: optax.GradientTransformation,
    placement: state.TrainState | None = None,
    seed: int | jax.Array | None = None,
) -> Callable:
    """The compiled optimizer step of a configuration, by config.method; see `train_step.make_step`.

    `seed`: instead of config.seed; traced, one program serves many.
    """
    method = registry.loss_function(config, net, schedule)
    teacher, lr = registry.teacher(config), optimizers.schedule(config)
    skip, draw = config.nonfinite == "skip", registry.draw(config)
    seed = config.seed if seed is None else seed
    held = None
    if config.anchor.share:
        loss = registry.anchor_loss(config, net, schedule)
        held = train_step.Anchor(loss, config.anchor.share)
    own = method, tx, teacher, lr, seed, placement, skip, draw
    return train_step.make_step(*own, registry.start(config), held, registry.told(config) != "all")
