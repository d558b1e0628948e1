"""The short table at the end of a run on the miniature: before, the teacher, after."""

import json
from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict

from dopsd_jax.common.atomic import write_text
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import open_image
from dopsd_jax.families.zimage.pipeline import Pipeline
from dopsd_jax.miniature import world_scorers
from dopsd_jax.miniature.exam import Exam, table
from dopsd_jax.parallel import multihost
from dopsd_jax.reporting.run_page import SCORES
from dopsd_jax.run import build

NOTE = (
    "concept: IoU of unseen arrangements with the true pictures; crispness: of their edges, "
    "relative to the true pictures'; retention: share of ordinary prompts with the right shape "
    "and colour"
)


class BeforeAfter:
    """Scores the model before training, which is when it is made, its teacher, and the student.

    Make it before the pipeline hands its weights over to training. The encoders are freed.
    """

    def __init__(self, exam: Exam, pipe: Pipeline):
        self.exam = exam
        pipe.release_encoders()
        start = pipe.split[1]
        self.rows = [exam.student("before", start), exam.teacher("teacher", start)]

    def finish(self, student: nnx.State, workdir: Path) -> list[str]:
        """The table as lines; also written to `workdir`. Every process calls it."""
        rows = [*self.rows, self.exam.student("after", student)]
        content = {"note": NOTE, "rows": [row._asdict() for row in rows]}
        if multihost.is_first():
            write_text(workdir / SCORES, json.dumps(content, indent=1) + "\n")
        return table(rows)


def before_after(
    config: ConfigDict, workdir: Path, pipe: Pipeline, dataset: Dataset
) -> BeforeAfter | None:
    """None for a data set that does not say what its word stands for: nothing could judge it."""
    found = None
    if dataset.features is None:
        found = world_scorers.concept_of(build.data_path(config, workdir))
    if found is None:
        return None
    word, concept = found
    shown = [open_image(row.image, build.limits(config)) for row in dataset.rows]
    exam = Exam(pipe, config.teacher, concept, word, seed=config.seed, shown=shown)
    return BeforeAfter(exam, pipe)
