"""A short version of the miniature's scores: few pictures, cheap enough for repeated use."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Float

from dopsd_jax.conditioning.encoding import STUDENT, TEACHER
from dopsd_jax.evaluation.appearance import contrast
from dopsd_jax.evaluation.drawing import Painter, Shot
from dopsd_jax.evaluation.scorer import Case
from dopsd_jax.evaluation.verdict import TRUE, Findings, Likeness, Reading
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.miniature import judge, render, world_scorers
from dopsd_jax.miniature.world_scorers import CONCEPT, ORDINARY, OTHER


class ModelScores(NamedTuple):
    """One model. identity: of the concept, its arrangement factored out; concept: IoU where the
    caption places it; crispness, contrast: of its pictures, relative to the renderer's; retention:
    share of ordinary prompts whose shape and colour are both right. None: not asked."""

    model: str
    identity: float
    concept: float
    crispness: float
    contrast: float
    retention: float | None


class Exam:
    """Fixed prompts about a concept. Made once, it scores any number of weights.

    Contexts are computed here; afterwards the encoders may be freed. Every call draws pictures of
    the same shapes, so only the first compiles.

    Args:
      teacher: config.teacher.
      cases: of the kinds CONCEPT, ORDINARY and OTHER, of `world_scorers.cases` or `edit_cases`.
    """

    def __init__(self, pipe: Pipeline, teacher: Mapping[str, Any], cases: Sequence[Case]):
        of = lambda kind: [case for case in cases if case.kind == kind]
        self.concept, self.ordinary, self.others = map(of, (CONCEPT, ORDINARY, OTHER))
        self.painter = Painter(pipe, teacher, batch=len(self.concept))
        for role, own in ((STUDENT, cases), (TEACHER, self.concept)):
            for _ in self.painter.encode(own, role):
                pass

    def student(self, model: str, trained: nnx.State) -> ModelScores:
        """Scores weights that see the prompt alone: `trained` as `pipe.split` has it."""
        found = self.values(trained)
        right = found["named shape"] * found["named colour"]
        return _row(model, found, float(right.mean()))

    def teacher(self, model: str, trained: nnx.State) -> ModelScores:
        """Scores weights that see the target as well: an upper bound for the student."""
        return _row(model, self.values(trained, TEACHER), None)

    def values(self, trained: nnx.State, role: int = STUDENT) -> dict[str, Float[np.ndarray, " n"]]:
        """Each prompt's score by the metrics' names; the prompts of the concept alone for TEACHER.

        The values of two models, drawn by one exam, are pairs.
        """
        images = self._draw(trained, self.concept, role)
        scenes = [case.truth for case in self.concept]
        truth = world_scorers.fitted(images, scenes)
        rendered = render.render(truth)
        found = {
            "identity": world_scorers.likeness(images, scenes),
            "concept IoU": judge.iou(images, truth),
            "concept crispness": judge.crispness(images) / judge.crispness(rendered),
            "concept contrast": contrast(images) / contrast(rendered),
        }
        if role == TEACHER:
            return found
        images = self._draw(trained, self.ordinary, role)
        scenes, seen = [case.truth for case in self.ordinary], judge.see(images)
        for attribute in ("shape", "colour"):
            found[f"named {attribute}"] = np.array(
                [
                    getattr(one, attribute) == getattr(scene.things[0], attribute)
                    for one, scene in zip(seen, scenes, strict=True)
                ],
                float,
            )
        found["ordinary crispness"] = world_scorers.relative(judge.crispness)(images, scenes)
        if self.others:
            images = self._draw(trained, self.others, role)
            found["leaked concept"] = world_scorers.iou(images, [c.truth for c in self.others])
        return found

    def _draw(self, trained, cases, role) -> np.ndarray:
        shots = [Shot(case, 0) for case in cases]
        return np.stack([image for _, image in self.painter.draw(trained, shots, role)])


def _row(model: str, values: Mapping[str, np.ndarray], retention: float | None) -> ModelScores:
    names = ("identity", "concept IoU", "concept crispness", "concept contrast")
    return ModelScores(model, *(float(values[name].mean()) for name in names), retention)


def table(rows: Sequence[ModelScores]) -> list[str]:
    """Rows as lines of text."""
    cell = lambda value: (
        value if isinstance(value, str) else "-" if value is None else f"{value:.3f}"
    )
    cells = [ModelScores._fields, *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(f"{c:{'<' if i == 0 else '>'}{widths[i]}}" for i, c in enumerate(line))
        for line in cells
    ]


def findings(base: ModelScores, teacher: ModelScores, tuned: ModelScores) -> Findings:
    """What the three models' scores tell; from few prompts, so without intervals.

    A teacher that is sharper or has more contrast than true pictures is no measure: they are.
    """
    part = lambda a, b, of: [Reading(a / b, of=of)] if b else []
    seen = lambda a, b: part(a, min(b, 1.0), "teacher's" if b <= 1 else TRUE)
    return Findings(
        Likeness("identity", tuned.identity, base.identity, teacher.identity),
        {
            "crispness": seen(tuned.crispness, teacher.crispness),
            "contrast": seen(tuned.contrast, teacher.contrast),
            "retention": part(tuned.retention, base.retention, "base's"),
        },
    )
