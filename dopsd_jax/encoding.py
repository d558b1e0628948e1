"""Captions and pictures through the encoders, one by one or in batches of one shape."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from dopsd_jax.data import vlm_images
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import fit, open_image
from dopsd_jax.data.prepared import Caption
from dopsd_jax.errors import UserError, raise_if
from dopsd_jax.families.zimage_encoders import padded_tokens
from dopsd_jax.families.zimage_pipeline import Pipeline

MAX_FAULTS = 20
STUDENT, TEACHER = 0, 1


class Encoder:
    """Makes the features of a data set's captions, for the student and for the teacher."""

    def __init__(self, pipe: Pipeline, dataset: Dataset, teacher: ConfigDict):
        self.pipe, self.dataset, self.doubled = pipe, dataset, teacher.doubled_template
        self.settings = pipe.image_settings(teacher.min_pixels, teacher.max_pixels)

    def image(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""
        return fit(open_image(self.dataset.rows[row].image), *self.dataset.buckets[row])

    def _tokens(self, caption: Caption) -> tuple[list[int], list[int], tuple[int, int]]:
        """Tokens for student and teacher, and the grid of the teacher's picture."""
        row = self.dataset.rows[caption[0]]
        text, (width, height) = row.captions[caption[1]][1], self.dataset.buckets[caption[0]]
        student = self.pipe.student_tokens(text)
        grid = vlm_images.grid_of(self.settings, height, width, str(row.image))
        return student, self.pipe.teacher_tokens(text, grid, self.doubled), grid

    def lengths(self, captions: Sequence[Caption]) -> Int[np.ndarray, "k 2"]:
        """Positions of their features. Raises `UserError` with every caption that is too long."""
        faults, found = [], np.zeros((len(captions), 2), np.int64)
        for i, caption in enumerate(captions):
            try:
                student, teacher, _ = self._tokens(caption)
                found[i] = len(student), len(teacher)
            except UserError as error:
                faults += [f"{self.dataset.rows[caption[0]].where}: {p}" for p in error.problems]
        raise_if(faults, MAX_FAULTS)
        return found

    def encode(
        self, wanted: Mapping[Caption, Sequence[int]], batch: int = 1
    ) -> Iterator[tuple[Caption, int, Float[np.ndarray, "n c"]]]:
        """(caption, role, features) for each caption's wanted roles, in the order they are made.

        Captions of the same padded length, and pictures of the same size, share a batch; a batch
        that is not full is filled up by repeating, so that every shape is compiled once.
        """
        # Pictures are decoded when their batch is run: only one batch of them is in memory.
        texts: dict[int, list] = defaultdict(list)
        image_texts: dict[tuple, list] = defaultdict(list)
        for caption, roles in wanted.items():
            student, teacher, grid = self._tokens(caption)
            if STUDENT in roles:
                texts[padded_tokens(len(student))].append((caption, student))
            if TEACHER in roles:
                image_texts[padded_tokens(len(teacher)), grid].append((caption, teacher))
        for group in texts.values():
            for some in _batches(group, batch):
                ids = _filled([ids for _, ids in some], batch)
                features = self.pipe.encode_texts(ids)
                for (caption, _), feature in zip(some, features[: len(some)], strict=True):
                    yield caption, STUDENT, feature
        for (_, grid), group in image_texts.items():
            for some in _batches(group, batch):
                patches = [
                    vlm_images.preprocess(self.image(row), self.settings)[0] for (row, _), _ in some
                ]
                ids = _filled([ids for _, ids in some], batch)
                features = self.pipe.encode_image_texts(ids, _filled(patches, batch), grid)
                for (caption, _), feature in zip(some, features[: len(some)], strict=True):
                    yield caption, TEACHER, feature


def _batches(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _filled(items: list, size: int) -> list:
    return items + [items[-1]] * (size - len(items))
