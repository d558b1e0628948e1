"""What the experiment compares: arms, as fields of the configuration. See paper.py."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

CONCEPTS, SEEDS = 4, 5
PICTURES, STEPS, BATCH = 8, 60, 8
LOOKS = (15, 30, STEPS)  # steps at which the student is scored
RATES = {"lora": (1e-3, 3e-4), "full": (1e-4, 3e-4)}
CLASS = "circle"  # what DreamBooth's class prompts say instead of the new word
ANCHOR = {"anchor.share": 0.25}  # the quickstart's, on its ordinary prompts

# Every method at both rates: fields that differ from the quickstart's.
METHODS = {
    "dopsd": {},
    "sft": {"method": "sft"},
    "dopsd + anchor": ANCHOR,
    "sft + anchor": {"method": "sft", **ANCHOR},
    "sft at the grid's levels": {"method": "sft", "sft.sigma": "nodes"},
    "sft on teacher samples": {"method": "sft_teacher"},
    "off-policy": {"method": "offpolicy"},
    "off-policy, noised pictures": {"method": "offpolicy", "offpolicy.states": "targets"},
    "pso": {"method": "pso"},
    "dreambooth": {"method": "dreambooth"},
}
FULL = ("dopsd", "sft", "dopsd + anchor", "sft + anchor", "off-policy", "pso")
# With adapters, the first rate and `ABLATION_SEEDS`.
ABLATIONS = {
    "rate falls to zero": {"lr_schedule": "cosine"},
    "loss x0": {"loss": "x0"},
    "one random step": {"loss_steps": "random:1"},
    "all eight nodes": {"grid": "nodes8"},
    "off-policy, all eight nodes": {"method": "offpolicy", "grid": "nodes8"},
    "off-policy, noised pictures, all eight nodes": {
        "method": "offpolicy",
        "offpolicy.states": "targets",
        "grid": "nodes8",
    },
    "half of the picture's tokens": {"teacher.vision_dropout": 0.5},
    "a quarter of them": {"teacher.vision_dropout": 0.75},
}
# How many anchors, and which; `new_words` besides the ordinary ones.
NEW_WORDS = "1/2 anchors, half of them new words"
SHARES = {
    "1/8 anchors": {"anchor.share": 0.125},
    "1/2 anchors": {"anchor.share": 0.5},
    "1/4 anchors, half of them new words": {"anchor.share": 0.25, "anchor.prompts": "new_words"},
    NEW_WORDS: {"anchor.share": 0.5, "anchor.prompts": "new_words"},
}
ABLATION_SEEDS = 2
# Whether a word that leaked comes back to what it was.
MORE_STEPS, MORE_LOOKS = 180, (60, 120, 180)
MORE_ALONE, MORE_NEW_WORDS = f"{MORE_STEPS} steps", f"{MORE_STEPS} steps, {NEW_WORDS}"
MORE = {
    MORE_ALONE: {},
    f"{MORE_STEPS} steps, 1/2 anchors": SHARES["1/2 anchors"],
    MORE_NEW_WORDS: SHARES[NEW_WORDS],
}
# What the student was before: the shipped miniature is distilled by distribution matching.
SHIPPED, APART = "shipped", "words apart"
STUDENTS = "not distilled", "segment", "endpoint", APART
COMPARED = ("dopsd", "sft")  # of another student
ANCHORED = "dopsd + anchor", NEW_WORDS  # besides, where words differ
DROPPED = ("half of the picture's tokens", "a quarter of them")
# The teacher over many steps.
LONG_LOOKS = (60, 150, 300, 600)
LONG = {
    "long, teacher live": {"teacher.weights": "live"},
    "long, EMA 0.9": {"teacher.decay": 0.9},
    "long, EMA 0.999": {"teacher.decay": 0.999},
    "long, EMA 0.9999": {"teacher.decay": 0.9999},
    "long, teacher frozen": {"teacher.weights": "frozen"},
    "long, EMA 0.9999, 1/4 anchors": {"teacher.decay": 0.9999, **ANCHOR},
    "long, EMA 0.9999, off-policy": {"teacher.decay": 0.9999, "method": "offpolicy"},
}
SEQUENCE = (0, 1, 2, 3, 4)  # concepts that are learned one after another
SEQUENTIAL = ("dopsd + anchor", "1/2 anchors", "dopsd", "sft")
# Captions: the word alone, the whole arrangement, or one and the other in turn.
OPEN, WHOLE, BOTH = "open", "whole", "both"


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that share a program: they differ in concept and seed.

    kind: `alone`, one concept a run; `sequence`, one after another; `states`, `words`:
      nothing is trained, see paper_states.py and paper_words.py.
    captions: `OPEN`, `WHOLE` or `BOTH`. student: `SHIPPED`, or one of `STUDENTS`.
    """

    name: str
    train: str
    rate: float
    kind: str = "alone"
    captions: str = OPEN
    student: str = SHIPPED

    @property
    def own(self) -> Mapping[str, object]:
        """The fields that make it what it is."""
        return (METHODS | ABLATIONS | SHARES | MORE | LONG)[self.name]

    @property
    def steps(self) -> int:
        return self.looks[-1]

    @property
    def looks(self) -> tuple[int, ...]:
        if self.name in LONG:
            return LONG_LOOKS
        return MORE_LOOKS if self.name in MORE else LOOKS

    def fields(self, word: str, ordinary: str) -> dict[str, object]:
        """What the configuration has besides the quickstart's; `ordinary`: a file of prompts."""
        own = dict(self.own)
        if own.get("method") == "dreambooth":
            own |= {"dreambooth.concept_word": word, "dreambooth.class_word": CLASS}
        if "anchor.share" in own:
            more = [own["anchor.prompts"]] if "anchor.prompts" in own else []
            own |= {"anchor.concept_word": word, "anchor.prompts": ",".join([ordinary, *more])}
        run = {"train": self.train, "learning_rate": self.rate, "steps": self.steps}
        return {"batch_size": BATCH, **run, **own}

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Concept (of a sequence the first) and seed of every run; one seed after another."""
        if self.kind == "states" or self.name in LONG:
            return [(concept, 0) for concept in range(CONCEPTS)]
        if self.kind == "words":
            return [(0, 0)]
        if self.kind == "sequence":
            return [(0, seed) for seed in range(ABLATION_SEEDS)]
        usual = self.name in METHODS and (self.captions, self.student) == (OPEN, SHIPPED)
        seeds = SEEDS if usual else ABLATION_SEEDS
        return [
            (concept, seed) for seed, concept in itertools.product(range(seeds), range(CONCEPTS))
        ]

    def key(self, concept: int, seed: int) -> str:
        """A run's name in the table of results."""
        where = f"{self.kind}|{self.captions}|{self.student}"
        return f"{self.name}|{self.train}|{self.rate:g}|{where}|{concept}|{seed}"


def arms() -> Iterator[Arm]:
    """Every arm, the most wanted first."""
    rate, other = RATES["lora"]
    for name in METHODS:
        yield Arm(name, "lora", rate)
    for name, own in (*((name, rate) for name in SEQUENTIAL), ("1/2 anchors", other)):
        yield Arm(name, "lora", own, kind="sequence", captions=WHOLE)
    for name in SHARES:
        yield Arm(name, "lora", rate)
    for name in (*COMPARED, *DROPPED):
        yield Arm(name, "lora", rate, captions=WHOLE)
    for name in METHODS:
        yield Arm(name, "lora", other)
    for name in ABLATIONS:
        yield Arm(name, "lora", rate)
    yield Arm("dopsd", "lora", 0.0, kind="states")
    yield Arm("dopsd", "lora", 0.0, kind="words")
    for name, student in itertools.product(COMPARED, STUDENTS):
        yield Arm(name, "lora", rate, student=student)
    for name in ANCHORED:
        yield Arm(name, "lora", rate, student=APART)
    yield Arm(NEW_WORDS, "lora", rate, captions=WHOLE, student=APART)
    for name in (*SEQUENTIAL, NEW_WORDS):
        yield Arm(name, "lora", rate, kind="sequence", captions=WHOLE, student=APART)
    for name, student in itertools.product(MORE, (APART, SHIPPED)):
        yield Arm(name, "lora", rate, student=student)
    for name, told in itertools.product((MORE_NEW_WORDS, MORE_ALONE), (WHOLE, BOTH)):
        yield Arm(name, "lora", rate, captions=told, student=APART)
    yield Arm(MORE_NEW_WORDS, "lora", rate, kind="sequence", captions=WHOLE, student=APART)
    yield Arm("dopsd", "lora", 0.0, kind="words", student=APART)
    for name in LONG:
        yield Arm(name, "lora", rate)
    for name, rate in itertools.product(FULL, RATES["full"]):
        yield Arm(name, "full", rate)
