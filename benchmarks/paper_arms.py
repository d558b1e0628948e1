"""What the experiment compares: arms, as fields of the configuration. See paper.py."""

import dataclasses
import itertools
from collections.abc import Iterator

CONCEPTS, SEEDS = 4, 5
STEPS, BATCH = 40, 2
LOOKS = (10, 20, STEPS)  # steps at which the student is scored
RATES = {"lora": (5e-4, 2e-3), "full": (1e-4, 3e-4)}
CLASS = "circle"  # what DreamBooth's class prompts say instead of the new word

METHODS = ("dopsd", "sft", "sft_teacher", "offpolicy", "pso", "dreambooth")
# Ablations, with adapters and the first rate alone: fields that differ from `dopsd`'s.
ABLATIONS = {
    "teacher live": {"teacher.weights": "live"},
    "teacher EMA 0.9": {"teacher.decay": 0.9},
    "teacher EMA 0.999": {"teacher.decay": 0.999},
    "teacher frozen": {"teacher.weights": "frozen"},
    "loss x0": {"loss": "x0"},
    "one random step": {"loss_steps": "random:1"},
    "all eight nodes": {"grid": "nodes8"},
    "off-policy on noised pictures": {"method": "offpolicy", "offpolicy.states": "targets"},
    "SFT at the grid's noise levels": {"method": "sft", "sft.sigma": "nodes"},
}
SEQUENCE = (0, 1, 2)  # concepts that are learned one after another
SEQUENTIAL = ("dopsd", "sft")
ABLATION_SEEDS = 3
# Full fine-tuning on many pictures of a style; see paper_styles.py.
STYLE_METHODS = ("dopsd", "sft", "offpolicy", "pso")
STYLE_CAPTIONS = ("whole", "short")
STYLE_COUNT, STYLE_STEPS, STYLE_BATCH, STYLE_RATE = 4, 60, 4, 3e-4
STYLE_LOOKS = (15, 30, STYLE_STEPS)


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that share a program: they differ in concept and seed.

    kind: `alone`, one concept a run; `sequence`, one after another; of `STYLE_CAPTIONS`, a style;
      `states`: nothing is trained, see paper_states.py.
    """

    name: str
    train: str
    rate: float
    kind: str = "alone"

    def fields(self, word: str) -> dict[str, object]:
        """What the configuration has besides the quickstart's."""
        own = ABLATIONS.get(self.name, {"method": self.name})
        if self.name == "dreambooth":
            own |= {"dreambooth.concept_word": word, "dreambooth.class_word": CLASS}
        run = {"train": self.train, "learning_rate": self.rate, "steps": STEPS, "batch_size": BATCH}
        return run | own

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Concept (of a sequence the first; or the style) and seed of every run."""
        if self.kind in STYLE_CAPTIONS:
            return [(style, 0) for style in range(STYLE_COUNT)]
        if self.kind == "states":
            return [(concept, 0) for concept in range(CONCEPTS)]
        seeds = ABLATION_SEEDS if self.name in ABLATIONS else SEEDS
        count = 1 if self.kind == "sequence" else CONCEPTS
        return list(itertools.product(range(count), range(seeds)))

    def key(self, concept: int, seed: int) -> str:
        """A run's name in the table of results."""
        return f"{self.name}|{self.train}|{self.rate:g}|{self.kind}|{concept}|{seed}"


def arms() -> Iterator[Arm]:
    """Every arm, the most wanted first."""
    for train in RATES:
        for method in METHODS:
            for rate in RATES[train]:
                yield Arm(method, train, rate)
    for train, method in itertools.product(RATES, SEQUENTIAL):
        yield Arm(method, train, RATES[train][0], kind="sequence")
    for name in ABLATIONS:
        yield Arm(name, "lora", RATES["lora"][0])
    for name, kind in itertools.product(STYLE_METHODS, STYLE_CAPTIONS):
        yield Arm(name, "full", STYLE_RATE, kind)
    yield Arm("dopsd", "lora", 0.0, kind="states")
