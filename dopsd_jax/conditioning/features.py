"""What the encoders make of a data set: computed once and cached by content, or prepared before."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.conditioning.encoding import (
    MAX_FAULTS,
    PRIOR,
    STUDENT,
    TEACHER,
    Encoder,
    concept_pattern,
)
from dopsd_jax.data.cache import FeatureCache, feature_key
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import crop_name
from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.data.padding import pad_stack, padded_length
from dopsd_jax.data.prepared import Caption, Prepared
from dopsd_jax.dopsd import Contexts
from dopsd_jax.families.zimage.family import Context
from dopsd_jax.families.zimage.pipeline import Pipeline
from dopsd_jax.methods import registry
from dopsd_jax.methods.flow_matching import Batch

ROWS = (
    64  # features are padded to a multiple of it: one length for the student, one for the teacher
)
DIGESTS = "digests.json"
# The settings of a prepared data set, as messages name them.
SETTINGS = {
    "text_encoder": "the text encoder",
    "vlm": "the vision-language model",
    "dtype": "config.dtype",
    "min_pixels": "config.teacher.min_pixels",
    "max_pixels": "config.teacher.max_pixels",
    "doubled_template": "config.teacher.doubled_template",
    "crop": "crops",
}


def prepared_settings(config: ConfigDict, pipe: Pipeline, memo: Path) -> dict[str, object]:
    """What features depend on besides pictures, captions and buckets.

    Encoders whose folders are not here are left out: a machine that trains needs none.
    """
    names, found = ["text_encoder"], {"dtype": config.dtype}
    if registry.sees_image(config):
        names.append("vlm")
        shared = ("min_pixels", "max_pixels", "doubled_template")
        found |= {name: config.teacher[name] for name in shared} | {"crop": crop_name(0, 0)}
    return found | {name: pipe.part_digest(name, memo) for name in names if pipe.has_encoder(name)}


class Store(Protocol):
    """Features by caption; kinds are those of `encoding`."""

    def load(self, caption: Caption, kinds: Sequence[int]) -> tuple[np.ndarray, ...]:
        """The features of these kinds, in their order."""

    def longest(self, kind: int, keys: Sequence[str]) -> int:
        """Positions of the longest feature of a kind, of all captions under `keys`."""

    def latent(self, row: int) -> Float[np.ndarray, "h w c"]:
        """The clean latent of the row's picture."""

    def picture(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""


class Features:
    """What a method needs of every caption and picture of a data set; see `methods.needs`.

    `student_rows`, `teacher_rows`: the padded lengths, the same for all batches; 0 without teacher.
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

    def prepare(self, report: Callable[[str], None] = print) -> None:
        """Computes what is missing, then frees the encoders."""
        if isinstance(self.store, CachedFeatures):
            self.store.compute(report)
        self.pipe.release_encoders()
        keys = self.dataset.prompt_keys
        student = [self.store.longest(STUDENT, keys)]
        if self.needs.prior:
            student.append(self.store.longest(PRIOR, keys))
        self.student_rows = self._padded(max(student), self.pipe.student_limit)
        self.teacher_rows = 0
        if self.needs.teacher:
            told = (TEACHER, keys) if self.teacher_key is None else (STUDENT, [self.teacher_key])
            self.teacher_rows = self._padded(self.store.longest(*told), self.pipe.teacher_limit)

    def _padded(self, longest: int, limit: int) -> int:
        if longest > limit:
            raise UserError(
                f"config.data.path: holds captions of {longest} tokens, the model takes {limit}; "
                "leave their key out of data.prompt_keys"
            )
        return padded_length(longest, ROWS, limit)

    def image(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""
        return self.store.picture(row)

    def contexts(self, captions: Sequence[Caption]) -> Contexts:
        """The contexts of the captions, padded, as host arrays."""
        if not self.needs.teacher:
            return Contexts(self._context(captions, STUDENT), None)
        if self.teacher_key is None:
            both = zip(*(self.store.load(c, (STUDENT, TEACHER)) for c in captions), strict=True)
            rows = self.student_rows, self.teacher_rows
            return Contexts(*(Context(*pad_stack(f, r)) for f, r in zip(both, rows, strict=True)))
        told = [self.dataset.caption(row, [self.teacher_key]) for row, _ in captions]
        return Contexts(
            self._context(captions, STUDENT), self._context(told, STUDENT, self.teacher_rows)
        )

    def _context(self, captions: Sequence[Caption], kind: int, rows: int = 0) -> Context:
        features = [self.store.load(caption, (kind,))[0] for caption in captions]
        return Context(*pad_stack(features, rows or self.student_rows))

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
            self._context(captions, PRIOR) if self.needs.prior else None,
        )
        return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), whole)


class CachedFeatures:
    """Features in a cache by content, computed where they are missing."""

    def __init__(self, pipe: Pipeline, dataset: Dataset, config: ConfigDict, folder: Path):
        self.dataset, self.config = dataset, config
        self.cache = FeatureCache(folder)
        self.encoder = Encoder(pipe, dataset, config)
        self.needs = registry.needs(config)
        seen, memo = registry.sees_image(config), Path(folder) / DIGESTS
        names = ["text_encoder"] + ["vlm"] * seen + ["vae"] * self.needs.target
        digest = lambda name: f"{pipe.part_digest(name, memo)} {config.dtype}"
        self.digests = {name: digest(name) for name in names}
        self.picture = self.encoder.image

    def wanted(self) -> dict[Caption, list[int]]:
        """The kinds of features that each caption needs."""
        kinds = [
            STUDENT,
            *[TEACHER] * registry.sees_image(self.config),
            *[PRIOR] * self.needs.prior,
        ]
        wanted = {caption: kinds for caption in self.dataset.captions(self.dataset.prompt_keys)}
        key = registry.teacher_key(self.config)
        if key is not None and key not in self.dataset.prompt_keys:
            wanted |= {caption: [STUDENT] for caption in self.dataset.captions([key])}
        return wanted

    def key(self, caption: Caption, kind: int) -> str:
        """Where the cache has a caption's features."""
        text, row = self.encoder.text(caption, kind), caption[0]
        if kind != TEACHER:
            digest = self.digests["text_encoder"]
            return feature_key(role="student", prompt=text, encoder=digest, options={})
        options = {
            "min_pixels": self.config.teacher.min_pixels,
            "max_pixels": self.config.teacher.max_pixels,
            "doubled": self.config.teacher.doubled_template,
        }
        return feature_key(
            role="teacher",
            prompt=text,
            encoder=f"{self.digests['text_encoder']} {self.digests['vlm']}",
            options=options,
            **self._picture(row),
        )

    def latent_key(self, row: int) -> str:
        """Where the cache has the latent of a row's picture."""
        digest = self.digests["vae"]
        return feature_key(
            role="latent", prompt="", encoder=digest, options={}, **self._picture(row)
        )

    def _picture(self, row: int) -> dict[str, str]:
        image, crop = self.dataset.infos[row].digest, crop_name(*self.dataset.buckets[row])
        return {"image": image, "crop": crop}

    def compute(self, report: Callable[[str], None]) -> None:
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
        self.encoder.lengths({caption: wanted[caption] for caption in todo})
        made = self.encoder.encode(todo)
        total = sum(map(len, todo.values()))
        for caption, kind, features in _reported(made, total, "captions and images", report):
            self.cache.put(keys[caption, kind], {"features": features})
        if self.needs.target:
            rows = {self.latent_key(row): row for row in range(len(self.dataset.rows))}
            lacking = self.cache.missing(rows)
            for key in _reported(lacking, len(lacking), "pictures to latents", report):
                self.cache.put(key, {"latent": self.encoder.latent(rows[key])})

    def longest(self, kind: int, keys: Sequence[str]) -> int:
        """See `Store`."""
        entries = {self.key(caption, kind) for caption in self.dataset.captions(keys)}
        return max(self.cache.shapes(entry)["features"][0] for entry in entries)

    def load(self, caption: Caption, kinds: Sequence[int]) -> tuple[np.ndarray, ...]:
        """See `Store`."""
        return tuple(self.cache.load(self.key(caption, kind))["features"] for kind in kinds)

    def latent(self, row: int) -> Float[np.ndarray, "h w c"]:
        """See `Store`."""
        return self.cache.load(self.latent_key(row))["latent"]


def _reported(
    items: Iterable[Any], total: int, what: str, report: Callable[[str], None]
) -> Iterator[Any]:
    """The same items; says from time to time how many have been dealt with."""
    start, shown = time.monotonic(), 0.0
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown > 5 or done == total:
            left = (now - start) / done * (total - done)
            report(f"encoding {what}: {done}/{total}, {left:.0f} s left")
            shown = now


def check_class_prompts(dataset: Dataset, config: ConfigDict) -> None:
    """Raises `UserError` for every caption that has no word for the concept."""
    word = config.dreambooth.concept_word
    named = concept_pattern(word)
    raise_if(
        (
            f"{row.where}: its caption {key!r} has no {word!r}, which "
            "config.dreambooth.concept_word says stands for the concept; name the word that does"
            for row in dataset.rows
            for key, text in row.captions
            if key in dataset.prompt_keys and not named.search(text)
        ),
        MAX_FAULTS,
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
    if registry.sees_image(config) and not prepared.longest(TEACHER):
        raise UserError(
            f"{prepared.folder}: was prepared without pictures for a teacher; prepare it again "
            f"with config.method = {config.method} and config.teacher.context = vlm"
        )
    prepared.check(prepared_settings(config, pipe, Path(folder) / DIGESTS), SETTINGS)
    if prepared.channels != pipe.config.caption_dim:
        raise UserError(
            f"{prepared.folder}: its features have {prepared.channels} channels, the model takes "
            f"{pipe.config.caption_dim}; prepare the data set with this model's encoder"
        )
