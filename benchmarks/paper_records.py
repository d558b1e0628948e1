"""The records of paper.py by arm, with means over concepts and seeds."""

import fcntl
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from paper_arms import APART, MORE_NEW_WORDS, NEW_WORDS, OPEN, RATES, SEQUENTIAL, SHIPPED

from dopsd_jax.evaluation import statistics
from dopsd_jax.evaluation.statistics import Estimate

IDENTITY, CRISP, CONTRAST, ORDINARY_CRISP, COMPOSITION, RETENTION, LEAK = MEASURES = (
    "bare identity",
    "bare crispness",
    "bare contrast",
    "ordinary crispness",
    "composition kept",
    "retention",
    "leaked concept",
)


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
        """Scores after so many steps."""
        value = lambda run: run["curve"][str(step)][measure]
        return np.array([[value(self.runs[c, s]) for s in self.seeds] for c in self.concepts])

    def final(self, measure: str) -> Estimate:
        """The mean after the last step."""
        return statistics.mean(self.curve(measure, self.steps[-1]))

    def less(self, other: "Runs", measure: str, step: int | None = None) -> Estimate:
        """This arm's mean less the other's, over the concepts and seeds that both have.

        step: of the other; its last one.
        """
        pairs = sorted(self.runs.keys() & other.runs.keys())
        one, two = (Runs({p: arm.runs[p] for p in pairs}) for arm in (self, other))
        last = two.steps[-1] if step is None else step
        return statistics.difference(one.curve(measure, one.steps[-1]), two.curve(measure, last))

    def when(self, level: float, measure: str) -> float | None:
        """The mean of a measure where the mean identity first reaches `level`, on straight lines
        between the steps that were scored; None if it never does.

        Pictures before training are of other objects: a level that the first step that was scored
        has passed is read there.
        """
        mean = lambda name, step: statistics.mean(self.curve(name, step)).value  # as in `final`
        score = [mean(IDENTITY, n) for n in self.steps[1:]]
        other = [mean(measure, n) for n in self.steps[1:]]
        if score[0] >= level:
            return float(other[0])
        for i in range(1, len(score)):
            if score[i - 1] <= level <= score[i]:
                share = (level - score[i - 1]) / max(score[i] - score[i - 1], 1e-9)
                return float(other[i - 1] + share * (other[i] - other[i - 1]))
        return None


class Records:
    """All records."""

    def __init__(self, records: list[dict]):
        self._runs: dict[tuple, dict] = defaultdict(dict)
        self._sequences: dict[tuple[str, float, str], list] = defaultdict(list)
        self.targets: list[dict] = []
        self.words: dict[str, dict] = {}  # by student
        for record in records:
            if record["kind"] == "sequence":
                self._sequences[tuple(record[k] for k in ("name", "rate", "student"))].append(
                    record
                )
            elif record["kind"] == "states":
                self.targets.append(record["targets"])
            elif record["kind"] == "words":
                self.words[record["student"]] = record["words"]
            else:
                key = [record[k] for k in ("name", "train", "rate", "captions", "student")]
                self._runs[tuple(key)][record["concept"], record["seed"]] = record

    def arm(
        self,
        name: str,
        train: str = "lora",
        rate: float = RATES["lora"][0],
        captions: str = OPEN,
        student: str = SHIPPED,
    ) -> Runs | None:
        found = self._runs.get((name, train, rate, captions, student))
        return Runs(found) if found else None

    def any(self, train: str = "lora", student: str = SHIPPED) -> Runs | None:
        """The arm with most runs, for what all share."""
        found = [
            Runs(runs)
            for (_, own, _, _, who), runs in self._runs.items()
            if (own, who) == (train, student)
        ]
        return max(found, key=lambda arm: arm.count, default=None)

    def base(self, measure: str, train: str = "lora", student: str = SHIPPED) -> Estimate | None:
        """The model before training."""
        arm = self.any(train, student)
        return arm and statistics.mean(arm.curve(measure, 0))

    def teacher(self, measure: str, student: str = SHIPPED) -> Estimate | None:
        """What the student can hope for: the model shown the picture, as far as it was scored."""
        arm = self.any("lora", student)
        if arm is None:
            return None
        firsts = [arm.runs[c, arm.seeds[0]]["teacher"] for c in arm.concepts]
        if measure not in firsts[0]:
            return None
        return statistics.mean(np.array([[scores[measure]] for scores in firsts]))

    def sequences(self) -> dict[tuple[str, float, str], list[list[list[dict]]]]:
        """[seed][round][concept] scores by method, rate and student, those that are there."""
        keys = itertools.product(
            (SHIPPED, APART), (*SEQUENTIAL, NEW_WORDS, MORE_NEW_WORDS), RATES["lora"]
        )
        found = {(name, rate, who): self._sequences[name, rate, who] for who, name, rate in keys}
        return {key: [one["rounds"] for one in many] for key, many in found.items() if many}
