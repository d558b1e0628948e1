"""Pictures of how far a run is: target, base, teacher and tuned, side by side, on fixed noise."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dopsd_jax.common.errors import UserError
from dopsd_jax.conditioning.features import Features
from dopsd_jax.data.dataset import Dataset, spread
from dopsd_jax.data.holdout import RowsByShape
from dopsd_jax.dopsd import Contexts
from dopsd_jax.families.base import STUDENT
from dopsd_jax.families.pipeline import Pipeline, start_noise
from dopsd_jax.parallel import multihost
from dopsd_jax.reporting import pictures

NOISE_SEED = 2026  # not the training seed: the noise of the grids is no training noise
THUMBNAILS, ACROSS = 24, 6  # training pictures in one grid
CELLS = 320, 512  # pixels: the cells of a grid are as large as its pictures, within these


class Sample(NamedTuple):
    """One row of the grids. `target`: None for a prompt that is of no row of the data set."""

    caption: str
    contexts: Contexts
    noise: jax.Array
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


def _own(pipe: Pipeline, features: Features) -> list[Sample]:
    """What config.sample_prompts names."""
    own = features.own_prompts
    if not own.texts:
        return []
    (width, height), _ = Counter(features.dataset.buckets).most_common(1)[0]
    shape = pipe.latent_shape(height, width)
    contexts = own.contexts(features.rows[STUDENT])
    return [
        Sample(text, Contexts(context, None), noise[None], None, ())
        for text, context, noise in zip(
            own.texts, contexts, start_noise(NOISE_SEED, len(contexts), shape), strict=True
        )
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
        for row in rows:
            width, height = features.dataset.buckets[row]
            shape = pipe.latent_shape(height, width)
            noise = start_noise(NOISE_SEED, row + 1, shape)[row:]
            _, i = caption = features.dataset.caption(row, features.dataset.prompt_keys)
            contexts, text = features.contexts([caption]), features.dataset.rows[row].captions[i][1]
            edited = features.edited(row)
            self.samples.append(Sample(text, contexts, noise, features.image(row), edited))
        self.prompts = _own(pipe, features)
        references = pictures.reference_columns(s.references for s in self.samples)
        models = ("base", *["teacher"] * has_teacher, "tuned")
        self.columns = (*references, "target", *models)
        self._places = len(references)
        # Before training the trained part is the base model's: adapters add nothing yet.
        base = pipe.split[1]
        self.base = [
            self._picture(base, s.contexts.student, s.noise) for s in (*self.samples, *self.prompts)
        ]

    def _picture(self, trained, context, noise) -> np.ndarray:
        grid = self.pipe.deployed_grid(noise.shape[1:])
        latents = self.pipe.sample(trained, noise, context, grid)
        return self.pipe.decode(multihost.to_host(latents))[0]

    def rows(self, student, teacher) -> list[pictures.GridRow]:
        """The pictures of every sample, then of every prompt, in the order of `columns`.

        `teacher` draws only for methods that ask a teacher in its own context.
        """
        found = []
        for base, sample in zip(self.base, (*self.samples, *self.prompts), strict=True):
            drawn = [*pictures.filled(sample.references, self._places), sample.target, base]
            if "teacher" in self.columns:
                shown = sample.contexts.teacher
                told = None if shown is None else self._picture(teacher, shown, sample.noise)
                drawn.append(told)
            drawn.append(self._picture(student, sample.contexts.student, sample.noise))
            found.append(pictures.GridRow(sample.caption, drawn))
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
