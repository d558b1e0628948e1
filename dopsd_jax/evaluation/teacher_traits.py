"""What the teacher takes from the picture it is shown, measured before training.

D-OPSD teaches what the teacher adds to the student's own prediction. A teacher that copies its
picture teaches the mean of the copies; one that ignores the caption cannot be steered; and a model
whose first clean estimate is a blur has no few-step ability that training could lose. So `check`
draws each row from several noises and says what was found, in numbers and in one sentence.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from PIL import Image

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.flow import euler
from dopsd_jax.conditioning.anchors import GENERAL, lines_of
from dopsd_jax.conditioning.cached import sees_picture
from dopsd_jax.conditioning.encoding import Encoder
from dopsd_jax.conditioning.padding import longest, padded_rows, shapes_of
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.dopsd import Denoiser
from dopsd_jax.evaluation.appearance import crispness
from dopsd_jax.evaluation.scorer import Picture
from dopsd_jax.families.base import STUDENT, TEACHER, Features
from dopsd_jax.families.drawing import Wish, draw
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.families.sampling import start_noise
from dopsd_jax.methods.options import OTHER_PICTURE
from dopsd_jax.parallel import multihost, sharding
from dopsd_jax.reporting.previews import Sample

NOISES = 3  # from which each row is drawn
NOISE_SEED = 411
LIKENESS_SIDE = 64  # pixels: finer details are no matter of likeness

# Where the recommendation changes. NOTHING: of the gap. SEES: the teacher's likeness to the target
# must exceed the student's by so much. Two pictures of a likeness of .9 differ in details only.
NOTHING, SEES, COPIES, OBEYS, BLUR = 1e-3, 0.02, 0.9, 0.3, 0.5
TINY = 1e-6


class Traits(NamedTuple):
    """Of one row; the figures of the student are of the same noises.

    gap: rms(v_student - v_teacher) / rms(v_teacher) at each state of the student's rollout.
    sharp, student_sharp: sharpness of the clean estimates there, teacher's and student's, relative
      to the student's finished picture.
    copies: likeness of the teacher's pictures to the one it is shown. student_copies: of the
      student's. alike: likeness of the teacher's pictures, of different noises, to one another.
      student_alike: of the student's.
    moved, student_moved: how far another caption moves the first of the pictures, root mean square
      in units of 255; None if it was not asked.
    """

    gap: Float[np.ndarray, " K"]
    sharp: Float[np.ndarray, " K"]
    student_sharp: Float[np.ndarray, " K"]
    copies: float
    student_copies: float
    alike: float
    student_alike: float
    moved: float | None = None
    student_moved: float | None = None


class Other(NamedTuple):
    """Another caption for a row: its features for the student, and beside the row's own picture."""

    text: str
    student: Features
    teacher: Features


def other_captions(
    pipe: Pipeline, dataset: Dataset, config: ConfigDict, rows: Sequence[int]
) -> list[Other] | None:
    """For each row the next one's caption, or an ordinary prompt where that says the same.

    To be called before the encoders are freed. None where the teacher sees no picture, and for a
    prepared data set, which comes without encoders.
    """
    if dataset.features is not None or not sees_picture(config, pipe.family):
        return None
    encoder, found = Encoder(pipe, dataset, config), []
    ordinary = [text for _, text in lines_of(GENERAL)]
    texts = [encoder.text(dataset.caption(row, dataset.prompt_keys), STUDENT) for row in rows]
    for number, (row, own) in enumerate(zip(rows, texts, strict=True)):
        text, first = texts[(number + 1) % len(texts)], number % len(ordinary)
        able = [text] if text != own else [*ordinary[first:], *ordinary[:first]]
        pictures = [encoder.pictures(row, role) for role in (STUDENT, TEACHER)]
        found.append(_first_taken(pipe, able, pictures, encoder.options))
    return found


def _first_taken(
    pipe: Pipeline,
    texts: Sequence[str],
    pictures: Sequence[Sequence[Picture]],
    options: Sequence[Mapping[str, Any]],
) -> Other:
    """The first of the texts that the model takes: a miniature takes no long ones.

    pictures, options: by role. Raises `UserError` where it takes none.
    """
    problems: list[str] = []
    for text in texts:
        try:
            made = [
                pipe.features(role, text, pictures[role], options[role])
                for role in (STUDENT, TEACHER)
            ]
            return Other(text, *made)
        except UserError as error:
            problems += error.problems
    raise UserError(*problems)


def shown_pictures(
    pipe: Pipeline, dataset: Dataset, config: ConfigDict, rows: Sequence[int]
) -> list[Picture | None] | None:
    """For each row the picture that its teacher is shown; None in the list: the row's own.

    None for a prepared data set whose teachers are shown other ones: it has kept none of them.
    """
    if dataset.features is not None and config.teacher.context == OTHER_PICTURE:
        return None
    encoder = Encoder(pipe, dataset, config)
    return [encoder.shown(row) if dataset.others else None for row in rows]


class Measurement:
    """Measures rows of `Previews`.

    Args:
      student, teacher: trained parts of the network.
      grid: (height, width) of a latent -> training's noise levels.
    """

    def __init__(
        self,
        pipe: Pipeline,
        features: Any,
        student: Any,
        teacher: Any,
        grid: Callable[[int, int], Sequence[float]],
    ):
        self.pipe, self.rows, self.grid = pipe, features.rows, grid
        self.trained = (student, teacher)
        self.walk = jax.jit(functools.partial(_walk, pipe.family.denoiser(pipe.split[0])))

    def __call__(
        self, sample: Sample, other: Other | None = None, seen: Picture | None = None
    ) -> Traits:
        """The traits of a row; `other` may be missing. seen: by its teacher; None: the target."""
        noises = np.asarray(start_noise(NOISE_SEED, NOISES, sample.noise.shape[1:]))
        (own, own_other), (shown, shown_other) = (
            self._draw(role, sample, noises, other) for role in (STUDENT, TEACHER)
        )
        gap, estimates = self._walk(sample, noises[:1])
        finished = max(sharpness(own[0]), TINY)
        sharp = [
            np.array([sharpness(self.pipe.decode(x)[0]) / finished for x in each])
            for each in estimates
        ]
        seen = sample.target if seen is None else seen
        to_seen = lambda images: float(np.mean([likeness(a, seen) for a in images]))
        moved = lambda images, told: None if told is None else distance(told, images[0])
        return Traits(
            gap, sharp[TEACHER], sharp[STUDENT],
            to_seen(shown), to_seen(own), mutual(shown), mutual(own),
            moved(shown, shown_other), moved(own, own_other),
        )  # fmt: skip

    def _draw(
        self, role: int, sample: Sample, noises: Float[np.ndarray, "n h w c"], other: Other | None
    ) -> tuple[list[Picture], Picture | None]:
        """A role's pictures, one from each noise, and that of the other caption from the first."""
        wishes = [Wish(noises[i : i + 1], sample.contexts[role]) for i in range(len(noises))]
        if other is not None:
            features = (other.student, other.teacher)[role]
            own = padded_rows([shapes_of(features)], self.pipe, role)
            rows = longest(self.rows[role], own)
            wishes.append(Wish(noises[:1], self.pipe.family.collate([features], rows)))
        drawn = draw(self.pipe, self.trained[role], wishes)
        return drawn[: len(noises)], None if other is None else drawn[-1]

    def _walk(
        self, sample: Sample, noise: Float[np.ndarray, "1 h w c"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """At training's nodes: relative gaps [K], clean estimates by role [2, K, 1, h, w, c]."""
        sigma, base = (
            jnp.asarray(self.grid(*noise.shape[1:3]), jnp.float32),
            self.pipe.split[2],
        )
        with sharding.spread_samples(self.pipe.mesh, (sample.contexts, noise)) as own:
            found = self.walk(*self.trained, base, *own, sigma)
        return tuple(map(multihost.to_host, found))


def _walk(net: Denoiser, student, teacher, base, contexts, noise, sigma):
    precomputed = net.precompute(student, base, contexts.student)
    precomputed_teacher = net.precompute(teacher, base, contexts.teacher)
    rms = lambda v: jnp.sqrt(jnp.mean(jnp.square(v)))

    def denoise(x, pair):
        v = net.velocity(student, base, x, pair[0], contexts.student, precomputed)
        target = net.velocity(teacher, base, x, pair[0], contexts.teacher, precomputed_teacher)
        estimates = jnp.stack([x - pair[0] * v, x - pair[0] * target])
        return euler(x, v, *pair), (rms(v - target) / rms(target), estimates)

    gaps, estimates = jax.lax.scan(denoise, noise, (sigma[:-1], sigma[1:]))[1]
    return gaps, jnp.moveaxis(estimates, 1, 0)


# --- pictures


def likeness(a: Picture, b: Picture) -> float:
    """Correlation of two pictures' pixels, of small versions: 1 for equal ones, 0 for strangers."""
    x, y = (_small(picture, b).ravel() for picture in (a, b))
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / max(np.sqrt((x @ x) * (y @ y)), TINY))


def _small(picture: Picture, like: Picture) -> np.ndarray:
    height, width = like.shape[:2]
    scale = min(1.0, LIKENESS_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX), np.float64)


def mutual(images: Sequence[Picture]) -> float:
    """Mean likeness of all pairs."""
    return float(np.mean([likeness(a, b) for a, b in itertools.combinations(images, 2)]))


def distance(a: Picture, b: Picture) -> float:
    """Root mean square difference, in units of 255."""
    return float(np.sqrt(np.mean(np.square(a.astype(np.float64) - b))))


def sharpness(picture: Picture) -> float:
    """The crispness of one picture."""
    return float(crispness(picture[None])[0])


# --- words


def describe(found: Sequence[Traits]) -> list[str]:
    """A line a row, and two of what the rows have in common."""
    steps = lambda name: np.mean([getattr(t, name) for t in found], axis=0)
    series = lambda values: " ".join(f"{v:.3f}" for v in values)
    lines = [f"teacher: relative gap by step, {series(steps('gap'))}"]
    lines += [
        "sharpness of clean estimates by step, of the finished picture: "
        f"student {series(steps('student_sharp'))}, teacher {series(steps('sharp'))}"
    ]
    for number, t in enumerate(found, 1):
        moved = "not asked"
        if t.moved is not None:
            moved = f"teacher {t.moved:.1f}, student {t.student_moved:.1f} (rms of 255)"
        lines.append(
            f"row {number}: likeness to its picture: teacher {t.copies:.2f}, student "
            f"{t.student_copies:.2f}; of {NOISES} noises to each other: teacher {t.alike:.2f}, "
            f"student {t.student_alike:.2f}; moved by another caption: {moved}"
        )
    return lines


def obedience(found: Sequence[Traits]) -> float | None:
    """How far another caption moves the teacher's pictures, relative to the student's."""
    asked = [t for t in found if t.moved is not None]
    if not asked:
        return None
    return sum(t.moved for t in asked) / max(sum(t.student_moved for t in asked), TINY)


def recommendation(found: Sequence[Traits]) -> str:
    """What the numbers mean for the settings, in one sentence."""
    mean = lambda name: float(np.mean([getattr(t, name) for t in found]))
    obeys = obedience(found)
    first = float(np.mean([t.student_sharp[0] for t in found]))
    if np.mean([t.gap for t in found]) < NOTHING:
        return "warning: the teacher's context changes nothing; there is nothing to learn"
    if mean("copies") - mean("student_copies") < SEES:
        return (
            "warning: the teacher's pictures are no more like the targets than the student's; look "
            "at the pictures before training"
        )
    if first < BLUR:
        return (
            f"advice: the student's first clean estimate is a blur ({first:.2f} of the finished "
            "picture's sharpness): this model has little few-step ability to lose, and method sft "
            "may do as well"
        )
    if obeys is not None and obeys < OBEYS:
        return (
            f"advice: the teacher hardly follows its caption ({obeys:.2f} of what the student "
            "does): try teacher.vision_dropout=0.75"
        )
    if mean("copies") > COPIES and mean("alike") > COPIES > mean("student_alike"):
        return (
            f"advice: the teacher copies its picture (likeness {mean('copies'):.2f}, whatever the "
            "noise), or the captions say all that is on it: where they do not say place and "
            "background, describe them, or try teacher.vision_dropout=0.75"
        )
    return (
        "advice: the teacher takes from its picture what the thing is like, and the rest from the "
        "caption and the noise: the defaults suit"
    )
