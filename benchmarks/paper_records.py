"""The records of paper.py by arm, with means over concepts and seeds."""

import fcntl
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from paper_arms import RATES, SEQUENTIAL, STYLE_CAPTIONS

from dopsd_jax.evaluation import statistics
from dopsd_jax.evaluation.statistics import Estimate

CONCEPT, CRISP, SHAPE, RETENTION, ORDINARY_CRISP = MEASURES = (
    "concept IoU",
    "concept crispness",
    "named shape",
    "retention",
    "ordinary crispness",
)
RELATIVE = CRISP, ORDINARY_CRISP  # to the base model's
# Of styles, besides retention: distance to the style's pictures, crispness relative to theirs.
FID, CRISPNESS = "FID", "crispness"
STYLE_MEASURES = FID, CRISPNESS, RETENTION


def read(path: Path) -> list[dict]:
    """The lines of the file; a last one that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(path: Path, record: dict) -> None:
    """Adds a line, whole, whatever other processes do."""
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(record) + "\n")


def measures(kind: str) -> tuple[str, ...]:
    """What runs of a kind are scored by."""
    return STYLE_MEASURES if kind in STYLE_CAPTIONS else MEASURES


class Runs:
    """The runs of one arm that are there for every concept; arrays are [concept, seed]."""

    def __init__(self, runs: dict[tuple[int, int], dict]):
        self.runs = runs
        self.concepts = sorted({c for c, _ in runs})
        each = [{s for c, s in runs if c == concept} for concept in self.concepts]
        self.seeds = sorted(set.intersection(*each))
        self.count = len(self.concepts) * len(self.seeds)
        first = next(iter(runs.values()))
        self.rate, self.steps = first["rate"], sorted(map(int, first["curve"]))
        self.cost = float(np.mean([run["cpu_seconds"] for run in runs.values()]))

    def curve(self, measure: str, step: int) -> np.ndarray:
        """Scores after so many steps; crispness relative to the base model's."""
        value = lambda run, n: run["curve"][str(n)][measure]
        table = lambda n: np.array(
            [[value(self.runs[c, s], n) for s in self.seeds] for c in self.concepts]
        )
        found = table(step)
        return found / table(0).mean() if measure in RELATIVE else found

    def final(self, measure: str) -> Estimate:
        """The mean after the last step."""
        return statistics.mean(self.curve(measure, self.steps[-1]))

    def less(self, other: "Runs", measure: str) -> Estimate:
        """This arm's mean less the other's, over the concepts and seeds that both have."""
        pairs = sorted(self.runs.keys() & other.runs.keys())
        one, two = (Runs({p: arm.runs[p] for p in pairs}) for arm in (self, other))
        last = self.steps[-1]
        return statistics.difference(one.curve(measure, last), two.curve(measure, last))

    def when(self, level: float, measure: str) -> float | None:
        """The mean of a measure where the mean concept score first reaches `level`, on straight
        lines between the steps that were scored; None if it never does."""
        score = [self.curve(CONCEPT, n).mean() for n in self.steps]
        other = [self.curve(measure, n).mean() for n in self.steps]
        for i in range(1, len(score)):
            if score[i - 1] <= level <= score[i]:
                share = (level - score[i - 1]) / max(score[i] - score[i - 1], 1e-9)
                return float(other[i - 1] + share * (other[i] - other[i - 1]))
        return None


class Records:
    """All records."""

    def __init__(self, records: list[dict]):
        self._runs: dict[tuple, dict] = defaultdict(dict)
        self._sequences: dict[tuple, list] = defaultdict(list)
        self._targets: list[dict] = []
        for record in records:
            name = record["arm"], record["train"], record["rate"]
            if record["kind"] == "sequence":
                self._sequences[name].append(record["rounds"])
            elif record["kind"] == "states":
                self._targets.append(record["targets"])
            else:
                run = record["concept"], record["seed"]
                self._runs[*name, record["kind"]][run] = record

    def arm(self, name: str, train: str, rate: float, kind: str = "alone") -> Runs | None:
        found = self._runs.get((name, train, rate, kind))
        return Runs(found) if found else None

    def any(self, train: str, kind: str = "alone") -> Runs | None:
        """The arm with most runs, for what all share."""
        found = [
            Runs(runs)
            for (_, *own, of), runs in self._runs.items()
            if (own[0], of) == (train, kind)
        ]
        return max(found, key=lambda arm: arm.count, default=None)

    def best(self, name: str, train: str) -> Runs | None:
        """A method at its better rate: where concept, crispness and retention sum to more."""
        found = [self.arm(name, train, rate) for rate in RATES[train]]
        total = lambda arm: sum(arm.final(m).value for m in (CONCEPT, CRISP, RETENTION))
        return max((arm for arm in found if arm), key=total, default=None)

    def base(self, train: str, kind: str = "alone") -> list[Estimate]:
        """The model before training, by `MEASURES`, or of styles by `STYLE_MEASURES`."""
        arm = self.any(train, kind)
        return [statistics.mean(arm.curve(measure, 0)) for measure in measures(kind)]

    def teacher(self, train: str, kind: str = "alone") -> list[Estimate] | None:
        """What the student can hope for: the model shown the picture, as far as it was scored."""
        arm = self.any(train, kind)
        if arm is None:
            return None
        firsts = [arm.runs[c, arm.seeds[0]] for c in arm.concepts]
        found = []
        for measure in [m for m in measures(kind) if m in firsts[0]["teacher"]]:
            table = np.array([[run["teacher"][measure]] for run in firsts])
            own = np.mean([run["curve"]["0"][measure] for run in firsts])
            found.append(statistics.mean(table / own if measure in RELATIVE else table))
        return found

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

    def targets(self):
        """(whose states, noise level, concept, crispness) of the teacher's estimates; see
        paper_states.py. Crispness is relative to the base model's pictures."""
        base = self.any("lora")
        if not self._targets or base is None:
            return
        unit = np.mean([run["curve"]["0"][CRISP] for run in base.runs.values()])
        for name in self._targets[0]:
            for k, node in enumerate(self._targets[0][name]):
                column = lambda m, name=name, k=k: np.array(
                    [[t[name][k][m]] for t in self._targets]
                )
                found = statistics.mean(column(CONCEPT)), statistics.mean(column(CRISP) / unit)
                yield name, node["sigma"], *found
