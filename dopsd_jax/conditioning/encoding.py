"""Captions and pictures through the encoders, one by one or in batches of one shape."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.data.blobs import Blob
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import ImageLimits, fit, open_image
from dopsd_jax.data.masks import cut_mask, open_mask
from dopsd_jax.data.prepared import Caption
from dopsd_jax.data.views import cut
from dopsd_jax.families.base import STUDENT, TEACHER, Features, Request
from dopsd_jax.families.pipeline import Pipeline

# Kinds of features: STUDENT, TEACHER (with the row's picture), and for the student's role the text
# of a class prompt.
PRIOR = 2
KINDS = 3
TO_BUCKET = "bucket"  # config.data.reference_crop: references are cut to the row's bucket
Shapes = dict[str, jax.ShapeDtypeStruct]


class Encoder:
    """Makes the features of a data set's captions."""

    def __init__(self, pipe: Pipeline, dataset: Dataset, config: ConfigDict):
        self.pipe, self.dataset = pipe, dataset
        self.to_bucket = config.data.reference_crop == TO_BUCKET
        self.dreambooth = config.dreambooth
        self.limits = ImageLimits(max_pixels=config.data.max_pixels)
        self.options = [pipe.options(role, config.teacher) for role in (STUDENT, TEACHER)]

    def _open(self, path: Path | Blob) -> UInt8[np.ndarray, "H W 3"]:
        return open_image(path, self.limits)

    def image(self, row: int) -> np.ndarray:
        """The row's picture as training sees it: cut to its bucket."""
        own, digest = self.dataset.rows[row], self.dataset.infos[row].digest
        return cut(self._open(own.image), self.dataset.buckets[row], own.view, digest)

    def shown(self, row: int) -> np.ndarray:
        """The picture that the row's teacher is shown, cut to the row's bucket."""
        if not self.dataset.others:
            return self.image(row)
        return fit(self._open(self.dataset.others[row].image), *self.dataset.buckets[row])

    def references(self, row: int) -> list[np.ndarray]:
        """The pictures that the row edits, as the model is given them."""
        found = [self._open(path) for path in self.dataset.rows[row].references]
        bucket = self.dataset.buckets[row]
        return [fit(picture, *bucket) if self.to_bucket else picture for picture in found]

    def edited(self, row: int) -> list[np.ndarray]:
        """The pictures that the row edits, in the sizes that the model sees."""
        sizes = self.dataset.shape(row).references
        pairs = zip(self.references(row), sizes, strict=True)
        return [fit(picture, *size) for picture, size in pairs]

    def pictures(self, row: int, kind: int) -> list[np.ndarray]:
        """What is shown with a caption of the row."""
        own = [self.shown(row)] if kind == TEACHER else []
        return [*self.references(row), *own]

    def latent(self, row: int) -> Float[np.ndarray, "h w c"]:
        """The picture's clean latent, float32: the mean of the posterior."""
        return np.asarray(self.pipe.encode_image(self.image(row)[None])[0])

    def mask(self, row: int) -> UInt8[np.ndarray, "h w"]:
        """The row's mask on the cells of its latent; 255 counts.

        Raises `UserError` where the bucket cuts off all of the white.
        """
        own, bucket = self.dataset.rows[row], self.dataset.buckets[row]
        factor = self.pipe.vae_config.factor
        digest = self.dataset.infos[row].digest
        cells = cut_mask(open_mask(own, self.limits), bucket, own.view, digest, factor)
        if not own.view.crop and not cells.any():
            raise UserError(
                f"{own.mask or own.image}: the part that counts is cut off where its picture goes "
                f"to the bucket {bucket}; crop the picture, or correct the mask"
            )
        return cells

    def masks(self, rows: Iterable[int]) -> Iterator[tuple[int, UInt8[np.ndarray, "h w"]]]:
        """(row, mask) of rows that have one. Raises `UserError` with all that `mask` refuses."""
        faults = []
        for row in rows:
            try:
                yield row, self.mask(row)
            except UserError as error:
                faults += error.problems
        raise_if(dict.fromkeys(faults))

    def text(self, caption: Caption, kind: int) -> str:
        """The text that is encoded for a caption."""
        row, i = caption
        text = self.dataset.rows[row].captions[i][1]
        return class_prompt(text, self.dreambooth) if kind == PRIOR else text

    def request(self, caption: Caption, kind: int) -> Request:
        """A caption as it will be encoded. Raises `UserError` if it is too long."""
        row, text = self.dataset.rows[caption[0]], self.text(caption, kind)
        shape = self.dataset.shape(caption[0])
        sizes = [(height, width) for width, height in shape.references]
        if kind != TEACHER:
            # A caption for the teacher alone may be as long as the teacher's captions with
            # pictures.
            trained = row.captions[caption[1]][0] in self.dataset.prompt_keys
            limits_of = STUDENT if trained else TEACHER
            return self.pipe.request(STUDENT, text, sizes=sizes, limits_of=limits_of)
        sizes.append((shape.bucket.height, shape.bucket.width))
        options, where = self.options[TEACHER], str(row.image)
        return self.pipe.request(TEACHER, text, sizes=sizes, options=options, where=where)

    def shapes(self, wanted: Mapping[Caption, Sequence[int]]) -> dict[tuple[Caption, int], Shapes]:
        """The shapes of the features of each caption's wanted kinds.

        Raises `UserError` with every caption that is too long.
        """
        faults, found = [], {}
        for caption, kinds in wanted.items():
            try:
                for kind in kinds:
                    found[caption, kind] = self.request(caption, kind).shapes
            except UserError as error:
                faults += [f"{self.dataset.rows[caption[0]].where}: {p}" for p in error.problems]
        raise_if(dict.fromkeys(faults))  # a row may be there several times, as in views
        return found

    def encode(
        self, wanted: Mapping[Caption, Sequence[int]], batch: int = 1
    ) -> Iterator[tuple[Caption, int, Features]]:
        """(caption, kind, features) for each caption's wanted kinds, in the order they are made.

        Requests of one group share a batch; an incomplete batch is filled up by repetition, so that
        every shape is compiled once.
        """
        # Pictures are decoded when their batch is run: only one batch of them is in memory.
        groups: dict[tuple, list] = defaultdict(list)
        for caption, kinds in wanted.items():
            for kind in kinds:
                request, role = self.request(caption, kind), TEACHER if kind == TEACHER else STUDENT
                groups[role, request.group].append((caption, kind, request))
        for (role, _), group in groups.items():
            for first in range(0, len(group), batch):
                some = group[first : first + batch]
                requests = _filled([request for _, _, request in some], batch)
                pictures = [self.pictures(row, kind) for (row, _), kind, _ in some]
                pictures = _filled(pictures, batch)
                made = self.pipe.encode(role, requests, pictures, self.options[role])
                for (caption, kind, _), features in zip(some, made[: len(some)], strict=True):
                    yield caption, kind, features


def concept_pattern(word: str) -> re.Pattern:
    """Finds the concept word in a caption: as a separate word, if it begins and ends in letters."""
    edge = "[A-Za-z0-9]"
    before = f"(?<!{edge})" if re.match(edge, word[0]) else ""
    after = f"(?!{edge})" if re.match(edge, word[-1]) else ""
    return re.compile(before + re.escape(word) + after)


def put_class(text: str, word: str, name: str) -> str:
    """The class name in the place of the concept's word: of `a [V] dog` remains `a dog`."""
    again = rf"(?:\s+(?i:{re.escape(name)})(?![A-Za-z0-9]))?"
    return re.sub(concept_pattern(word).pattern + again, lambda _: name, text)


def class_prompt(caption: str, dreambooth: ConfigDict) -> str:
    """The caption with the class word in the place of the concept's."""
    return put_class(caption, dreambooth.concept_word, dreambooth.class_word)


def _filled(items: list, size: int) -> list:
    return items + [items[-1]] * (size - len(items))
