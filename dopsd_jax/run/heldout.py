"""Scores a run's checkpoints on pictures that are not trained on, and says when to stop."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dopsd_jax.common.config_fields import as_list
from dopsd_jax.common.errors import raise_if
from dopsd_jax.conditioning.features import Features
from dopsd_jax.data import holdout
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.parallel import multihost, sharding
from dopsd_jax.run.build import Plan
from dopsd_jax.training import ranking
from dopsd_jax.training.ranking import BY_LOWEST_GAP, Order, Ranking
from dopsd_jax.training.state import TrainState

KEY = 2027  # of the random numbers: the same for every checkpoint
BY_GAP = "gap"  # of config.stop.rank_by


def check(config: ConfigDict) -> None:
    """Raises `UserError` for a run that shall stop or be ranked by a score that it has not."""
    scorers, by = as_list(config.stop.scorers), config.stop.rank_by
    faults = []
    if config.stop.patience and not config.data.holdout:
        faults.append(
            "config.stop.patience: a run is stopped by its gap on pictures that it does not train "
            "on, and config.data.holdout is 0; set it to a few pictures, or unset this"
        )
    if scorers and not config.data.holdout:
        faults.append(
            "config.stop.scorers: judge pictures that are not trained on, and config.data.holdout "
            "is 0; set it to a few pictures, or unset this"
        )
    if by not in (BY_GAP, *scorers):
        faults.append(
            f"config.stop.rank_by: {by!r} is not one of {', '.join((BY_GAP, *scorers))}; name the "
            "scorer in config.stop.scorers too"
        )
    raise_if(faults)


class Heldout:
    """The gap on the held-out pictures at every checkpoint, and the ranking. Every process calls.

    first: the step that the run goes on from. say: takes a line for the user. judge: weights of the
    trained part -> further scores by name. order: what ranks.
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
        judge: Callable[[nnx.State], dict[str, float]] = lambda weights: {},
        order: Order = BY_LOWEST_GAP,
    ):
        self.config, self.workdir, self.pipe, self.mesh = config, workdir, pipe, mesh
        self.features, self.plan, self.say, self.judge = features, plan, say, judge
        self.batches = holdout.batches(features.dataset, held, config.batch_size)
        self.anchor_gaps: list[float] = []
        stop, every = config.stop, config.checkpoint_every
        of = holdout.digest(features.dataset, held)
        if config.export_weights != "student":  # other scores
            of += f" {config.export_weights}"
        self.ranking = Ranking(workdir, stop.patience, stop.tolerance, first, order, of, every)
        if self.ranking.best:  # another one than before, or the run was killed before it was copied
            self._copy(plan.trained.export_paths(workdir, self.ranking.best))

    def look(self, metrics) -> None:
        """Takes a step's metrics."""
        if math.isfinite(gap := float(metrics.get("anchor_gap", math.nan))):
            self.anchor_gaps.append(gap)

    def score(self, step: int, state: TrainState, files: Sequence[epath.Path]) -> dict[str, float]:
        """The scores of the weights that a state exports.

        `files`: what was written of them; the best LoRA file is copied.
        """
        exported = getattr(state, self.config.export_weights)
        found = {ranking.GAP: self._gap(state._replace(student=exported))}
        if self.anchor_gaps:
            found[ranking.ANCHOR_GAP] = float(np.mean(self.anchor_gaps))
            self.anchor_gaps = []
        found |= self.judge(exported)
        self.ranking.add(step, found, multihost.is_first())
        best = self.ranking.best
        others = "".join(
            f", {name} {value:.4g}"
            for name, value in found.items()
            if name not in (ranking.GAP, ranking.ANCHOR_GAP)
        )
        gap = f"gap on held-out pictures {found[ranking.GAP]:.5g}"
        self.say(f"step {step}: {gap}{others}, best: {best}")
        if best == step:
            self._copy(files)
        return found

    def _copy(self, files: Sequence[epath.Path]) -> None:
        """Keeps the LoRA file of the best checkpoint under its name."""
        if self.config.train == "lora" and multihost.is_first():
            for path in files:
                if path.exists():  # a user may have removed an older one
                    ranking.copy_best(path)

    def why_ended(self) -> str:
        """Why the run is over."""
        order, patience = self.ranking.order, self.config.stop.patience
        by_gap = order == BY_LOWEST_GAP
        said = (
            "the gap on held-out pictures has not fallen"
            if by_gap
            else f"{order.name} is no better"
        )
        return f"{said} for {patience} checkpoints; set config.stop.patience=0 to go on"

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
        return math.sqrt(np.average(jax.device_get(squares), weights=holdout.counts(self.batches)))

    def result(self) -> list[str]:
        """What to say at the end."""
        lines = ["checkpoints, the best first:", *self.ranking.lines()]
        path = self.workdir / "lora" / ranking.BEST
        return lines + ([f"best: {path}"] if self.config.train == "lora" else [])
