"""One sentence about a tuned model: did it learn, does it keep its few steps, what did it lose?

The sentence follows from the scores by the bounds of `BOUNDS` alone. A bound is missed where the
95 % interval of the score lies wholly beyond it; where the score does and its interval does not,
the sentence says `perhaps`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dopsd_jax.evaluation.results import BASE, Score

TEACHER, TUNED = "teacher", "tuned"
TRUE = "true pictures'"

# Of the way from the base's likeness to the teacher's.
LEARNED, IN_PART = 0.7, 0.3


class Bound(NamedTuple):
    """head: what a model is called that misses it. least: the smallest good value.
    lost, kept: what the sentence says of it."""

    head: str
    least: float
    lost: str
    kept: str


BOUNDS = {
    "crispness": Bound("blurred", 0.9, "lost sharpness", "kept its sharpness"),
    "contrast": Bound("hazy", 0.9, "lost contrast", "kept its contrast"),
    "retention": Bound("forgot", 0.9, "forgot ordinary things", "kept ordinary things"),
    "composition kept": Bound(
        "redrawn", 0.5, "draws other pictures from the same noise", "kept its compositions"
    ),
    "spread": Bound(
        "narrow", 0.5, "puts the concept at the same place always", "kept the variety of places"
    ),
    # What the base's score is above the tuned model's.
    "leak": Bound(
        "leaks", -0.15, "draws the concept for other new words", "keeps other new words apart"
    ),
}
STEPS, REST = ("crispness", "contrast"), ("retention", "composition kept", "spread", "leak")


class Reading(NamedTuple):
    """A score of the tuned model as its bound takes it. half: half the width of its 95 % interval,
    None where that is not known. of: whose score it is relative to."""

    value: float
    half: float | None = None
    of: str = ""

    def misses(self, least: float) -> bool:
        return self.value < least

    def perhaps(self, least: float) -> bool:
        """Whether it misses the bound, but its interval reaches it."""
        return self.half is not None and self.value + self.half >= least


class Likeness(NamedTuple):
    """name: of the score. Of the three models; lower is better where the teacher's is to be so.

    half: half the width of the 95 % interval of tuned - base, None where that is not known.
    """

    name: str
    tuned: float
    base: float
    teacher: float
    better: str = "higher"
    half: float | None = None

    def perhaps(self, least: float) -> bool:
        """Whether less was learned than `least`, but the interval reaches it."""
        if self.half is None or not self.learned:
            return False
        return self.learned + self.half / abs(self.teacher - self.base) >= least

    @property
    def learned(self) -> float | None:
        """The part of the way from base to teacher; None where the teacher is no better."""
        way = self.teacher - self.base
        if way * (1 if self.better == "higher" else -1) <= 0:
            return None
        return (self.tuned - self.base) / way


@dataclass(frozen=True)
class Findings:
    """likeness: to the targets. readings: by the names of `BOUNDS`; of several the worst counts."""

    likeness: Likeness | None
    readings: Mapping[str, Sequence[Reading]]


def sentence(found: Findings) -> str:
    """The verdict; empty where nothing was measured."""
    heads, clauses = [], []
    learned = None if found.likeness is None else found.likeness.learned
    if found.likeness is not None:
        like = found.likeness
        numbers = f"({like.name} {like.tuned:.2f}, teacher {like.teacher:.2f})"
        if learned is None:
            heads = ["nothing to learn"]
            numbers = f"({like.name} {like.teacher:.2f}, base {like.base:.2f})"
            clauses = [f"the teacher is no more like the targets than the base {numbers}"]
        elif learned < IN_PART:
            unsure = "perhaps " if like.perhaps(IN_PART) else ""
            heads = [f"{unsure}did not learn"]
            clauses = [f"the concept is {unsure}not there {numbers}"]
        elif learned < LEARNED:
            unsure = "perhaps only " if like.perhaps(LEARNED) else ""
            heads = [f"learned {unsure}in part"]
            clauses = [f"the concept is there {unsure}in part {numbers}"]
        else:
            clauses = [f"learned the concept {numbers}"]
    for names, kept in ((STEPS, "kept its few steps"), (REST, "kept the rest")):
        worst = {
            name: min(found.readings[name], key=lambda reading: reading.value)
            for name in names
            if found.readings.get(name)
        }
        if worst and not any(r.misses(BOUNDS[n].least) for n, r in worst.items()):
            clauses.append(f"{kept} ({', '.join(_number(n, r) for n, r in worst.items())})")
            continue
        for name, reading in worst.items():
            bound, number = BOUNDS[name], _number(name, reading)
            if not reading.misses(bound.least):
                clauses.append(f"{bound.kept} ({number})")
                continue
            unsure = "perhaps " if reading.perhaps(bound.least) else ""
            heads.append(unsure + bound.head)
            clauses.append(f"{unsure}{bound.lost} ({number})")
    if not clauses:
        return ""
    text = f"{_listed(heads)}: {_listed(clauses)}" if heads else _listed(clauses)
    return f"{text[0].upper()}{text[1:]}."


def _number(name: str, reading: Reading) -> str:
    if name == "leak":
        return f"leak {-reading.value:+.2f} over the base"
    return f"{name} {reading.value:.2f}{f' of the {reading.of}' if reading.of else ''}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


# --- from the scores of an evaluation

# What each score tells, and whose it is compared with: pictures of the concept with the teacher's,
# which show the same; others with the base's.
TELLS = {
    "crispness": ("crispness", BASE),
    "ordinary crispness": ("crispness", BASE),
    "concept crispness": ("crispness", TEACHER),
    "contrast": ("contrast", BASE),
    "ordinary contrast": ("contrast", BASE),
    "concept contrast": ("contrast", TEACHER),
    "retention": ("retention", BASE),
    "spread": ("spread", BASE),
}
LIKENESS = ("identity", "DINO-D")  # the first that was scored


def findings(scores: Sequence[Score]) -> Findings:
    """What an evaluation tells of the tuned model."""
    by_name = {score.name: score for score in scores if TUNED in score.arms}
    readings: dict[str, list[Reading]] = {}
    for name, (told, other) in TELLS.items():
        if name in by_name and (reading := _relative(by_name[name], other)) is not None:
            readings.setdefault(told, []).append(reading)
    if "composition kept" in by_name:
        own = by_name["composition kept"].arms[TUNED]
        readings["composition kept"] = [Reading(own.value, own.half)]
    leak = by_name.get("leaked concept")
    if leak is not None and (TUNED, BASE) in leak.differences:
        more = leak.differences[TUNED, BASE]
        readings["leak"] = [Reading(-more.value, more.half)]
    likeness = None
    for name in LIKENESS:
        score = by_name.get(name)
        if likeness is None and score is not None and {BASE, TEACHER} <= score.arms.keys():
            values = (score.arms[arm].value for arm in (TUNED, BASE, TEACHER))
            likeness = Likeness(name, *values, score.better, score.differences[TUNED, BASE].half)
    return Findings(likeness, readings)


def _relative(score: Score, other: str) -> Reading | None:
    """The tuned model's part of another's score; None where that was not asked, or is 0.

    A teacher above true pictures, whose scores of the concept are 1, is no measure: they are.
    """
    if other not in score.arms or score.arms[other].value <= 0:
        return None
    if other == TEACHER and score.arms[other].value > 1:
        own = score.arms[TUNED]
        return Reading(own.value, own.half, TRUE)
    whole, gap = score.arms[other].value, score.differences[TUNED, other]
    half = None if gap.half is None else gap.half / whole
    return Reading(1 + gap.value / whole, half, f"{other}'s")
