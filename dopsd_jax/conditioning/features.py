"""The encoders' outputs for a data set: computed once and cached by content, or prepared before."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from dopsd_jax.common.config_fields import as_list, as_numbers
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.conditioning.anchors import Anchors
from dopsd_jax.conditioning.cached import DIGESTS, CachedFeatures, sees_picture
from dopsd_jax.conditioning.encoding import PRIOR, concept_pattern
from dopsd_jax.conditioning.own_prompts import OwnPrompts
from dopsd_jax.conditioning.padding import check_channels, padded_rows
from dopsd_jax.data.buckets import Shape
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import crop_name
from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.data.masks import region
from dopsd_jax.data.prepared import Caption, Prepared
from dopsd_jax.data.varied import EMPTY
from dopsd_jax.dopsd import Contexts
from dopsd_jax.families.base import STUDENT, TEACHER, PaddedLengths, Tree
from dopsd_jax.families.base import Features as Arrays
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods import anchor, registry
from dopsd_jax.methods.flow_matching import Batch
from dopsd_jax.methods.options import OTHER_PICTURE

# Of a prepared data set: which picture the teacher is shown. The row's own is not noted.
SHOWN, OWN = "shown", "row's own"
# The settings of a prepared data set, as messages name them.
SETTINGS = {
    "text_encoder": "the text encoder",
    "vlm": "the vision-language model",
    "dtype": "config.dtype",
    "crop": "crops",
    "reference_crop": "config.data.reference_crop",
    "empty_captions": "empty captions (config.data.caption_dropout)",
    "tags": "shuffled tags (config.data.shuffle_tags, tag_variants, keep_tags)",
    "held_out": "pictures that no teacher is shown (config.data.holdout, config.seed)",
    "views": "views (config.data.crops, config.data.flip, config.data.resolution)",
}
# What a configuration may leave out, and then a prepared data set must not have.
UNLESS_ASKED = ("tags", "views")


def prepared_settings(config: ConfigDict, pipe: Pipeline, memo: Path) -> dict[str, object]:
    """What features depend on besides pictures, captions and buckets.

    Encoders whose folders are not here are left out: a machine that trains needs none.
    """
    shown = sees_picture(config, pipe.family)
    role = TEACHER if shown else STUDENT
    found = {"dtype": config.dtype} | pipe.options(role, config.teacher)
    if config.data.caption_dropout:
        found["empty_captions"] = True
    if config.data.shuffle_tags:
        found["tags"] = [config.data.tag_variants, config.data.keep_tags]
    levels = len(as_numbers(config.data.resolution))
    if config.data.flip or config.data.crops > 1 or levels > 1:
        found["views"] = [config.data.crops, config.data.flip, levels]
    if shown:
        found["crop"] = crop_name(0, 0)
        if config.teacher.context == OTHER_PICTURE:
            found[SHOWN] = OTHER_PICTURE
            if config.data.holdout:
                found["held_out"] = [config.data.holdout, config.seed]
    if config.data.references:
        found["reference_crop"] = config.data.reference_crop
    names = dict.fromkeys((*pipe.ENCODERS[STUDENT], *pipe.ENCODERS[role]))
    here = [name for name in names if pipe.part_folder(name).is_dir()]
    return found | {name: pipe.part_digest(name, memo) for name in here}


class Store(Protocol):
    """Features by caption; kinds are those of `encoding`."""

    def survey(self) -> None:
        """Finds which features are missing, and their shapes; no encoder is loaded."""

    def compute(self) -> None:
        """Computes what is missing."""

    def outline(self, caption: Caption, kind: int) -> Arrays:
        """Arrays like the features of a caption, from `survey` on."""

    def load(self, caption: Caption, kinds: Sequence[int]) -> tuple[Arrays, ...]:
        """The features of these kinds, in their order."""

    def shapes(self, kind: int, keys: Sequence[str]) -> Iterable[Mapping[str, tuple[int, ...]]]:
        """All shapes that the features of a kind have, of all captions under `keys`."""

    def latent(self, row: int) -> Float[np.ndarray, "h w c"]:
        """The clean latent of the row's picture."""

    def mask(self, row: int) -> UInt8[np.ndarray, "h w"]:
        """The mask of a row that has one, on the cells of its latent."""

    def picture(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""

    def edited(self, row: int) -> Sequence[np.ndarray]:
        """The pictures that the row edits, in the sizes that the model sees."""


class Features:
    """What a method needs of every caption and picture of a data set; see `methods.needs`.

    `rows`: by role the padded lengths, the same for all batches; None for a teacher that is not
    asked. `anchors`: None without any. multiple: devices that a micro-batch is spread over.
    """

    def __init__(
        self,
        pipe: Pipeline,
        dataset: Dataset,
        config: ConfigDict,
        folder: Path,
        multiple: int = 1,
    ):
        self.pipe, self.dataset = pipe, dataset
        self.needs, self.floor = registry.needs(config), config.data.mask_floor
        self.teacher_key = registry.teacher_key(config)
        if self.needs.prior:
            check_class_prompts(dataset, config)
        if dataset.features is not None:
            check_prepared(dataset.features, pipe, config, folder)
            self.store: Store = dataset.features
        else:
            self.store = CachedFeatures(pipe, dataset, config, folder, self.needs)
        micro = anchor.micro_batches(config, multiple)
        of_row = lambda caption: self._load(caption, STUDENT)
        self.anchors = micro and Anchors(pipe, dataset, config, folder, micro, of_row)
        self.own_prompts = OwnPrompts(pipe, config, folder)
        # Prepared data bring weights of their own, which the configuration then does not tell.
        told = dataset.features is None or as_list(config.data.weights)
        self.untold = () if told else dataset.sets

    def survey(self) -> None:
        """Finds what is missing, and the shapes of all features: no encoder is loaded.

        Raises `UserError` with captions that are too long, as `prepare` does.
        """
        self.store.survey()
        if self.anchors:
            self.anchors.survey()
        self.own_prompts.survey()
        self._pad()

    def prepare(self) -> None:
        """Computes what is missing, then frees the encoders."""
        self.store.compute()
        if self.anchors:
            self.anchors.compute()
        self.own_prompts.compute()
        self.pipe.release_encoders()
        if self.anchors:
            self.anchors.pad()
        self._pad()

    def _pad(self) -> None:
        keys = self.dataset.prompt_keys
        student = [(STUDENT, (*keys, EMPTY))] + [(PRIOR, keys)] * self.needs.prior
        self.rows = [self._rows(student, STUDENT), None]
        if self.needs.teacher:
            wanted = (TEACHER, keys) if self.teacher_key is None else (STUDENT, [self.teacher_key])
            self.rows[TEACHER] = self._rows([wanted], TEACHER)

    def _rows(self, wanted: Sequence[tuple[int, Sequence[str]]], role: int) -> PaddedLengths:
        shapes = [shapes for kind, keys in wanted for shapes in self.store.shapes(kind, keys)]
        return padded_rows(shapes, self.pipe, role)

    def facts(self) -> dict[str, str]:
        """What decides what is trained besides the data set, for the record of a run."""
        found = {"anchors": self.anchors.digest()} if self.anchors else {}
        if others := self.dataset.others:
            found["the pictures shown to the teacher"] = others.digest()
        if shares := [f"{one.path} {one.share}" for one in self.untold if one.share is not None]:
            found["the shares of the data sets"] = ", ".join(shares)
        return found

    def describe(self) -> list[str]:
        """What the student learns from besides the data set."""
        return [self.anchors.describe()] if self.anchors else []

    def image(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""
        return self.store.picture(row)

    def edited(self, row: int) -> Sequence[np.ndarray]:
        """The pictures that the row edits, in the sizes that the model sees."""
        return self.store.edited(row)

    def contexts(
        self,
        captions: Sequence[Caption],
        given: Sequence[Caption] | None = None,
        rows: PaddedLengths | None = None,
    ) -> Contexts:
        """The contexts of the captions, padded, as host arrays.

        given: the captions of the student, where they are not the teacher's too. rows: lengths of
        the student's context; None: those of all batches.
        """
        return self._contexts(self._load, captions, given, rows)

    def outlines(self) -> dict[Shape, list[Tree]]:
        """One sample's contexts for each shape of rows, in shapes and types, from `survey` on.

        Of student and teacher, and of an anchor where there are any; a teacher that is not asked
        has the student's.
        """
        found, keys = {}, self.dataset.prompt_keys
        for shape, rows in self.dataset.rows_by_shape().items():
            caption = self.dataset.caption(int(rows[0]), keys)
            student, teacher = map(one_sample, self._contexts(self.store.outline, [caption]))
            found[shape] = [student, student if teacher is None else teacher]
            if self.anchors:
                like = self.store.outline(caption, STUDENT)
                found[shape].append(one_sample(self.anchors.outline(like)))
        return found

    def _contexts(
        self,
        load: Callable[[Caption, int], Arrays],
        captions: Sequence[Caption],
        given: Sequence[Caption] | None = None,
        rows: PaddedLengths | None = None,
    ) -> Contexts:
        collate = lambda captions, kind, rows: self.pipe.family.collate(
            [load(caption, kind) for caption in captions], rows
        )
        rows = self.rows[STUDENT] if rows is None else rows
        student = collate(captions if given is None else given, STUDENT, rows)
        if not self.needs.teacher:
            return Contexts(student, None)
        if self.teacher_key is None:
            return Contexts(student, collate(captions, TEACHER, self.rows[TEACHER]))
        others = [self.dataset.caption(row, [self.teacher_key]) for row, _ in captions]
        return Contexts(student, collate(others, STUDENT, self.rows[TEACHER]))

    def _load(self, caption: Caption, kind: int) -> Arrays:
        return self.store.load(caption, (kind,))[0]

    def _prior(self, captions: Sequence[Caption]) -> Tree:
        features = [self._load(caption, PRIOR) for caption in captions]
        return self.pipe.family.collate(features, self.rows[STUDENT])

    def latents(self, rows: Iterable[int]) -> Float[np.ndarray, "b h w c"]:
        """The clean latents of rows of one bucket."""
        return np.stack([self.store.latent(row) for row in rows])

    def regions(
        self, rows: Sequence[int], weights: Sequence[float] = ()
    ) -> Float[np.ndarray, "b h w 1"] | None:
        """How much each place of rows of one bucket counts; None: all the same.

        By config.data.masks and by `weights` of the rows; without these a row counts 1.
        """
        if not self.dataset.masks and not weights:
            return None
        found = []
        for row, weight in itertools.zip_longest(rows, weights, fillvalue=1.0):
            width, height = self.dataset.buckets[row]
            if self.dataset.masks and self.dataset.masks[row]:
                own = region(self.store.mask(row), self.floor)
            else:
                own = np.ones((*self.pipe.latent_shape(height, width)[:2], 1), np.float32)
            found.append(np.float32(weight) * own)
        return np.stack(found)

    def batch(self, index: BatchIndex, accumulate: int) -> Batch:
        """What the method learns from, with a leading axis of micro-batches."""
        rows = index.rows.tolist()
        captions = list(zip(rows, index.captions.tolist(), strict=True))
        given = [
            self.dataset.caption(caption[0], [EMPTY]) if dropped else caption
            for caption, dropped in itertools.zip_longest(captions, index.dropped)
        ]
        whole = Batch(
            self.contexts(captions, given),
            self.latents(rows) if self.needs.target else None,
            self._prior(captions) if self.needs.prior else None,
            self.regions(rows, index.weights),
        )
        return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), whole)


def one_sample(batch: Tree) -> Tree:
    """Shapes and types of a sample, from arrays with an axis of samples."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)


def check_class_prompts(dataset: Dataset, config: ConfigDict) -> None:
    """Raises `UserError` for every caption that has no word for the concept."""
    word = config.dreambooth.concept_word
    named = concept_pattern(word)
    raise_if(
        f"{row.where}: its caption {key!r} has no {word!r}, which "
        "config.dreambooth.concept_word says stands for the concept; name the word that does"
        for row in dataset.rows
        for key, text in row.captions
        if key in dataset.prompt_keys and not named.search(text)
    )


def check_prepared(prepared: Prepared, pipe: Pipeline, config: ConfigDict, folder: Path) -> None:
    """Raises `UserError` where a prepared data set belongs to another configuration or encoder."""
    needs = registry.needs(config)
    raise_if(
        f"{prepared.folder}: holds no {what}, which config.method = {config.method} learns from; "
        "set config.data.path to the pictures it was prepared from"
        for what, needed in (("latents of pictures", needs.target), ("class prompts", needs.prior))
        if needed
    )
    if sees_picture(config, pipe.family) and not any(prepared.shapes(TEACHER)):
        raise UserError(
            f"{prepared.folder}: was prepared without pictures for a teacher; prepare it again "
            f"with config.method = {config.method} and config.teacher.context = "
            f"{config.teacher.context}"
        )
    settings = prepared_settings(config, pipe, Path(folder) / DIGESTS)
    made, now = prepared.manifest.settings.get(SHOWN, OWN), settings.pop(SHOWN, OWN)
    if sees_picture(config, pipe.family) and made != now:
        raise UserError(
            f"{prepared.folder}: was prepared for a teacher that is shown the {made} picture; with "
            f"config.teacher.context = {config.teacher.context} it is shown the {now} one. Use the "
            "context that it was prepared with, or prepare the data set again"
        )
    settings = dict.fromkeys(UNLESS_ASKED) | settings
    prepared.check(settings, {n: SETTINGS.get(n, f"config.teacher.{n}") for n in settings})
    roles = (STUDENT, TEACHER) if sees_picture(config, pipe.family) else (STUDENT,)
    for role in roles:
        check_channels(prepared, pipe, role)
