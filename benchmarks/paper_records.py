"""The records of paper.py by arm, with means over concepts and seeds."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from paper_arms import LOOKS, RATES, SEQUENTIAL

from dopsd_jax.scores import statistics
from dopsd_jax.scores.statistics import Estimate

CONCEPT, CRISP, SHAPE, RETENTION = MEASURES = (
    "concept IoU",
    "concept crispness",
    "named shape",
    "retention",
)


def read(path: Path) -> list[dict]:
    """The lines of the file; a last one that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Runs:
    """The runs of one arm that are there for every concept; arrays are [concept, seed]."""

    def __init__(self, runs: dict[tuple[int, int], dict]):
        self.runs = runs
        self.concepts = sorted({c for c, _ in runs})
        each = [{s for c, s in runs if c == concept} for concept in self.concepts]
        self.seeds = sorted(set.intersection(*each))
        self.count = len(self.concepts) * len(self.seeds)
        self.rate = next(iter(runs.values()))["rate"]
        self.cost = float(np.mean([run["cpu_seconds"] for run in runs.values()]))

    def curve(self, measure: str, step: int) -> np.ndarray:
        """Scores after so many steps; crispness relative to the base model's."""
        value = lambda run, n: run["curve"][str(n)][measure]
        table = lambda n: np.array(
            [[value(self.runs[c, s], n) for s in self.seeds] for c in self.concepts]
        )
        found = table(step)
        return found / table(0).mean() if measure == CRISP else found

    def final(self, measure: str) -> Estimate:
        """The mean after the last step."""
        return statistics.mean(self.curve(measure, LOOKS[-1]))

    def less(self, other: "Runs", measure: str) -> Estimate:
        """This arm's mean less the other's, over the concepts and seeds that both have."""
        pairs = sorted(self.runs.keys() & other.runs.keys())
        one, two = (Runs({p: arm.runs[p] for p in pairs}) for arm in (self, other))
        last = LOOKS[-1]
        return statistics.difference(one.curve(measure, last), two.curve(measure, last))

    def when(self, level: float, measure: str) -> float | None:
        """The mean of a measure where the mean concept score first reaches `level`, on straight
        lines between the steps that were scored; None if it never does."""
        steps = (0, *LOOKS)
        score = [self.curve(CONCEPT, n).mean() for n in steps]
        other = [self.curve(measure, n).mean() for n in steps]
        for i in range(1, len(steps)):
            if score[i - 1] <= level <= score[i]:
                share = (level - score[i - 1]) / max(score[i] - score[i - 1], 1e-9)
                return float(other[i - 1] + share * (other[i] - other[i - 1]))
        return None


class Records:
    """All records."""

    def __init__(self, records: list[dict]):
        self._alone: dict[tuple, dict] = defaultdict(dict)
        self._sequences: dict[tuple, list] = defaultdict(list)
        for record in records:
            name = record["arm"], record["train"], record["rate"]
            if "rounds" in record:
                self._sequences[name].append(record["rounds"])
            else:
                self._alone[name][record["concept"], record["seed"]] = record

    def arm(self, name: str, train: str, rate: float) -> Runs | None:
        found = self._alone.get((name, train, rate))
        return Runs(found) if found else None

    def any(self, train: str) -> Runs | None:
        """The arm with most runs, for what all share."""
        found = [Runs(runs) for (_, own, _), runs in self._alone.items() if own == train]
        return max(found, key=lambda arm: arm.count, default=None)

    def best(self, name: str, train: str) -> Runs | None:
        """A method at its better rate: where concept, crispness and retention sum to more."""
        found = [self.arm(name, train, rate) for rate in RATES[train]]
        total = lambda arm: sum(arm.final(m).value for m in (CONCEPT, CRISP, RETENTION))
        return max((arm for arm in found if arm), key=total, default=None)

    def base(self, train: str) -> list[Estimate]:
        """The model before training, by `MEASURES`."""
        arm = self.any(train)
        return [statistics.mean(arm.curve(measure, 0)) for measure in MEASURES]

    def teacher(self, train: str) -> list[Estimate] | None:
        """What the student can hope for: concept and crispness of the model shown the picture."""
        arm = self.any(train)
        if arm is None:
            return None
        firsts = [arm.runs[c, arm.seeds[0]] for c in arm.concepts]
        table = lambda measure: np.array([[run["teacher"][measure]] for run in firsts])
        own = np.mean([run["curve"]["0"][CRISP] for run in firsts])
        return [statistics.mean(table(CONCEPT)), statistics.mean(table(CRISP) / own)]

    def sequences(self):
        """(method, train, a row of estimates after each concept) for every sequential arm."""
        for (name, train, _), seeds in self._sequences.items():
            base = self.any(train)
            if name not in SEQUENTIAL or base is None:
                continue
            unit = np.mean([run["curve"]["0"][CRISP] for run in base.runs.values()])
            count = len(seeds[0])
            mean = lambda values: statistics.mean(np.array(values)[:, None])
            rows = []
            for k in range(count):
                row = [mean([r[k][of][CONCEPT] for r in seeds]) for of in range(count)]
                row.append(mean([r[k][k][CRISP] / unit for r in seeds]))
                row.append(mean([r[k][k][RETENTION] for r in seeds]))
                rows.append(row)
            yield name, train, rows
