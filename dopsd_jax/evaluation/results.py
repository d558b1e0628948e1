"""Scores of all models: averaged, compared with the base, as a table."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from dopsd_jax.evaluation import statistics
from dopsd_jax.evaluation.scorer import Judge
from dopsd_jax.evaluation.statistics import Estimate

BASE = "base"


@dataclass
class Score:
    """One metric: an estimate for each model, and for pairs of models that were both asked.

    values: [prompts][pictures] of each model, where pictures are judged one by one.
    floor: what the figure of a set is for real pictures.
    """

    name: str
    better: str
    kinds: tuple[str, ...]
    identity: str
    arms: dict[str, Estimate] = field(default_factory=dict)
    differences: dict[tuple[str, str], Estimate] = field(default_factory=dict)
    values: dict[str, list[list[float]]] = field(default_factory=dict)
    floor: float | None = None

    def as_json(self) -> dict[str, Any]:
        pairs = {f"{a} - {b}": e._asdict() for (a, b), e in self.differences.items()}
        return {
            "better": self.better,
            "kinds": list(self.kinds),
            "identity": self.identity,
            "arms": {name: estimate._asdict() for name, estimate in self.arms.items()},
            "differences": pairs,
            "floor": self.floor,
            "values": self.values,
        }


def pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Every model with every one before it: teacher - base, tuned - base, tuned - teacher."""
    return [(a, b) for i, a in enumerate(arms) for b in arms[:i]]


def score(scorer: Judge, values: Mapping[str, Float[np.ndarray, "p s"]]) -> Score:
    """Of pictures judged one by one; `values` by model, all of the same prompts and noise."""
    found = _empty(scorer)
    found.arms = {name: statistics.mean(own) for name, own in values.items()}
    found.differences = {
        (a, b): statistics.difference(values[a], values[b]) for a, b in pairs(list(values))
    }
    found.values = {name: np.asarray(own, float).tolist() for name, own in values.items()}
    return found


def set_score(
    scorer: Judge,
    features: Mapping[str, Float[np.ndarray, "p s d"]],
    reference: Float[np.ndarray, "p d"],
    floor: float,
) -> Score:
    """Of sets of pictures; intervals by the jackknife over prompts."""
    found = _empty(scorer)
    found.floor = floor

    @functools.cache  # differences ask for the same again
    def of_kept(name: str, kept: tuple[bool, ...]) -> float:
        own, there = features[name][list(kept)], reference[list(kept)]
        return scorer.distance(own.reshape(-1, own.shape[-1]), there)

    figure = lambda name, keep: of_kept(name, tuple(keep.tolist()))

    count = len(reference)
    found.arms = {
        name: statistics.jackknife(lambda keep, n=name: figure(n, keep), count) for name in features
    }
    found.differences = {
        (a, b): statistics.jackknife(
            lambda keep, a=a, b=b: figure(a, keep) - figure(b, keep), count
        )
        for a, b in pairs(list(features))
    }
    return found


def _empty(scorer: Judge) -> Score:
    return Score(scorer.name, scorer.better, tuple(scorer.kinds), scorer.identity)


def table(scores: Sequence[Score], arms: Sequence[str]) -> list[list[str]]:
    """Cells of a table with a head: a metric a row; then models, then differences to the base."""
    others = [name for name in arms if name != BASE]
    rows = [["metric", "better", *arms, *(f"{name} - {BASE}" for name in others)]]
    for own in scores:
        cells = [text(own.arms.get(name)) for name in arms]
        cells += [text(own.differences.get((name, BASE)), signed=True) for name in others]
        rows.append([own.name, own.better, *cells])
    return rows


def tones(scores: Sequence[Score], arms: Sequence[str]) -> list[list[str]]:
    """Of the cells of `table`: good or bad for a difference whose interval leaves out 0."""
    others = [name for name in arms if name != BASE]
    found = [[""] * (2 + len(arms) + len(others))]
    for own in scores:
        gaps = [own.differences.get((name, BASE)) for name in others]
        found.append([""] * (2 + len(arms)) + [_tone(gap, own.better) for gap in gaps])
    return found


def _tone(gap: Estimate | None, better: str) -> str:
    if gap is None or gap.half is None or abs(gap.value) <= gap.half:
        return ""
    return "good" if (gap.value > 0) == (better == "higher") else "bad"


def text(estimate: Estimate | None, *, signed: bool = False) -> str:
    """0.812 ± 0.034; - where nothing was asked."""
    if estimate is None:
        return "-"
    digits = 3 if abs(estimate.value) < 10 else 1
    value = f"{estimate.value:{'+' if signed else ''}.{digits}f}"
    return value if estimate.half is None else f"{value} ± {estimate.half:.{digits}f}"


def notes(scores: Sequence[Score]) -> list[str]:
    """What belongs beside the table."""
    found = [
        f"{own.name}: {own.floor:.3f} for other real pictures of the same prompts"
        for own in scores
        if own.floor is not None
    ]
    lone = sorted({own.name for own in scores if any(e.half is None for e in own.arms.values())})
    if lone:
        found.append(f"no interval from a single prompt: {', '.join(lone)}")
    return found


def lines(cells: Sequence[Sequence[str]]) -> list[str]:
    """A table as text."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
