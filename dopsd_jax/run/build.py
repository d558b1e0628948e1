"""Makes what a configuration describes: model, data, step. Shared by all programs."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dopsd_jax import dopsd, families
from dopsd_jax.common.atomic import is_remote
from dopsd_jax.common.config_fields import as_list, as_numbers, as_paths, highest, name_or_list
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.conditioning.cached import sees_picture
from dopsd_jax.conditioning.encoding import TO_BUCKET
from dopsd_jax.data.buckets import Bucket, make_buckets, parse_buckets
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.data.dataset import Dataset, ReferenceSize, measure
from dopsd_jax.data.images import ImageLimits
from dopsd_jax.data.picture_index import PictureIndex
from dopsd_jax.data.prepared import Prepared
from dopsd_jax.data.prepared_parts import AGAIN, names_prepared
from dopsd_jax.data.rows import Rows, load_sets
from dopsd_jax.data.table import View
from dopsd_jax.data.varied import CaptionVariants
from dopsd_jax.data.views import views_of
from dopsd_jax.dopsd import Denoiser
from dopsd_jax.families.base import Family, Size
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods import registry
from dopsd_jax.methods.losses import Schedule
from dopsd_jax.methods.options import OTHER_CAPTION
from dopsd_jax.models import attention, quantised
from dopsd_jax.parallel import sharding
from dopsd_jax.random_model.synthetic import write_folder
from dopsd_jax.training import optimizers, state, train_step
from dopsd_jax.training.trainable import VARIABLES, Trained, trained
from dopsd_jax.weights import hub
from dopsd_jax.weights.model_folder import INDEX

BUCKETS = "buckets (config.data.resolution, config.data.buckets)"
# Fields of config.data that the readers of rows take as they are.
ROW_OPTIONS = (
    "caption_extension",
    "caption_lines",
    "folder_captions",
    "folder_repeats",
    "image_key",
    "trigger",
)
RANDOM = "random"  # config.model, config.data.path: made in the work directory


class Plan(NamedTuple):
    """The step of a configuration.

    grid: the noise levels of a square picture of config.data.resolution, the highest; schedule: of
    any size.
    abstract_state: shapes, types and placement of the training state; nothing is allocated.
    initial_state: the state before step 1, from the trained part of the network (donated).
    step: the compiled optimizer step; see `train_step.make_step`.
    """

    grid: tuple[float, ...]
    schedule: Schedule
    net: Denoiser
    trained: Trained
    abstract_state: state.TrainState
    initial_state: Callable[[nnx.State], state.TrainState]
    step: Callable

    def describe(self) -> list[str]:
        """What is trained, in a few lines."""
        lines = self.trained.describe(self.abstract_state.student)
        return [*lines, "grid: " + ", ".join(f"{sigma:.4f}" for sigma in self.grid)]


def open_pipeline(
    config: ConfigDict, workdir: Path, mesh: Mesh | None = None, shown: bool | None = None
) -> tuple[Pipeline, dict]:
    """The model of config.model and what to record of its origin; nothing is loaded yet.

    `shown`: whether a teacher is shown pictures; None: as config.method says.
    """
    if config.model == RANDOM:
        folder = workdir / "random_model"
        if not (folder / INDEX).exists():
            families.load(config.family).write_random_model(folder)
        model = hub.Resolved(folder, None)
    else:
        model = hub.resolve(config.model)
    family = families.of_folder(model.path, config.family)
    contexts = (*family.CONTEXTS, OTHER_CAPTION)
    if config.teacher.context not in contexts:
        raise UserError(
            f"config.teacher.context: {config.teacher.context!r} is not one of "
            f"{', '.join(contexts)}, which the model's family, {family.NAME}, has"
        )
    shown = sees_picture(config, family) if shown is None else shown
    vlm = find_vlm(config, model, family, shown and not names_prepared(config.data.path))
    place = None
    if mesh is not None:
        place = lambda path, shape: jax.NamedSharding(
            mesh, sharding.parameter_spec(path, shape, mesh)
        )
    pipe = family.Pipeline(
        family,
        model.path,
        beside={} if vlm is None else {"vlm": vlm.path},
        dtype=config.dtype,
        base_dtype=config.base_dtype,
        attention="xla",
        remat=config.remat,
        sharding_for=place,
        trained=VARIABLES[config.train],
    )
    dtype, size = jnp.dtype(config.dtype), pipe.config.head_dim
    pipe.attention = attention.resolve(config.attention, jax.default_backend(), dtype, size)
    return pipe, {"model_revision": model.revision, "vlm_revision": vlm and vlm.revision}


def find_vlm(
    config: ConfigDict, model: hub.Resolved, family: Family, encodes: bool
) -> hub.Resolved | None:
    """The vision-language model of config.teacher.vlm, or in the model's folder; None without one.

    `encodes`: whether it will be asked: else none is downloaded.
    """
    if "vlm" not in family.NETWORKS or config.model == RANDOM:
        return None
    here = Path(config.teacher.vlm).expanduser().is_dir()
    if config.teacher.vlm and (here or encodes):
        return hub.resolve(config.teacher.vlm, patterns=hub.ROOT)
    inside = hub.Resolved(model.path / "vlm", model.revision)
    if encodes and not inside.path.is_dir():
        raise UserError(
            f"config.teacher.vlm: is empty and {inside.path} does not exist; name the folder or "
            "hub id of the vision-language model"
        )
    return inside


def open_data(config: ConfigDict, workdir: Path, pipe: Pipeline) -> Dataset:
    """The data set of config.data: every row checked, every new picture opened once."""
    buckets = data_buckets(config, pipe.size_multiple)
    levels = data_levels(config, pipe.size_multiple)
    if names_prepared(config.data.path):
        keys, other = asked_keys(config), registry.teacher_key(config)
        keys += (other,) if keys and other else ()
        prepared = Prepared(*as_paths(config.data.path), keys or None)
        prepared.check({"buckets": [list(b) for b in buckets]}, {"buckets": BUCKETS})
        raise_if(
            f"{config.data.path}: is damaged (a row of {bucket}, which is no bucket); {AGAIN}"
            for bucket in sorted({*prepared.buckets} - {*buckets})
        )
        notes = (f"{config.data.path}: prepared; no picture and no encoder is read",)
        dataset = Dataset(
            prepared.rows,
            prepared.infos,
            tuple(prepared.buckets),
            prepared.prompt_keys,
            notes,
            prepared,
            prepared.references,
        )
    else:
        rows, index = open_rows(config, workdir), picture_index(config, workdir)
        size = reference_size(config, pipe)
        dataset = measure(
            rows, buckets, limits(config), index=index, reference_size=size, levels=levels
        )
    check_references(config, pipe.family, dataset)
    return dataclasses.replace(dataset, prompt_keys=trained_keys(config, dataset.prompt_keys))


def reference_size(config: ConfigDict, pipe: Pipeline) -> ReferenceSize:
    """In which size the model is given a picture that is edited: config.data.reference_crop.

    Raises `UserError` if rows edit pictures and the model does not.
    """
    family = pipe.family
    if config.data.references and not family.EDITING:
        raise UserError(
            f"config.data.references: models of the family {family.NAME} edit no pictures; unset it"
        )

    def own(bucket: Bucket, height: int, width: int, where: str) -> Bucket:
        height, width = pipe.reference_size(height, width, where)
        return Bucket(width, height)

    return (lambda bucket, *_: bucket) if config.data.reference_crop == TO_BUCKET else own


def check_references(config: ConfigDict, family: Family, dataset: Dataset) -> None:
    """Raises `UserError` where the teacher's context is not for rows like these."""
    context, there = config.teacher.context, bool(dataset.references)
    if not registry.needs(config).teacher or context == OTHER_CAPTION:
        return
    if there != (context in family.EDITING):
        other = [name for name in family.CONTEXTS if (name in family.EDITING) == there]
        what = "edit pictures" if there else "edit none (config.data.references)"
        raise UserError(
            f"config.teacher.context: {context} does not fit the rows of {config.data.path}, which "
            f"{what}; use {' or '.join((*other, OTHER_CAPTION))}"
        )


def asked_keys(config: ConfigDict) -> tuple[str, ...]:
    """The keys of the captions that are asked for; none: all that every row has."""
    keys, key = tuple(as_list(config.data.prompt_keys)), config.data.caption_key
    if key and keys:
        raise UserError(
            "config.data.caption_key: is set beside config.data.prompt_keys, and both say where "
            "captions are; set one"
        )
    return (key,) if key else keys


def trained_keys(config: ConfigDict, found: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of the student's captions, of those that the rows have.

    Without config.data.prompt_keys the teacher's key is not among them: with the same captions
    there is nothing to learn.
    """
    other, asked = registry.teacher_key(config), asked_keys(config)
    if other is not None and other not in found:
        raise UserError(
            f"config.teacher.prompt_key: {other!r} is not a caption key of {config.data.path}, "
            f"which has {', '.join(found)}"
        )
    keys = tuple(key for key in found if (key in asked if asked else key != other))
    if not keys:
        raise UserError(
            f"config.teacher.prompt_key: {other!r} is the only caption key that every row has, so "
            "student and teacher would get the same; name the student's in "
            "config.data.prompt_keys"
        )
    return keys


def data_levels(config: ConfigDict, step: int) -> tuple[tuple[Bucket, ...], ...]:
    """The sizes that pictures are cut to, by resolution, from the lowest."""
    sizes, resolutions = as_list(config.data.buckets), as_numbers(config.data.resolution)
    if sizes and len(resolutions) > 1:
        raise UserError(
            "config.data.buckets: is set beside several numbers in config.data.resolution, and "
            "both say which sizes there are; unset it, or keep one resolution"
        )
    if sizes:
        return (parse_buckets(sizes, step),)
    return tuple(make_buckets(resolution, step) for resolution in sorted(resolutions))


def data_buckets(config: ConfigDict, step: int) -> tuple[Bucket, ...]:
    """The sizes that pictures are cut to, each once."""
    return tuple(dict.fromkeys(itertools.chain(*data_levels(config, step))))


def open_rows(config: ConfigDict, workdir: Path) -> Rows:
    """The rows of config.data; their pictures are not opened."""
    data = config.data
    return load_sets(
        data_paths(config, workdir),
        as_list(data.weights),
        prompt_keys=asked_keys(config) or None,
        variants=caption_variants(config),
        views=picture_views(config),
        data_root=data.root or None,
        cache=FeatureCache(cache_folder(config, workdir)),
        teacher_key=registry.teacher_key(config),
        references=as_list(config.data.references),
        **{name: data[name] for name in ROW_OPTIONS},
    )


def caption_variants(config: ConfigDict) -> CaptionVariants | None:
    """More captions of each row; the teacher's own keep the order of their tags."""
    data = config.data
    if not data.shuffle_tags and not data.caption_dropout:
        return None
    orders = data.tag_variants if data.shuffle_tags else 1
    teacher_key, empty = registry.teacher_key(config), data.caption_dropout > 0
    return CaptionVariants(orders, data.keep_tags, teacher_key, empty)


def picture_views(config: ConfigDict) -> tuple[View, ...]:
    """In which views each picture is a row. Raises `UserError` where rows edit pictures."""
    data = config.data
    changed = {"flip": data.flip, "crops": data.crops > 1}
    raise_if(
        f"config.data.{name}: is for rows that edit no pictures: a mirrored or cropped result does "
        "not fit the pictures in config.data.references; unset it"
        for name, on in changed.items()
        if on and as_list(data.references)
    )
    return views_of(data.crops, data.flip, len(as_numbers(data.resolution)))


def data_paths(config: ConfigDict, workdir: Path) -> tuple[str | Path, ...]:
    """Where the data sets are; the drawn one is made."""
    paths = as_paths(config.data.path)
    return tuple(write_folder(workdir / "random_data") if p == RANDOM else p for p in paths)


def limits(config: ConfigDict) -> ImageLimits:
    """What pictures must keep to."""
    return ImageLimits(max_pixels=config.data.max_pixels)


def cache_folder(config: ConfigDict, workdir: Path) -> Path:
    """Where features and indices are kept."""
    if not config.data.cache and is_remote(workdir):
        # Prepared data: little is left to cache, and it is quickly computed again.
        return Path("~/.cache/dopsd_jax").expanduser()
    return Path(config.data.cache or workdir / "features").expanduser()


def picture_index(config: ConfigDict, workdir: Path, name: str = "") -> PictureIndex:
    """What earlier starts found out about the pictures."""
    where = ", ".join(str(Path(p).expanduser().absolute()) for p in as_paths(config.data.path))
    return PictureIndex(FeatureCache(cache_folder(config, workdir)), f"{where} {name}")


def notes(config: ConfigDict, pipe: Pipeline) -> list[str]:
    """What to say of the model before a run."""
    return [] if registry.method(config).base else pipe.notes()


def check_method(config: ConfigDict, pipe: Pipeline) -> None:
    """Raises `UserError` for a grid, a loss, targets or a LoRA file that do not fit the model."""
    side = highest(config.data.resolution) // pipe.family.LATENT_FACTOR
    grid = make_schedule(config, pipe.family, pipe.scheduler).grid(side, side)
    loss, loss_steps = name_or_list(config.loss), name_or_list(config.loss_steps)
    dopsd.make_nodes(grid, loss, loss_steps, jax.random.key(0), registry.told(config))
    trained(config, pipe.family, pipe.config).check()


def make_schedule(config: ConfigDict, family: Family, scheduler: Any) -> Schedule:
    """config.grid, and the shift of noise levels, for latents of any size."""
    name = name_or_list(config.grid)
    return Schedule(
        lambda height, width: family.grid(name, scheduler, height, width),
        lambda height, width: family.shift(scheduler, height, width),
    )


def make_plan(config: ConfigDict, pipe: Pipeline, mesh: Mesh) -> Plan:
    """The training step around the pipeline's transformer, which is loaded."""
    what = trained(config, pipe.family, pipe.config)
    what.attach(pipe.transformer)
    graphdef, student, _ = pipe.split
    return _plan(config, pipe.family, what, graphdef, student, pipe.scheduler, mesh)


def abstract_plan(
    config: ConfigDict, family: Family, size: Size, attention: str, mesh: Mesh
) -> tuple[Plan, nnx.GraphDef, nnx.State]:
    """`make_plan` for a network that is not loaded, with its graph and base: shapes, placements.

    `attention`: a resolved name of `attention.IMPLEMENTATIONS`. The scheduler is the published one.
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
    plan = _plan(config, family, what, graphdef, student, family.SCHEDULER, mesh)
    return plan, graphdef, sharding.abstract(base, sharding.state_shardings(base, mesh))


def _plan(config, family: Family, what: Trained, graphdef, student, scheduler, mesh: Mesh) -> Plan:
    schedule = make_schedule(config, family, scheduler)
    side = highest(config.data.resolution) // family.LATENT_FACTOR
    net = family.denoiser(graphdef)
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
        schedule.grid(side, side),
        schedule,
        net,
        what,
        sharding.abstract(abstract, placement),
        initial_state,
        step,
    )


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
