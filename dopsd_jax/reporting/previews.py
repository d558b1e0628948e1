"""Pictures of how far a run is: target, base, teacher and tuned, side by side, on fixed noise."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from dopsd_jax.common.errors import UserError
from dopsd_jax.conditioning.features import Features
from dopsd_jax.data.dataset import Dataset, spread
from dopsd_jax.data.holdout import RowsByShape
from dopsd_jax.dopsd import Contexts
from dopsd_jax.families.base import STUDENT, PaddedLengths
from dopsd_jax.families.drawing import Wish, draw
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.families.sampling import start_noise
from dopsd_jax.parallel import multihost
from dopsd_jax.reporting import pictures

NOISE_SEED = 2026  # not the training seed: the noise of the grids is no training noise
THUMBNAILS, ACROSS = 24, 6  # training pictures in one grid
CELLS = 320, 512  # pixels: the cells of a grid are as large as its pictures, within these


class Sample(NamedTuple):
    """One row of the grids. `target`: None for a prompt that is of no row of the data set."""

    caption: str
    contexts: Contexts
    noise: Float[Array, "1 h w c"]
    target: np.ndarray | None
    references: Sequence[np.ndarray]


def rows_of(dataset: Dataset, count: int) -> list[int]:
    """Rows to look at: spread over the data set, the same ones in every program."""
    if dataset.features is None:
        return spread(len(dataset.rows), count)
    shown = dataset.features.shown
    if len(shown) < min(count, len(dataset.rows)):
        raise UserError(
            f"config.sample_rows: {count}, but {dataset.features.folder} kept the pictures of "
            f"{len(shown)} rows; lower it"
        )
    return [shown[i] for i in spread(len(shown), count)]


def write_training_pictures(features: Features, rows: RowsByShape, workdir: Path) -> None:
    """Writes samples/training.png: pictures spread over `rows`, which are trained on.

    Every process calls it, the first writes. Of a prepared data set only some pictures are there.
    """
    prepared = features.dataset.features
    trained = sorted(int(row) for own in rows.values() for row in own)
    known = [row for row in trained if prepared is None or row in prepared.shown]
    if not known or not multihost.is_first():
        return
    images = [features.image(known[i]) for i in spread(len(known), THUMBNAILS)]
    images += [None] * (-len(images) % ACROSS)
    rows = [pictures.GridRow("", images[i : i + ACROSS]) for i in range(0, len(images), ACROSS)]
    pictures.save_grid(workdir / pictures.TRAINING, [""] * ACROSS, rows, cell=160)


def _own(pipe: Pipeline, features: Features, rows: PaddedLengths) -> list[Sample]:
    """What config.sample_prompts names, with contexts of these lengths."""
    own = features.own_prompts
    if not own.texts:
        return []
    (width, height), _ = Counter(features.dataset.buckets).most_common(1)[0]
    shape = pipe.latent_shape(height, width)
    return [
        Sample(text, Contexts(context, None), start_noise(NOISE_SEED, 1, shape, number), None, ())
        for number, (text, context) in enumerate(zip(own.texts, own.contexts(rows), strict=True))
    ]


class Previews:
    """Grids of rows of the data set, and of prompts of one's own, with the deployed sampler.

    The noise is the same every time. `samples`: the rows. `prompts`: what config.sample_prompts
    names, drawn in the commonest size of the data set.

    The base model's pictures are drawn here and kept: make it before the pipeline hands its weights
    over to training.
    """

    def __init__(self, pipe: Pipeline, features: Features, rows: Sequence[int], workdir: Path):
        self.pipe, self.workdir = pipe, workdir
        has_teacher = features.needs.teacher
        self.samples = []
        lengths = features.own_prompts.rows(features.rows[STUDENT])  # one for all that is drawn
        for row in rows:
            width, height = features.dataset.buckets[row]
            shape = pipe.latent_shape(height, width)
            noise = start_noise(NOISE_SEED, 1, shape, row)
            _, i = caption = features.dataset.caption(row, features.dataset.prompt_keys)
            contexts = features.contexts([caption], rows=lengths)
            text = features.dataset.rows[row].captions[i][1]
            edited = features.edited(row)
            self.samples.append(Sample(text, contexts, noise, features.image(row), edited))
        self.prompts = _own(pipe, features, lengths)
        references = pictures.reference_columns(s.references for s in self.samples)
        models = ("base", *["teacher"] * has_teacher, "tuned")
        self.columns = (*references, "target", *models)
        self._places = len(references)
        # Before training the trained part is the base model's: adapters add nothing yet.
        self.base = self._by_student(pipe.split[1])

    def _by_student(self, trained) -> list[np.ndarray]:
        """Every sample and every prompt, without a picture beside it."""
        shown = (*self.samples, *self.prompts)
        return draw(self.pipe, trained, [Wish(s.noise, s.contexts.student) for s in shown])

    def rows(self, student, teacher) -> list[pictures.GridRow]:
        """The pictures of every sample, then of every prompt, in the order of `columns`.

        `teacher` draws only for methods that ask a teacher in its own context.
        """
        columns = [self.base]
        if "teacher" in self.columns:
            wishes = [Wish(s.noise, s.contexts.teacher) for s in self.samples]
            columns.append([*draw(self.pipe, teacher, wishes), *[None] * len(self.prompts)])
        columns.append(self._by_student(student))
        found = []
        for sample, *drawn in zip((*self.samples, *self.prompts), *columns, strict=True):
            before = *pictures.filled(sample.references, self._places), sample.target
            found.append(pictures.GridRow(sample.caption, [*before, *drawn]))
        return found

    def write(self, step: int, student, teacher) -> Path:
        """Writes the grid of a step; returns its path. Every process calls it, the first writes."""
        path = pictures.sample_path(self.workdir, step)
        title = f"step {step}, {self.pipe.family.DEPLOYED_STEPS} forwards"
        rows = self.rows(student, teacher)
        if multihost.is_first():
            side = max(max(row.images[-1].shape[:2]) for row in rows)
            cell = min(max(side, CELLS[0]), CELLS[1])
            pictures.save_grid(path, self.columns, rows, title=title, cell=cell)
        return path
