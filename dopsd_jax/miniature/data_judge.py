"""The judge of the miniatures' data sets: a file in them says what their word stands for."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict

from dopsd_jax.common.errors import UserError
from dopsd_jax.evaluation.scorer import Case, Judge, Picture
from dopsd_jax.evaluation.verdict import sentence
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.miniature import edit_cases, edits, world_scorers
from dopsd_jax.miniature.concepts import FILE, read_concept
from dopsd_jax.miniature.exam import Exam, findings, table
from dopsd_jax.miniature.world import Concept

SHORT = 6  # prompts of the concept in the table at the end of a training
ORDINARY = 2  # ordinary prompts for each one of the concept
NOTE = (
    "identity: likeness of the object wherever it stands; concept: IoU with the target, in "
    "arrangements that were not trained; crispness: of edges, contrast: of all pixels, relative to "
    "the target's; retention: share of ordinary prompts with shape and colour right"
)


@dataclasses.dataclass(frozen=True)
class WorldJudge:
    """See `evaluation.data_judges.DataJudge`. word: of the captions; concept: its object.

    edits: whether the captions are instructions, and pictures are edited.
    """

    word: str
    concept: Concept
    edits: bool = False
    batch: int = 16

    def scorers(self) -> Mapping[str, Callable[[], Judge]]:
        found = world_scorers.scorers()
        if self.edits:
            kinds = set(edit_cases.KINDS)
            found = {name: make for name, make in found.items() if kinds & set(make().kinds)}
        return found

    def cases(self, count: int, shown: Sequence[Picture], first_seed: int) -> list[Case]:
        asked = {"concepts": count, "ordinary": ORDINARY * count, "others": count}
        if self.edits:
            return edit_cases.cases(self.concept, self.word, **asked, first_seed=first_seed)
        short = max(2, math.ceil(count / 2))  # of two or more, so that they have an interval
        asked |= {"bare": short, "opened": short, "shown": shown, "first_seed": first_seed}
        return world_scorers.cases(self.concept, self.word, **asked)

    def run_scores(
        self, pipe: Pipeline, config: ConfigDict, shown: Sequence[Picture]
    ) -> "RunScores":
        asked = {"concepts": SHORT, "ordinary": ORDINARY * SHORT, "seed": config.seed}
        if self.edits:
            cases = edit_cases.cases(self.concept, self.word, **asked)
        else:
            cases = world_scorers.cases(self.concept, self.word, **asked, shown=shown)
        return RunScores(Exam(pipe, config.teacher, cases), pipe)


class RunScores:
    """Scores the base model and its teacher when it is made, the tuned model at the end.

    The encoders are freed.
    """

    def __init__(self, exam: Exam, pipe: Pipeline):
        self.exam = exam
        pipe.release_encoders()
        base = pipe.split[1]
        self.rows = [exam.student("base", base), exam.teacher("teacher", base)]

    def finish(self, student: nnx.State) -> tuple[list[str], dict]:
        rows = [*self.rows, self.exam.student("tuned", student)]
        said = sentence(findings(*rows))
        content = {"verdict": said, "note": NOTE, "rows": [row._asdict() for row in rows]}
        return [*table(rows), said], content


def of_folder(folder: Path) -> WorldJudge | None:
    """The judge of a data set of the miniature; None for any other data set.

    Raises `UserError` for one that says both that its pictures are edited and that they are not.
    """
    kinds = {FILE: False, edits.CONCEPT: True}
    found = [name for name in kinds if os.path.isfile(folder / name)]
    if len(found) > 1:
        raise UserError(
            f"{folder}: has {' and '.join(found)}, and the first is of captions, the second of "
            "instructions to edit; remove the one that is not of this data set"
        )
    return WorldJudge(*read_concept(folder / found[0]), kinds[found[0]]) if found else None
