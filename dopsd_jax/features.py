"""The encoders' outputs for a data set: computed once, cached by content, loaded by batch."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.data.cache import FeatureCache, feature_key
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import crop_name, fit, open_image
from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.data.padding import pad_stack, padded_length
from dopsd_jax.data.vlm_images import grid_of
from dopsd_jax.dopsd import Contexts
from dopsd_jax.errors import UserError, raise_if
from dopsd_jax.families.zimage import Context
from dopsd_jax.families.zimage_pipeline import Pipeline

ROWS = (
    64  # features are padded to a multiple of it: one length for the student, one for the teacher
)
Caption = tuple[int, int]  # row of the data set, caption of the row


class Features:
    """Features of every caption of a data set, for the student and for the teacher.

    `student_rows`, `teacher_rows`: the padded lengths, the same for all batches.
    """

    def __init__(self, pipe: Pipeline, dataset: Dataset, config: ConfigDict, folder: Path):
        self.pipe, self.dataset, self.teacher = pipe, dataset, config.teacher
        self.cache = FeatureCache(folder)
        self.captions = [
            (row, i)
            for row in range(len(dataset.rows))
            for i in range(len(dataset.rows[row].captions))
        ]
        digest = pipe.encoder_digest(Path(folder) / "digests.json")
        self.keys = {caption: self._keys(caption, digest) for caption in self.captions}

    def _keys(self, caption: Caption, encoder: str) -> tuple[str, str]:
        row, i = caption
        text = self.dataset.rows[row].captions[i][1]
        options = {
            "min_pixels": self.teacher.min_pixels,
            "max_pixels": self.teacher.max_pixels,
            "doubled": self.teacher.doubled_template,
        }
        return (
            feature_key(role="student", prompt=text, encoder=encoder, options={}),
            feature_key(
                role="teacher",
                prompt=text,
                encoder=encoder,
                options=options,
                image=self.dataset.infos[row].digest,
                crop=crop_name(*self.dataset.buckets[row]),
            ),
        )

    def check_lengths(self) -> None:
        """Raises `UserError` with every caption that is longer than the model takes."""
        faults = []
        settings = self.pipe.image_settings(self.teacher.min_pixels, self.teacher.max_pixels)
        for row, i in self.captions:
            text, (width, height) = self.dataset.rows[row].captions[i][1], self.dataset.buckets[row]
            try:
                self.pipe.student_tokens(text)
                grid = grid_of(settings, height, width, str(self.dataset.rows[row].image))
                self.pipe.teacher_tokens(text, grid, self.teacher.doubled_template)
            except UserError as error:
                faults += [f"{self.dataset.rows[row].where}: {p}" for p in error.problems]
        raise_if(faults)

    def prepare(self, report: Callable[[str], None] = print) -> None:
        """Computes what the cache lacks, then frees the encoders."""
        self.check_lengths()
        missing = set(self.cache.missing(key for pair in self.keys.values() for key in pair))
        todo = [c for c in self.captions if missing & set(self.keys[c])]
        start, shown = time.monotonic(), 0.0
        for done, caption in enumerate(todo, 1):
            self._encode(caption, missing)
            now = time.monotonic()
            if now - shown > 5 or done == len(todo):
                left = (now - start) / done * (len(todo) - done)
                report(f"encoding captions and images: {done}/{len(todo)}, {left:.0f} s left")
                shown = now
        self.pipe.release_encoders()
        shapes = [
            [self.cache.shapes(pair[role])["features"][0] for pair in self.keys.values()]
            for role in (0, 1)
        ]
        self.student_rows = padded_length(max(shapes[0]), ROWS, self.pipe.student_limit)
        self.teacher_rows = padded_length(max(shapes[1]), ROWS, self.pipe.teacher_limit)

    def _encode(self, caption: Caption, missing: set[str]) -> None:
        (row, i), (student, teacher) = caption, self.keys[caption]
        text = self.dataset.rows[row].captions[i][1]
        if student in missing:
            self.cache.put(student, {"features": self.pipe.student_features(text)})
        if teacher in missing:
            features = self.pipe.teacher_features(
                text,
                self.image(row),
                min_pixels=self.teacher.min_pixels,
                max_pixels=self.teacher.max_pixels,
                doubled=self.teacher.doubled_template,
            )
            self.cache.put(teacher, {"features": features})
        missing -= {student, teacher}

    def image(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""
        return fit(open_image(self.dataset.rows[row].image), *self.dataset.buckets[row])

    def contexts(self, captions: Sequence[Caption]) -> Contexts:
        """Both contexts of the captions, padded, as host arrays."""
        return Contexts(
            *(
                Context(
                    *pad_stack(
                        [self.cache.load(self.keys[c][role])["features"] for c in captions], rows
                    )
                )
                for role, rows in enumerate((self.student_rows, self.teacher_rows))
            )
        )

    def batch(self, index: BatchIndex, accumulate: int) -> Contexts:
        """The contexts of a batch with a leading axis of micro-batches."""
        captions = list(zip(index.rows.tolist(), index.captions.tolist(), strict=True))
        both = self.contexts(captions)
        return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), both)
