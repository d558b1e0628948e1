"""Captions and pictures through the encoders, one by one or in batches of one shape."""

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import fit, open_image
from dopsd_jax.data.prepared import Caption
from dopsd_jax.families.zimage.encoders import padded_tokens
from dopsd_jax.families.zimage.pipeline import Pipeline
from dopsd_jax.models import vlm_images

MAX_FAULTS = 20
# What is made of a caption: its text alone, as students are told it; the text with the row's
# picture; and the text of its class prompt.
STUDENT, TEACHER, PRIOR = range(3)
KINDS = 3


class Encoder:
    """Makes the features of a data set's captions."""

    def __init__(self, pipe: Pipeline, dataset: Dataset, config: ConfigDict):
        self.pipe, self.dataset = pipe, dataset
        self.teacher, self.dreambooth = config.teacher, config.dreambooth

    def image(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""
        return fit(open_image(self.dataset.rows[row].image), *self.dataset.buckets[row])

    def latent(self, row: int) -> Float[np.ndarray, "h w c"]:
        """The picture's clean latent, float32: the mean of the posterior."""
        return np.asarray(self.pipe.encode_image(self.image(row)[None])[0])

    def text(self, caption: Caption, kind: int) -> str:
        """What the encoder is told for a caption."""
        row, i = caption
        text = self.dataset.rows[row].captions[i][1]
        return class_prompt(text, self.dreambooth) if kind == PRIOR else text

    @functools.cached_property
    def settings(self) -> vlm_images.ImageSettings:
        """How the pictures that the teacher sees are made."""
        return self.pipe.image_settings(self.teacher.min_pixels, self.teacher.max_pixels)

    def _tokens(self, caption: Caption, kind: int) -> tuple[list[int], tuple[int, int] | None]:
        """Tokens of a caption, and the grid of the picture that goes with them."""
        row, text = self.dataset.rows[caption[0]], self.text(caption, kind)
        if kind != TEACHER:
            # What only teachers are told may be as long as what they are told with a picture.
            trained = row.captions[caption[1]][0] in self.dataset.prompt_keys
            limit = self.pipe.student_limit if trained else self.pipe.teacher_limit
            return self.pipe.student_tokens(text, limit), None
        width, height = self.dataset.buckets[caption[0]]
        grid = vlm_images.grid_of(self.settings, height, width, str(row.image))
        return self.pipe.teacher_tokens(text, grid, self.teacher.doubled_template), grid

    def lengths(self, wanted: Mapping[Caption, Sequence[int]]) -> Int[np.ndarray, "k {KINDS}"]:
        """Positions of each caption's features, 0 for a kind that is not wanted.

        Raises `UserError` with every caption that is too long.
        """
        faults, found = [], np.zeros((len(wanted), KINDS), np.int64)
        for i, (caption, kinds) in enumerate(wanted.items()):
            try:
                for kind in kinds:
                    found[i, kind] = len(self._tokens(caption, kind)[0])
            except UserError as error:
                faults += [f"{self.dataset.rows[caption[0]].where}: {p}" for p in error.problems]
        raise_if(faults, MAX_FAULTS)
        return found

    def encode(
        self, wanted: Mapping[Caption, Sequence[int]], batch: int = 1
    ) -> Iterator[tuple[Caption, int, Float[np.ndarray, "n c"]]]:
        """(caption, kind, features) for each caption's wanted kinds, in the order they are made.

        Captions of the same padded length, and pictures of the same size, share a batch; a batch
        that is not full is filled up by repeating, so that every shape is compiled once.
        """
        # Pictures are decoded when their batch is run: only one batch of them is in memory.
        groups: dict[tuple, list] = defaultdict(list)
        for caption, kinds in wanted.items():
            for kind in kinds:
                tokens, grid = self._tokens(caption, kind)
                groups[padded_tokens(len(tokens)), grid].append((caption, kind, tokens))
        for (_, grid), group in groups.items():
            for first in range(0, len(group), batch):
                some = group[first : first + batch]
                ids = _filled([tokens for _, _, tokens in some], batch)
                if grid is None:
                    features = self.pipe.encode_texts(ids)
                else:
                    patches = [self._patches(row) for (row, _), _, _ in some]
                    features = self.pipe.encode_image_texts(ids, _filled(patches, batch), grid)
                for (caption, kind, _), feature in zip(some, features[: len(some)], strict=True):
                    yield caption, kind, feature

    def _patches(self, row: int) -> np.ndarray:
        return vlm_images.preprocess(self.image(row), self.settings)[0]


def concept_pattern(word: str) -> re.Pattern:
    """Where a caption names the concept: as a word of its own, if it is of letters."""
    edge = "[A-Za-z0-9]"
    before = f"(?<!{edge})" if re.match(edge, word[0]) else ""
    after = f"(?!{edge})" if re.match(edge, word[-1]) else ""
    return re.compile(before + re.escape(word) + after)


def class_prompt(caption: str, dreambooth: ConfigDict) -> str:
    """The caption with the class word in the place of the concept's."""
    return concept_pattern(dreambooth.concept_word).sub(lambda _: dreambooth.class_word, caption)


def _filled(items: list, size: int) -> list:
    return items + [items[-1]] * (size - len(items))
