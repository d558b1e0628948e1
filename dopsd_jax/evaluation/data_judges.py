"""A data set's own judge, where it is known how every prompt should look: surer than any scorer.

A package that knows such data sets declares an entry point of the group `dopsd_jax.judges`: a
function from the data set's folder to its `DataJudge`, or to None for every other data set. The
programs ask `find`; they import no judge by name.
"""

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from flax import nnx
from ml_collections import ConfigDict

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import expand
from dopsd_jax.evaluation.scorer import Case, Judge, Picture
from dopsd_jax.families.pipeline import Pipeline

GROUP = "dopsd_jax.judges"


class RunScores(Protocol):
    """The table at the end of a training: base, teacher and tuned on a few prompts."""

    def finish(self, student: nnx.State) -> tuple[list[str], dict]:
        """Lines to print, and the content of scores.json. Every process calls it."""


class DataJudge(Protocol):
    """What knows how the pictures of one data set should look."""

    batch: int  # pictures that are drawn together

    def scorers(self) -> Mapping[str, Callable[[], Judge]]:
        """Its scorers by name, in the order of the table."""

    def cases(self, count: int, shown: Sequence[Picture], first_seed: int) -> list[Case]:
        """The prompts of an evaluation. Raises `UserError` if there are fewer than `count`.

        shown: pictures of the data set, [H, W, 3] uint8. first_seed: of the noise.
        """

    def run_scores(self, pipe: Pipeline, config: ConfigDict, shown: Sequence[Picture]) -> RunScores:
        """Scores base and teacher now, before the pipeline hands its weights over to training."""


def registered() -> list[Callable[[Path], DataJudge | None]]:
    """What installed packages declare."""
    return [entry.load() for entry in importlib.metadata.entry_points(group=GROUP)]


def find(*folders: str | Path) -> DataJudge | None:
    """The judge of the data set in a folder; None if there is none, and for several folders.

    Raises `UserError` where several judges know it.
    """
    if len(folders) != 1:
        return None
    folder = expand(*folders)
    if not os.path.isdir(folder):
        return None
    found = [judge for of_folder in registered() if (judge := of_folder(folder)) is not None]
    if len(found) > 1:
        names = ", ".join(type(judge).__name__ for judge in found)
        raise UserError(f"{folder}: several judges know this data set ({names}); remove one")
    return found[0] if found else None
