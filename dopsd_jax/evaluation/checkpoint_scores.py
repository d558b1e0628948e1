"""Scorers of pictures at a run's checkpoints: config.stop.scorers on the held-out captions."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dopsd_jax.common.config_fields import as_list
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.conditioning.features import Features
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.holdout import RowsByShape
from dopsd_jax.evaluation import appearance, torch_scorers
from dopsd_jax.evaluation.prompts import PLACEHOLDER, STYLE, TRAINING, with_class
from dopsd_jax.evaluation.scorer import Case, Judge, PairScorer, SetScorer, judges, load_scorers
from dopsd_jax.families.drawing import Wish, draw
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.families.sampling import start_noise
from dopsd_jax.parallel import multihost
from dopsd_jax.run.heldout import BY_GAP, KEY
from dopsd_jax.training.ranking import ANCHOR_GAP, BY_LOWEST_GAP, GAP, Order

OPTION = "config.stop.scorers"
TAKEN = ("step", GAP, ANCHOR_GAP)  # names in ranking.json


def find_scorers(config: ConfigDict) -> dict[str, Judge]:
    """The scorers of config.stop.scorers by these names; their weights are loaded.

    Raises `UserError` for names of none, missing libraries and weights, and scorers that do not
    judge pictures one by one.
    """
    stop, names = config.stop, as_list(config.stop.scorers)
    known = appearance.scorers() | torch_scorers.scorers(
        stop.clip or torch_scorers.CLIP,
        stop.dino or torch_scorers.DINO,
        stop.vgg or torch_scorers.VGG,
        stop.lpips_weights,
    )
    found = load_scorers(names, known, OPTION)
    faults = []
    for scorer in found:
        if isinstance(scorer, SetScorer | PairScorer):
            faults.append(
                f"{OPTION}: {scorer.name} does not judge pictures one by one; leave it out"
            )
        elif scorer.kinds and TRAINING not in scorer.kinds:
            faults.append(
                f"{OPTION}: {scorer.name} does not judge pictures of captions; leave it out"
            )
        elif scorer.name in TAKEN:
            faults.append(
                f"{OPTION}: {scorer.name!r} is the name of another score; give it another"
            )
    raise_if(faults)
    return dict(zip(names, found, strict=True))


def order_of(config: ConfigDict, scorers: Mapping[str, Judge]) -> Order:
    """What config.stop.rank_by names."""
    if config.stop.rank_by == BY_GAP:
        return BY_LOWEST_GAP
    scorer = scorers[config.stop.rank_by]
    return Order(scorer.name, scorer.better == "higher")


class CheckpointScores:
    """The mean of every scorer over one picture for each held-out picture. Every process calls.

    Drawn for the first caption, by the deployed sampler, from the same noise at every checkpoint;
    process 0 scores.
    """

    def __init__(
        self,
        config: ConfigDict,
        pipe: Pipeline,
        features: Features,
        held: RowsByShape,
        scorers: Collection[Judge],
    ):
        self.pipe, self.scorers = pipe, list(scorers)
        self.cases: list[Case] = []
        self.wishes: list[Wish] = []
        dataset = features.dataset
        rows = _one_each(dataset, held) if self.scorers else []
        texts = {row: _text(dataset, row) for row in rows}
        style = any(STYLE.search(text) for text in texts.values())
        for row, text in texts.items():
            width, height = dataset.buckets[row]
            noise = start_noise(KEY, 1, pipe.latent_shape(height, width), row)
            word = config.stop.class_word
            told = with_class(text, word, style) if word else text
            target = features.image(row) if _need(self.scorers, "target") else None
            caption = dataset.caption(row, dataset.prompt_keys)
            self.cases.append(Case(TRAINING, text, told, height, width, KEY, target))
            self.wishes.append(Wish(noise, features.contexts([caption]).student))

    def __call__(self, weights: nnx.State) -> dict[str, float]:
        """The scores of the trained part's weights, by the scorers' names.

        Raises `UserError` where a scorer gives too few numbers, in every process.
        """
        if not self.scorers:
            return {}
        drawn = draw(self.pipe, weights, self.wishes)
        found = {}
        with multihost.together():
            if multihost.is_first():
                found = {scorer.name: self._mean(scorer, drawn) for scorer in self.scorers}
        return multihost.gather(found)[0]

    def _mean(self, scorer: Judge, drawn: Sequence[np.ndarray]) -> float:
        values = []
        for picture, case in zip(drawn, self.cases, strict=True):
            if judges(scorer, case):
                values += np.asarray(scorer([picture], [case]), np.float64).ravel().tolist()
        if len(values) != len(drawn):
            raise UserError(
                f"{OPTION}: {scorer.name} gave {values} for {len(drawn)} pictures; it must give a "
                "number for each"
            )
        return float(np.mean(values))


def check_held_out(
    config: ConfigDict, dataset: Dataset, held: RowsByShape, scorers: Collection[Judge]
) -> None:
    """Raises `UserError` for rows whose class or picture is not known where a scorer needs it."""
    faults, rows, prepared = [], _one_each(dataset, held), dataset.features
    if _need(scorers, "prompt") and not config.stop.class_word:
        faults = [
            f"{dataset.rows[row].where}: has {PLACEHOLDER}, and no class to score it as; set "
            "config.stop.class_word"
            for row in rows
            if PLACEHOLDER in _text(dataset, row)
        ]
    if _need(scorers, "target") and prepared is not None and set(rows) - set(prepared.shown):
        named = ", ".join(scorer.name for scorer in scorers if "target" in scorer.needs)
        faults.append(
            f"{OPTION}: {named} compares with held-out pictures, which {prepared.folder} did not "
            "keep; leave it out, or set config.data.path to the pictures it was prepared from"
        )
    raise_if(faults)


def _one_each(dataset: Dataset, held: RowsByShape) -> list[int]:
    """The first row of every held-out picture."""
    first: dict[str, int] = {}
    for row in sorted(row for ids in held.values() for row in ids.tolist()):
        first.setdefault(dataset.infos[row].digest, row)
    return list(first.values())


def _need(scorers: Collection[Judge], what: str) -> bool:
    return any(what in scorer.needs for scorer in scorers)


def _text(dataset: Dataset, row: int) -> str:
    """The row's first caption."""
    _, caption = dataset.caption(row, dataset.prompt_keys)
    return dataset.rows[row].captions[caption][1]
