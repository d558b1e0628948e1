"""What a model of the experiment is scored by: the miniature's own scorers, on fixed prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from dopsd_jax.conditioning.encoding import STUDENT, TEACHER
from dopsd_jax.evaluation.appearance import contrast
from dopsd_jax.evaluation.drawing import Painter, Shot
from dopsd_jax.evaluation.scorer import Case, PairScorer, Picture, SetScorer, judges
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.miniature import judge, world, world_scorers
from dopsd_jax.miniature.world import Concept
from dopsd_jax.miniature.world_scorers import (
    BARE,
    CONCEPT,
    OPEN,
    ORDINARY,
    OTHER,
    WorldScorer,
)

# Prompts of each kind; two pictures each of those that leave the arrangement open.
PROMPTS = {"concepts": 8, "ordinary": 16, "others": 8, "bare": 8, "opened": 8}
NUMBERS = {BARE: 2, OPEN: 2}
KINDS, SHOWN = (CONCEPT, ORDINARY, OTHER, BARE, OPEN), (CONCEPT, BARE)  # of student and teacher
KEPT = (BARE, 3), (CONCEPT, 1), (OPEN, 2)  # pictures for a figure
TOGETHER = 16  # pictures that are drawn together
LEFT_OUT = ("feature_FID", "leaked_colours", "ordinary_contrast")

Scores = dict[str, float]


def copied(images: judge.Images, scenes: list[world.Scene]) -> np.ndarray:
    """IoU with the shown picture's object where it stands there: what is copied, not redrawn."""
    return judge.iou(images, world.compose(scenes, None))


def scorers() -> list:
    """Those of `evaluate`, and the same of pictures of the word alone."""
    more = [
        WorldScorer(f"bare {name}", "higher", (BARE,), world_scorers.relative(measure))
        for name, measure in (("crispness", judge.crispness), ("contrast", contrast))
    ]
    known = world_scorers.scorers()
    made = [known[name]() for name in known if name not in LEFT_OUT]
    return [*made, *more, WorldScorer("copied", "lower", (BARE,), copied)]


class Exam:
    """Fixed prompts and noise about a concept, the same for every model of it.

    Args:
      teacher: config.teacher. seed: of prompts. shown: pictures of the data set.
    """

    def __init__(
        self,
        pipe: Pipeline,
        teacher: Mapping[str, Any],
        concept: Concept,
        word: str,
        shown: Sequence[Picture],
        seed: int = 0,
    ):
        self.cases = world_scorers.cases(concept, word, **PROMPTS, seed=seed, shown=shown)
        self.scorers, self.base, self.last = scorers(), {}, []
        self.painter = Painter(pipe, teacher, batch=TOGETHER)
        for role, kinds in ((STUDENT, KINDS), (TEACHER, SHOWN)):
            for _ in self.painter.encode([c for k in kinds for c in self._of(k)], role):
                pass

    def __call__(self, trained: nnx.State, role: int = STUDENT) -> Scores:
        """The scores by name. The first student is the base: others are compared with it.

        `last` then holds a few of the pictures.
        """
        kinds = KINDS if role == STUDENT else SHOWN
        shots = [
            Shot(case, number)
            for kind in kinds
            for case in self._of(kind)
            for number in range(NUMBERS.get(kind, 1))
        ]
        drawn = {
            (id(shot.case), shot.number): image
            for shot, image in self.painter.draw(trained, shots, role)
        }
        self.last = [
            drawn[id(c), 0] for kind, n in KEPT for c in self._of(kind)[:n] if kind in kinds
        ]
        found = {}
        for scorer in self.scorers:
            own = [shot for shot in shots if judges(scorer, shot.case)]
            if not own:
                continue
            images = [drawn[id(shot.case), shot.number] for shot in own]
            cases = [shot.case for shot in own]
            if isinstance(scorer, PairScorer):
                found[scorer.name] = self._beside_base(scorer, images, cases)
            elif isinstance(scorer, SetScorer):
                features = scorer.features(images, cases)
                found[scorer.name] = float(scorer.distance(features, scorer.reference(cases)))
            else:
                found[scorer.name] = float(np.mean(scorer(images, cases)))
        return found

    def _of(self, kind: str) -> list[Case]:
        return [case for case in self.cases if case.kind == kind]

    def _beside_base(self, scorer: PairScorer, images, cases) -> float:
        """Two pictures of each prompt next to the base's two from the same noise."""
        features = scorer.features(images, cases)
        features = features.reshape(-1, NUMBERS[cases[0].kind], *features.shape[1:])
        base = self.base.setdefault(scorer.name, features)
        return float(np.mean(scorer.compare(features, base)))
