"""Opens the data set that a configuration describes. Shared by all programs."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.common.atomic import is_remote
from dopsd_jax.common.config_fields import as_list, as_numbers, as_paths, highest
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.files import expand
from dopsd_jax.conditioning.cached import sees_picture
from dopsd_jax.conditioning.encoding import TO_BUCKET
from dopsd_jax.config.fields import defaults
from dopsd_jax.data import holdout, sets
from dopsd_jax.data.buckets import Bucket, make_buckets, parse_buckets
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.data.concepts import other_pictures
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.holdout import RowsByShape
from dopsd_jax.data.images import ImageLimits
from dopsd_jax.data.masks import FILES, OFF
from dopsd_jax.data.measure import ReferenceSize, measure
from dopsd_jax.data.picture_index import PictureIndex
from dopsd_jax.data.prepared import MASKS, Prepared, short
from dopsd_jax.data.prepared_parts import AGAIN, Manifest, names_prepared
from dopsd_jax.data.rows import Rows, load_sets
from dopsd_jax.data.sets import PartOfRows, parts_of, shares_of
from dopsd_jax.data.sources.collector import KEYS_FIELD
from dopsd_jax.data.table import View
from dopsd_jax.data.varied import CaptionVariants
from dopsd_jax.data.views import views_of
from dopsd_jax.families.base import Family
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods import registry
from dopsd_jax.methods.options import OTHER_CAPTION, OTHER_PICTURE
from dopsd_jax.random_model.synthetic import write_folder

# What `data_settings` are, as messages name them.
SETTINGS = {
    "buckets": "buckets (config.data.resolution, config.data.buckets)",
    MASKS: "masks (config.data.masks, pixels of a cell)",
}
# Fields of config.data that the readers of rows take as they are.
ROW_OPTIONS = (
    "caption_extension",
    "caption_lines",
    "folder_captions",
    "folder_repeats",
    "image_key",
    "trigger",
)
READING = "reading"  # in the settings of a prepared data set: see `reading`
RANDOM = "random"  # config.model, config.data.path: made in the work directory


def open_data(config: ConfigDict, workdir: Path, pipe: Pipeline) -> Dataset:
    """The data set of config.data: every row checked, every new picture opened once."""
    buckets = data_buckets(config, pipe.size_multiple)
    levels = data_levels(config, pipe.size_multiple)
    if names_prepared(config.data.path):
        prepared = Prepared(
            *as_paths(config.data.path),
            asked_keys(config) or None,
            required=registry.teacher_key(config),
            keys_field=keys_field(config),
        )
        prepared.check({MASKS: None} | data_settings(config, pipe), SETTINGS)
        check_reading(config, prepared)
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
            prepared_sets(config, prepared.manifest),
            masks=() if config.data.masks == OFF else tuple(prepared.masks),
        )
    else:
        rows, index = open_rows(config, workdir), picture_index(config, workdir)
        size = reference_size(config, pipe)
        dataset = measure(
            rows,
            buckets,
            limits(config),
            index=index,
            reference_size=size,
            levels=levels,
            masked=config.data.masks,
        )
        if shows_others(config, pipe.family):
            dataset = with_others(config, dataset)
    check_masks(config, dataset)
    check_references(config, pipe.family, dataset)
    return dataclasses.replace(dataset, prompt_keys=trained_keys(config, dataset.prompt_keys))


def hold_out(config: ConfigDict, dataset: Dataset) -> tuple[Dataset, RowsByShape, RowsByShape]:
    """The data set, its rows that are trained on, and those that config.data.holdout keeps back.

    Several sets have the shares of config.data.weights among the rows that are trained on. Raises
    `UserError` where nothing would be left.
    """
    rows, held = holdout.split(dataset, config.data.holdout, config.seed)
    parts = sets.among(dataset.sets, np.concatenate(list(rows.values())))
    return dataclasses.replace(dataset, sets=parts), rows, held


def data_settings(config: ConfigDict, pipe: Pipeline) -> dict[str, object]:
    """What a run and the prepared data set that it reads have in common besides features."""
    buckets = [list(bucket) for bucket in data_buckets(config, pipe.size_multiple)]
    if config.data.masks == OFF:
        return {"buckets": buckets}
    return {"buckets": buckets, MASKS: [config.data.masks, pipe.vae_config.factor]}


def reading(config: ConfigDict) -> dict[str, object]:
    """How the rows are read, where it is not as usual; a prepared data set keeps it."""
    usual = defaults().data
    return {name: config.data[name] for name in ROW_OPTIONS if config.data[name] != usual[name]}


def check_reading(config: ConfigDict, prepared: Prepared) -> None:
    """Raises `UserError` for ways of reading rows that a prepared data set was not made with."""
    made = prepared.manifest.settings.get(READING)
    raise_if(
        f"config.data.{name}: has no effect on prepared data, and {prepared.folder} was prepared "
        f"with {short(made.get(name, defaults().data[name]))}; leave it out, or prepare it again"
        for name, value in (reading(config).items() if isinstance(made, dict) else ())
        if made.get(name) != value
    )


def check_masks(config: ConfigDict, dataset: Dataset) -> None:
    """Raises `UserError` for masks that change nothing."""
    if dataset.masks and not any(dataset.masks):
        raise UserError(
            f"config.data.masks: {config.data.masks}, and no picture of {config.data.path} has "
            f"a mask that is not white everywhere; set it to {OFF}"
        )


def prepared_sets(config: ConfigDict, manifest: Manifest) -> tuple[PartOfRows, ...]:
    """The data sets that a prepared one was made from; config.data.weights go before its own."""
    weights = as_list(config.data.weights) or manifest.weights
    shares = shares_of(weights, len(manifest.sets) or 1)
    names, sizes = zip(*manifest.sets, strict=True) if manifest.sets else ((), ())
    return parts_of(names, sizes, shares) if manifest.sets else ()


def shows_others(config: ConfigDict, family: Family) -> bool:
    """Whether teachers are shown another picture than their row's."""
    return sees_picture(config, family) and config.teacher.context == OTHER_PICTURE


def with_others(config: ConfigDict, dataset: Dataset) -> Dataset:
    """The data set, which is whole, with the pictures that its teachers are shown."""
    where = ", ".join(as_paths(config.data.path))
    held = holdout.pictures(dataset, config.data.holdout, config.seed)
    others = other_pictures(dataset.rows, dataset.infos, config.seed, where, held)
    return dataclasses.replace(dataset, others=others)


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
    """Raises `UserError` where anchors or the teacher's context are not for rows like these."""
    context, there, faults = config.teacher.context, bool(dataset.references), []
    shown = registry.needs(config).teacher and context != OTHER_CAPTION
    if shown and there != (context in family.EDITING):
        other = [name for name in family.CONTEXTS if (name in family.EDITING) == there]
        what = "edit pictures" if there else "edit none (config.data.references)"
        faults.append(
            f"config.teacher.context: {context} does not fit the rows of {config.data.path}, which "
            f"{what}; use {' or '.join((*other, OTHER_CAPTION))}"
        )
    if config.anchor.share and config.anchor.edit and not there:
        faults.append(
            f"config.anchor.edit: anchors edit the pictures of the rows, and those of "
            f"{config.data.path} edit none (config.data.references); set it to false"
        )
    raise_if(faults)


def asked_keys(config: ConfigDict) -> tuple[str, ...]:
    """The keys of the captions that are asked for; none: all that every row has."""
    keys, key = tuple(as_list(config.data.prompt_keys)), config.data.caption_key
    if key and keys:
        raise UserError(
            "config.data.caption_key: is set beside config.data.prompt_keys, and both say where "
            "captions are; set one"
        )
    return (key,) if key else keys


def keys_field(config: ConfigDict) -> str:
    """The field that `asked_keys` come from, as messages of the readers name it."""
    return "data.caption_key" if config.data.caption_key else KEYS_FIELD


def trained_keys(config: ConfigDict, found: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of the student's captions, of those that the rows have.

    Without config.data.prompt_keys the teacher's key is not among them: with the same captions
    there is nothing to learn.
    """
    other, asked = registry.teacher_key(config), asked_keys(config)
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


def largest_size(config: ConfigDict, step: int = 1) -> Bucket:
    """The size with the most pixels, by which a run is described and its memory counted.

    step: what sides are multiples of, as `UserError` says of config.data.buckets; 1: these were
    checked before.
    """
    sizes, side = as_list(config.data.buckets), highest(config.data.resolution)
    if not sizes:
        return Bucket(side, side)
    return max(parse_buckets(sizes, step), key=lambda size: size.width * size.height)


def open_rows(config: ConfigDict, workdir: Path) -> Rows:
    """The rows of config.data; their pictures are not opened."""
    data = config.data
    return load_sets(
        data_paths(config, workdir),
        as_list(data.weights),
        prompt_keys=asked_keys(config) or None,
        keys_field=keys_field(config),
        variants=caption_variants(config),
        views=picture_views(config),
        data_root=data.root or None,
        cache=FeatureCache(cache_folder(config, workdir)),
        teacher_key=registry.teacher_key(config),
        references=as_list(config.data.references),
        masks=data.masks == FILES,
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
        return expand("~/.cache/dopsd_jax")
    return expand(config.data.cache or workdir / "features")


def picture_index(config: ConfigDict, workdir: Path, name: str = "") -> PictureIndex:
    """What earlier starts found out about the pictures."""
    where = ", ".join(str(expand(p).absolute()) for p in as_paths(config.data.path))
    return PictureIndex(FeatureCache(cache_folder(config, workdir)), f"{where} {name}")
