"""The encoders' outputs for a data set: computed once and cached by content, or prepared before."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.data.cache import FeatureCache, feature_key
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import crop_name
from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.data.padding import pad_stack, padded_length
from dopsd_jax.data.prepared import Caption, Prepared
from dopsd_jax.dopsd import Contexts
from dopsd_jax.encoding import STUDENT, TEACHER, Encoder
from dopsd_jax.errors import UserError
from dopsd_jax.families.zimage import Context
from dopsd_jax.families.zimage_pipeline import Pipeline

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


def teacher_settings(config: ConfigDict) -> dict[str, object]:
    """What features depend on besides pictures, captions, encoders and buckets."""
    return {
        "dtype": config.dtype,
        "min_pixels": config.teacher.min_pixels,
        "max_pixels": config.teacher.max_pixels,
        "doubled_template": config.teacher.doubled_template,
        "crop": crop_name(0, 0),
    }


class Store(Protocol):
    """Features by caption."""

    def load(self, caption: Caption) -> tuple[np.ndarray, np.ndarray]:
        """Those of the student and of the teacher."""

    def longest(self, role: int) -> int:
        """Positions of the longest feature of all captions."""

    def picture(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""


class Features:
    """Features of every caption of a data set, for the student and for the teacher.

    `student_rows`, `teacher_rows`: the padded lengths, the same for all batches.
    """

    def __init__(self, pipe: Pipeline, dataset: Dataset, config: ConfigDict, folder: Path):
        self.pipe, self.dataset = pipe, dataset
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
        longest = [self.store.longest(role) for role in (STUDENT, TEACHER)]
        self.student_rows = padded_length(longest[0], ROWS, self.pipe.student_limit)
        self.teacher_rows = padded_length(longest[1], ROWS, self.pipe.teacher_limit)

    def image(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""
        return self.store.picture(row)

    def contexts(self, captions: Sequence[Caption]) -> Contexts:
        """Both contexts of the captions, padded, as host arrays."""
        student, teacher = zip(*(self.store.load(caption) for caption in captions), strict=True)
        return Contexts(
            Context(*pad_stack(student, self.student_rows)),
            Context(*pad_stack(teacher, self.teacher_rows)),
        )

    def batch(self, index: BatchIndex, accumulate: int) -> Contexts:
        """The contexts of a batch with a leading axis of micro-batches."""
        captions = list(zip(index.rows.tolist(), index.captions.tolist(), strict=True))
        both = self.contexts(captions)
        return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), both)


class CachedFeatures:
    """Features in a cache by content, computed where they are missing."""

    def __init__(self, pipe: Pipeline, dataset: Dataset, config: ConfigDict, folder: Path):
        self.dataset, self.teacher = dataset, config.teacher
        self.cache = FeatureCache(folder)
        self.encoder = Encoder(pipe, dataset, config.teacher)
        self.digest = pipe.encoder_digest(Path(folder) / DIGESTS)
        self.picture = self.encoder.image

    def keys(self, caption: Caption) -> tuple[str, str]:
        """Where the cache has the student's and the teacher's features."""
        row, i = caption
        text = self.dataset.rows[row].captions[i][1]
        options = {
            "min_pixels": self.teacher.min_pixels,
            "max_pixels": self.teacher.max_pixels,
            "doubled": self.teacher.doubled_template,
        }
        return (
            feature_key(role="student", prompt=text, encoder=self.digest, options={}),
            feature_key(
                role="teacher",
                prompt=text,
                encoder=self.digest,
                options=options,
                image=self.dataset.infos[row].digest,
                crop=crop_name(*self.dataset.buckets[row]),
            ),
        )

    def compute(self, report: Callable[[str], None]) -> None:
        """Computes what the cache lacks. Raises `UserError` before with all over-long captions."""
        # What is cached has passed this check before.
        keys = {caption: self.keys(caption) for caption in self.dataset.captions()}
        missing = set(self.cache.missing(key for pair in keys.values() for key in pair))
        todo: dict[Caption, list[int]] = {}
        for caption, pair in keys.items():
            roles = [role for role in (STUDENT, TEACHER) if pair[role] in missing]
            missing -= {pair[role] for role in roles}  # captions may be equal
            if roles:
                todo[caption] = roles
        self.encoder.lengths(list(todo))
        total = sum(map(len, todo.values()))
        start, shown = time.monotonic(), 0.0
        for done, (caption, role, features) in enumerate(self.encoder.encode(todo), 1):
            self.cache.put(keys[caption][role], {"features": features})
            now = time.monotonic()
            if now - shown > 5 or done == total:
                left = (now - start) / done * (total - done)
                report(f"encoding captions and images: {done}/{total}, {left:.0f} s left")
                shown = now
        self._longest = [
            max(self.cache.shapes(pair[role])["features"][0] for pair in keys.values())
            for role in (STUDENT, TEACHER)
        ]

    def longest(self, role: int) -> int:
        """See `Store`."""
        return self._longest[role]

    def load(self, caption: Caption) -> tuple[np.ndarray, np.ndarray]:
        """See `Store`."""
        return tuple(self.cache.load(key)["features"] for key in self.keys(caption))


def check_prepared(prepared: Prepared, pipe: Pipeline, config: ConfigDict, folder: Path) -> None:
    """Raises `UserError` where a prepared data set belongs to another configuration or encoder.

    Encoders whose folders are not here are not looked at: a machine that trains needs none.
    """
    digests = pipe.encoder_digests(Path(folder) / DIGESTS)
    prepared.check(digests | teacher_settings(config), SETTINGS)
    if prepared.channels != pipe.config.caption_dim:
        raise UserError(
            f"{prepared.folder}: its features have {prepared.channels} channels, the model takes "
            f"{pipe.config.caption_dim}; prepare the data set with this model's encoder"
        )
