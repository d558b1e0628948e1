"""The table at the end of a training, for data sets that have a judge of their own."""

import json
from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict

from dopsd_jax.common.atomic import write_text
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import open_image
from dopsd_jax.evaluation import data_judges
from dopsd_jax.evaluation.data_judges import DataJudge, RunScores
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.parallel import multihost
from dopsd_jax.reporting.run_page import SCORES
from dopsd_jax.run import data_set


def find_judge(config: ConfigDict, workdir: Path, dataset: Dataset) -> DataJudge | None:
    """The data set's own judge, if there is one. Raises `UserError` for one that is damaged."""
    if dataset.features is not None:  # prepared: its pictures are not here
        return None
    return data_judges.find(*data_set.data_paths(config, workdir))


def begin(
    judge: DataJudge | None, config: ConfigDict, pipe: Pipeline, dataset: Dataset
) -> RunScores | None:
    """Scores base and teacher; None for a data set without a judge. Every process calls it.

    To be called before the pipeline hands its weights over to training.
    """
    if judge is None:
        return None
    shown = [open_image(row.image, data_set.limits(config)) for row in dataset.rows]
    return judge.run_scores(pipe, config, shown)


def finish(scores: RunScores | None, student: nnx.State, workdir: Path) -> list[str]:
    """The table as lines; also written to `workdir`. Every process calls it."""
    if scores is None:
        return []
    lines, content = scores.finish(student)
    if multihost.is_first():
        write_text(workdir / SCORES, json.dumps(content, indent=1) + "\n")
    return lines
