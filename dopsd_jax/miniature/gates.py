"""What a trained miniature must do before it is shipped.

    python -m dopsd_jax.miniature.gates --model=examples/miniature/model

Measured on the model's folder, by the pipeline and the sampler that users have.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

import dopsd_jax
from dopsd_jax.common import program
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_files import read_json
from dopsd_jax.conditioning.encoding import STUDENT, TEACHER
from dopsd_jax.evaluation.drawing import Painter, Shot
from dopsd_jax.evaluation.scorer import Case
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.miniature import captions, judge, render, world
from dopsd_jax.miniature import world_scorers as scores

CONCEPTS, ORDINARY = 24, 96
SEED = 20011  # of concepts and prompts: none is of the training
BATCH = 24
TEACHER_OPTIONS = {
    "min_pixels": render.SIDE**2,
    "max_pixels": render.SIDE**2,
    "doubled_template": False,
}

SCORES = "scores.json"
SHIPPED, UNDISTILLED_FEW, UNDISTILLED_MANY = "shipped", "undistilled_few", "undistilled_many"

Draw = Callable[[Sequence[Case], int], np.ndarray]  # cases, role -> pictures


class Gate(NamedTuple):
    """A score and its bound. `least`: whether the score must not be lower, or not be higher."""

    name: str
    bound: float
    least: bool
    meaning: str

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


GATES = (
    Gate("copy", 0.8, True, "IoU of unseen concepts with the picture in context, relative to the "
         "autoencoder's own"),
    Gate("blind", 0.4, False, "the same from the text alone"),
    Gate("shape", 0.95, True, "named shapes that are right on ordinary prompts"),
    Gate("colour", 0.95, True, "named colours"),
    Gate("crispness", 0.95, True, "of few-step pictures, relative to the undistilled many-step "
         "sampler's"),
)  # fmt: skip


class Trial:
    """Fixed concepts, each under a new word in one arrangement, and fixed ordinary prompts."""

    def __init__(self, concepts: int = CONCEPTS, ordinary: int = ORDINARY):
        rng = np.random.default_rng(SEED)
        words = captions.NEW_WORDS
        self.concepts = [
            case
            for i in range(concepts)
            for case in scores.cases(
                world.random_concept(rng), words[i % len(words)], concepts=1, ordinary=0,
                seed=SEED + i, first_seed=i,
            )
        ]  # fmt: skip
        self.ordinary = scores.cases(
            world.random_concept(rng), words[0], concepts=0, ordinary=ordinary, seed=SEED
        )

    def __call__(
        self, draw: Draw, reconstruct: Callable[[np.ndarray], np.ndarray]
    ) -> dict[str, float]:
        """Scores of a sampler; `crispness` here is relative to the targets'."""
        scenes = [case.truth for case in self.concepts]
        truth, shown = world.compose(scenes, None), np.stack([c.target for c in self.concepts])
        reach = judge.iou(reconstruct(shown), truth)
        copied, blind = draw(self.concepts, TEACHER), draw(self.concepts, STUDENT)
        named = draw(self.ordinary, STUDENT)
        things, seen = [case.truth.things[0] for case in self.ordinary], judge.see(named)
        right = lambda name: float(
            np.mean(
                [getattr(s, name) == getattr(t, name) for s, t in zip(seen, things, strict=True)]
            )
        )
        edges = lambda images: judge.crispness(images).mean()
        targets = [case.target for case in (*self.concepts, *self.ordinary)]
        return {
            "copy": float((judge.iou(copied, truth) / reach).mean()),
            "blind": float((judge.iou(blind, scores.fitted(blind, scenes)) / reach).mean()),
            "shape": right("shape"),
            "colour": right("colour"),
            "crispness": float(edges(np.concatenate([copied, named])) / edges(np.stack(targets))),
        }


def of_folder(pipe: Pipeline, trial: Trial) -> dict[str, float]:
    """Scores of the model as it is used: the deployed steps, without guidance."""
    painter = Painter(pipe, TEACHER_OPTIONS, BATCH)

    def draw(cases: Sequence[Case], role: int) -> np.ndarray:
        for _ in painter.encode(cases, role):
            pass
        shots = [Shot(case, 0) for case in cases]
        return np.stack([image for _, image in painter.draw(pipe.split[1], shots, role)])

    return trial(draw, lambda images: pipe.decode(pipe.encode_image(images)))


def verdicts(found: Mapping[str, float], many: float) -> list[tuple[Gate, float, bool]]:
    """Every gate with its value. `many`: crispness of the undistilled many-step sampler."""
    values = {**found, "crispness": found["crispness"] / many}
    return [(gate, values[gate.name], gate.holds(values[gate.name])) for gate in GATES]


def lines(rows: Sequence[tuple[Gate, float, bool]]) -> list[str]:
    """A line a gate."""
    return [
        f"{gate.name:10} {value:6.3f}  {'at least' if gate.least else 'at most'} {gate.bound:.2f}  "
        f"{'holds' if held else 'MISSED'}  {gate.meaning}"
        for gate, value, held in rows
    ]


def many_step_crispness(path: Path) -> float:
    """Crispness of the undistilled many-step sampler, from the scores beside a model."""
    stored = read_json(path)[0]
    try:
        return float(stored[UNDISTILLED_MANY]["crispness"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: has no number {UNDISTILLED_MANY}.crispness; miniature.train writes it"
        ) from None


def main() -> int:
    folder = Path(flags.FLAGS.model).expanduser()
    many = many_step_crispness(folder.parent / SCORES)
    rows = verdicts(of_folder(dopsd_jax.load_pipeline(folder), Trial()), many)
    print("\n".join(lines(rows)))
    return 0 if all(held for *_, held in rows) else 1


if __name__ == "__main__":
    flags.DEFINE_string("model", "examples/miniature/model", "folder of the model")
    program.run(main)
