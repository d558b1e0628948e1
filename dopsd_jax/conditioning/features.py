"""The encoders' outputs for a data set: computed once and cached by content, or prepared before."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.progress import Progress
from dopsd_jax.conditioning.encoding import PRIOR, Encoder, concept_pattern
from dopsd_jax.data.cache import FeatureCache, feature_key
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import crop_name
from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.data.padding import padded_length
from dopsd_jax.data.prepared import Caption, Prepared
from dopsd_jax.dopsd import Contexts
from dopsd_jax.families.base import STUDENT, TEACHER, Family, PaddedLengths, Tree
from dopsd_jax.families.base import Features as Arrays
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods import registry
from dopsd_jax.methods.flow_matching import Batch
from dopsd_jax.parallel import multihost

ROWS = (
    64  # features are padded to a multiple of it: one length for the student, one for the teacher
)
DIGESTS = "digests.json"
ROLE_NAMES = ("student", "teacher")  # in the keys of the cache
# The settings of a prepared data set, as messages name them.
SETTINGS = {
    "text_encoder": "the text encoder",
    "vlm": "the vision-language model",
    "dtype": "config.dtype",
    "crop": "crops",
    "reference_crop": "config.data.reference_crop",
}


def sees_picture(config: ConfigDict, family: Family) -> bool:
    """Whether the teacher is shown the row's picture: only then are its own encoders needed."""
    context = config.teacher.context
    return registry.needs(config).teacher and family.CONTEXTS.get(context, False)


def prepared_settings(config: ConfigDict, pipe: Pipeline, memo: Path) -> dict[str, object]:
    """What features depend on besides pictures, captions and buckets.

    Encoders whose folders are not here are left out: a machine that trains needs none.
    """
    shown = sees_picture(config, pipe.family)
    role = TEACHER if shown else STUDENT
    found = {"dtype": config.dtype} | pipe.options(role, config.teacher)
    if shown:
        found["crop"] = crop_name(0, 0)
    if config.data.references:
        found["reference_crop"] = config.data.reference_crop
    names = dict.fromkeys((*pipe.ENCODERS[STUDENT], *pipe.ENCODERS[role]))
    here = [name for name in names if pipe.part_folder(name).is_dir()]
    return found | {name: pipe.part_digest(name, memo) for name in here}


class Store(Protocol):
    """Features by caption; kinds are those of `encoding`."""

    def load(self, caption: Caption, kinds: Sequence[int]) -> tuple[Arrays, ...]:
        """The features of these kinds, in their order."""

    def shapes(self, kind: int, keys: Sequence[str]) -> Iterable[Mapping[str, tuple[int, ...]]]:
        """All shapes that the features of a kind have, of all captions under `keys`."""

    def latent(self, row: int) -> Float[np.ndarray, "h w c"]:
        """The clean latent of the row's picture."""

    def picture(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""

    def edited(self, row: int) -> Sequence[np.ndarray]:
        """The pictures that the row edits, in the sizes that the model sees."""


class Features:
    """What a method needs of every caption and picture of a data set; see `methods.needs`.

    `rows`: by role the padded lengths, the same for all batches; None for a teacher that is not
    asked.
    """

    def __init__(self, pipe: Pipeline, dataset: Dataset, config: ConfigDict, folder: Path):
        self.pipe, self.dataset = pipe, dataset
        self.needs = registry.needs(config)
        self.teacher_key = registry.teacher_key(config)
        if self.needs.prior:
            check_class_prompts(dataset, config)
        if dataset.features is not None:
            check_prepared(dataset.features, pipe, config, folder)
            self.store: Store = dataset.features
        else:
            self.store = CachedFeatures(pipe, dataset, config, folder)

    def prepare(self) -> None:
        """Computes what is missing, then frees the encoders."""
        if isinstance(self.store, CachedFeatures):
            self.store.compute()
        self.pipe.release_encoders()
        keys = self.dataset.prompt_keys
        student = [(STUDENT, keys)] + [(PRIOR, keys)] * self.needs.prior
        self.rows = [self._rows(student, STUDENT), None]
        if self.needs.teacher:
            wanted = (TEACHER, keys) if self.teacher_key is None else (STUDENT, [self.teacher_key])
            self.rows[TEACHER] = self._rows([wanted], TEACHER)

    def _rows(self, wanted: Sequence[tuple[int, Sequence[str]]], role: int) -> PaddedLengths:
        shapes = [shapes for kind, keys in wanted for shapes in self.store.shapes(kind, keys)]
        return padded_rows(shapes, self.pipe, role)

    def image(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""
        return self.store.picture(row)

    def edited(self, row: int) -> Sequence[np.ndarray]:
        """The pictures that the row edits, in the sizes that the model sees."""
        return self.store.edited(row)

    def contexts(self, captions: Sequence[Caption]) -> Contexts:
        """The contexts of the captions, padded, as host arrays."""
        student = self._context(captions, STUDENT, STUDENT)
        if not self.needs.teacher:
            return Contexts(student, None)
        if self.teacher_key is None:
            return Contexts(student, self._context(captions, TEACHER, TEACHER))
        others = [self.dataset.caption(row, [self.teacher_key]) for row, _ in captions]
        return Contexts(student, self._context(others, STUDENT, TEACHER))

    def _context(self, captions: Sequence[Caption], kind: int, role: int) -> Tree:
        features = [self.store.load(caption, (kind,))[0] for caption in captions]
        return self.pipe.family.collate(features, self.rows[role])

    def latents(self, rows: Iterable[int]) -> Float[np.ndarray, "b h w c"]:
        """The clean latents of rows of one bucket."""
        return np.stack([self.store.latent(row) for row in rows])

    def batch(self, index: BatchIndex, accumulate: int) -> Batch:
        """What the method learns from, with a leading axis of micro-batches."""
        rows = index.rows.tolist()
        captions = list(zip(rows, index.captions.tolist(), strict=True))
        whole = Batch(
            self.contexts(captions),
            self.latents(rows) if self.needs.target else None,
            self._context(captions, PRIOR, STUDENT) if self.needs.prior else None,
        )
        return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), whole)


class CachedFeatures:
    """Features in a cache by content, computed where they are missing."""

    def __init__(self, pipe: Pipeline, dataset: Dataset, config: ConfigDict, folder: Path):
        self.dataset, self.config = dataset, config
        self.cache = FeatureCache(folder)
        self.encoder = Encoder(pipe, dataset, config)
        self.needs = registry.needs(config)
        self.shown, memo = sees_picture(config, pipe.family), Path(folder) / DIGESTS
        seen = ("vae",) * bool(dataset.references)
        self.encoders = [dict.fromkeys((*own, *seen)) for own in pipe.ENCODERS]
        roles = (STUDENT, TEACHER) if self.shown else (STUDENT,)
        names = [name for role in roles for name in self.encoders[role]] + [
            "vae"
        ] * self.needs.target
        digest = lambda name: f"{pipe.part_digest(name, memo)} {config.dtype}"
        self.digests = {name: digest(name) for name in dict.fromkeys(names)}
        self.picture, self.edited = self.encoder.image, self.encoder.edited

    def wanted(self) -> dict[Caption, list[int]]:
        """The kinds of features that each caption needs."""
        kinds = [STUDENT, *[TEACHER] * self.shown, *[PRIOR] * self.needs.prior]
        wanted = {caption: kinds for caption in self.dataset.captions(self.dataset.prompt_keys)}
        key = registry.teacher_key(self.config)
        if key is not None and key not in self.dataset.prompt_keys:
            wanted |= {caption: [STUDENT] for caption in self.dataset.captions([key])}
        return wanted

    def key(self, caption: Caption, kind: int) -> str:
        """Where the cache has a caption's features."""
        role, row = TEACHER if kind == TEACHER else STUDENT, caption[0]
        seen = [self._picture(row)] if role == TEACHER else []
        if self.dataset.references:
            crop = self.config.data.reference_crop
            own = self.dataset.references[row]
            seen = [*((one.digest, f"{crop} {one.size}") for one in own), *seen]
        return feature_key(
            role=ROLE_NAMES[role],
            prompt=self.encoder.text(caption, kind),
            encoder=" ".join(self.digests[name] for name in self.encoders[role]),
            options=self.encoder.options[role],
            pictures=seen,
        )

    def latent_key(self, row: int) -> str:
        """Where the cache has the latent of a row's picture."""
        digest, pictures = self.digests["vae"], [self._picture(row)]
        return feature_key(role="latent", prompt="", encoder=digest, options={}, pictures=pictures)

    def _picture(self, row: int) -> tuple[str, str]:
        return self.dataset.infos[row].digest, crop_name(*self.dataset.buckets[row])

    def compute(self) -> None:
        """Computes what the cache lacks. Raises `UserError` before with all over-long captions."""
        # What is cached has passed this check before.
        wanted = self.wanted()
        keys = {(c, kind): self.key(c, kind) for c, kinds in wanted.items() for kind in kinds}
        missing = set(self.cache.missing(keys.values()))
        todo: dict[Caption, list[int]] = {}
        for (caption, kind), key in keys.items():
            if key in missing:
                missing.remove(key)  # captions may be equal
                todo.setdefault(caption, []).append(kind)
        self.encoder.shapes({caption: wanted[caption] for caption in todo})
        made = self.encoder.encode(todo)
        total = sum(map(len, todo.values()))
        quiet = not multihost.is_first()
        progress = Progress("encoding captions and images", total, quiet=quiet)
        for caption, kind, features in progress.over(made):
            self.cache.put(keys[caption, kind], features)
        if self.needs.target:
            rows = {self.latent_key(row): row for row in range(len(self.dataset.rows))}
            lacking = self.cache.missing(rows)
            progress = Progress("encoding pictures to latents", len(lacking), quiet=quiet)
            for key in progress.over(lacking):
                self.cache.put(key, {"latent": self.encoder.latent(rows[key])})

    def shapes(self, kind: int, keys: Sequence[str]) -> Iterable[Mapping[str, tuple[int, ...]]]:
        """See `Store`."""
        entries = {self.key(caption, kind) for caption in self.dataset.captions(keys)}
        return map(self.cache.shapes, entries)

    def load(self, caption: Caption, kinds: Sequence[int]) -> tuple[Arrays, ...]:
        """See `Store`."""
        return tuple(self.cache.load(self.key(caption, kind)) for kind in kinds)

    def latent(self, row: int) -> Float[np.ndarray, "h w c"]:
        """See `Store`."""
        return self.cache.load(self.latent_key(row))["latent"]


def padded_rows(
    shapes: Iterable[Mapping[str, tuple[int, ...]]], pipe: Pipeline, role: int
) -> PaddedLengths:
    """One padded length for all features of these shapes, for each name that varies.

    Raises `UserError` for features that are longer than the model takes.
    """
    limits, longest = pipe.limits(role), {}
    for found in shapes:
        for name in limits.keys() & found.keys():
            longest[name] = max(longest.get(name, 1), found[name][0])
    for name, rows in longest.items():
        if rows > limits[name].shape[0]:
            raise UserError(
                f"config.data.path: holds captions of {rows} tokens, the model takes "
                f"{limits[name].shape[0]}; leave their key out of data.prompt_keys"
            )
    return {name: padded_length(n, ROWS, limits[name].shape[0]) for name, n in longest.items()}


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
    prepared.check(settings, {n: SETTINGS.get(n, f"config.teacher.{n}") for n in settings})
    roles = (STUDENT, TEACHER) if sees_picture(config, pipe.family) else (STUDENT,)
    for role in roles:
        limits = pipe.limits(role)
        for shapes in prepared.shapes(role):
            wrong = [n for n, like in limits.items() if shapes.get(n, ())[1:] != like.shape[1:]]
            if wrong:
                name = wrong[0]
                have = shapes[name][1:] if name in shapes else "none"
                raise UserError(
                    f"{prepared.folder}: its {name} have {have} channels, the model takes "
                    f"{limits[name].shape[1:]}; prepare the data set with this model's encoder"
                )
