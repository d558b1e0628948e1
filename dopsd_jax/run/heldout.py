"""Scores a run's checkpoints on pictures that are not trained on, and says when to stop."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dopsd_jax.common.errors import UserError
from dopsd_jax.conditioning.features import Features
from dopsd_jax.data import holdout
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.parallel import multihost, sharding
from dopsd_jax.run.build import Plan
from dopsd_jax.training import ranking
from dopsd_jax.training.ranking import Ranking
from dopsd_jax.training.state import TrainState

KEY = 2027  # of the random numbers: the same for every checkpoint


def check(config: ConfigDict) -> None:
    """Raises `UserError` for a run that shall stop by a score that it has not."""
    if config.stop.patience and not config.data.holdout:
        raise UserError(
            "config.stop.patience: a run is stopped by its gap on pictures that it does not train "
            "on, and config.data.holdout is 0; set it to a few pictures, or unset this"
        )


class Heldout:
    """The gap on the held-out pictures at every checkpoint, and the ranking. Every process calls.

    first: the step that the run goes on from. say: takes a line for the user.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        plan: Plan,
        pipe: Pipeline,
        features: Features,
        held: holdout.RowsByShape,
        mesh: Mesh,
        first: int,
        say: Callable[[str], None],
    ):
        self.config, self.workdir, self.pipe, self.mesh = config, workdir, pipe, mesh
        self.features, self.plan, self.say = features, plan, say
        self.batches = holdout.batches(features.dataset, held, config.batch_size)
        self.anchor_gaps: list[float] = []
        self.ranking = Ranking(workdir, config.stop.patience, config.stop.tolerance, first)

    def look(self, metrics) -> None:
        """Takes a step's metrics."""
        if "anchor_gap" in metrics:
            self.anchor_gaps.append(float(metrics["anchor_gap"]))

    def score(self, step: int, state: TrainState, files: Sequence[epath.Path]) -> dict[str, float]:
        """The scores of a state; `files`: what was written of it, the best LoRA file is copied."""
        found = {ranking.GAP: self._gap(state)}
        if self.anchor_gaps:
            found[ranking.ANCHOR_GAP] = float(np.mean(self.anchor_gaps))
            self.anchor_gaps = []
        self.ranking.add(step, found, multihost.is_first())
        best = self.ranking.best
        self.say(f"step {step}: gap on held-out pictures {found[ranking.GAP]:.5g}, best: {best}")
        if best == step and self.config.train == "lora" and multihost.is_first():
            for path in files:
                ranking.copy_best(path)
        return found

    def _gap(self, state: TrainState) -> float:
        squares, base = [], self.pipe.split[2]
        places = sharding.own_samples(self.mesh, self.config.batch_size)
        for index in self.batches:
            batch = self.features.batch(index.part(places, 1), 1)
            width, height = index.shape.bucket
            latent = (self.config.batch_size, *self.pipe.latent_shape(height, width))
            key = jax.random.fold_in(jax.random.key(KEY), index.n)
            with jax.set_mesh(self.mesh):
                batch = sharding.put_batch(batch, self.mesh, self.config.batch_size)
                squares.append(self.plan.gap(state, base, batch, key, latent=latent))
        return math.sqrt(np.mean(jax.device_get(squares)))

    def result(self) -> list[str]:
        """What to say at the end."""
        lines = ["checkpoints, the best first:", *self.ranking.lines()]
        path = self.workdir / "lora" / ranking.BEST
        return lines + ([f"best: {path}"] if self.config.train == "lora" else [])
