"""Which checkpoint is the best, and whether a run still gets better.

A checkpoint's score is the gap on pictures that are not trained on (`heldout_gap`): how far the
student is from its teacher there. If the user names a scorer, the score is what this scorer gives
pictures drawn for their captions. The anchor gap, kept beside the score, says what was forgotten;
it does not rank.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from dopsd_jax.common.atomic import atomic_file, write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_files import read_json

FILE, BEST = "ranking.json", "best.safetensors"
GAP, ANCHOR_GAP = "heldout_gap", "anchor_gap"


class Order(NamedTuple):
    """What ranks: the score's name among a checkpoint's, and whether more of it is better."""

    name: str
    higher: bool


BY_LOWEST_GAP = Order(GAP, False)


class Ranking:
    """The scores of a run's checkpoints; kept in `workdir`.

    patience: the run ends after so many checkpoints in a row that are no better; 0: it never does.
    tolerance: a checkpoint is better if its score is better by this share of the best one so far.
    first: the step that the run goes on from; scores of later steps are forgotten, as these steps
      are done again.
    order: which score ranks.
    pictures: names the pictures and the weights that are scored; scores of others are forgotten.
    every: steps between two checkpoints. Checkpoints at other steps, where runs were stopped, are
      ranked too, but patience does not count them.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        patience: int,
        tolerance: float,
        first: int,
        order: Order = BY_LOWEST_GAP,
        pictures: str = "",
        every: int = 1,
    ):
        self.path, self.patience, self.tolerance = epath.Path(workdir) / FILE, patience, tolerance
        self.order, self.pictures, self.every = order, pictures, every
        entries, by, of = _read(self.path)
        comparable = of in ("", pictures)  # younger than the file
        self.entries = [e for e in entries if comparable and e["step"] <= first]
        # Checkpoints that were not asked for this score, when another one ranked.
        asked = lambda entry: by == order.name or order.name in entry
        self._unasked = {entry["step"] for entry in self.entries if not asked(entry)}

    def add(self, step: int, scores: Mapping[str, float], write: bool) -> None:
        """Notes a checkpoint's scores; with `write` in the file too."""
        others = [entry for entry in self.entries if entry["step"] < step]
        finite = {name: value for name, value in scores.items() if math.isfinite(value)}
        self.entries = [*others, {"step": step, **finite}]
        if write:
            by = {"score": self.order.name, "better": "higher" if self.order.higher else "lower"}
            content = {"best": self.best, "ranked_by": by, "pictures": self.pictures}
            content["checkpoints"] = self.entries
            write_text(self.path, json.dumps(content, indent=1) + "\n")

    def _cost(self, entry: Mapping[str, Any]) -> float:
        """The score that ranks, less is better; infinite where it is not finite."""
        if self.order.name not in entry:
            return math.inf
        return -entry[self.order.name] if self.order.higher else entry[self.order.name]

    def knows(self, step: int) -> bool:
        """Whether a checkpoint was scored."""
        return any(entry["step"] == step for entry in self.entries)

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint; step 0, which has no file, is none."""
        scored = [e for e in self.entries if e["step"] and self._cost(e) < math.inf]
        return min(scored, key=self._cost)["step"] if scored else None

    def over(self) -> bool:
        """Whether the last `patience` checkpoints were no better than one before them."""
        best, waited = math.inf, 0
        counted = (e for e in self.entries if e["step"] % self.every == 0)
        for cost in (self._cost(e) for e in counted if e["step"] not in self._unasked):
            least = best - self.tolerance * abs(best) if best < math.inf else best
            waited = 0 if cost < least else waited + 1
            best = min(best, cost)
        return 0 < self.patience <= waited

    def lines(self) -> list[str]:
        """A table, the best first."""
        found, shown = [], {GAP: "held-out gap", ANCHOR_GAP: "anchor gap"}
        for entry in sorted(self.entries, key=self._cost):
            names = dict.fromkeys((self.order.name, *entry))
            scores = ", ".join(
                f"{shown.get(name, name)} {entry[name]:.4g}"
                if name in entry
                else f"{shown.get(name, name)} not finite"
                for name in names
                if name != "step"
            )
            mark = "  <- best" if entry["step"] == self.best else ""
            found.append(f"  step {entry['step']}: {scores}{mark}")
        return found


def copy_best(path: epath.Path) -> epath.Path:
    """Copies the LoRA file at `path` to the name of the best one beside it, if it is another."""
    best, content = path.parent / BEST, path.read_bytes()
    if not best.exists() or best.read_bytes() != content:
        with atomic_file(best) as file:
            file.write(content)
    return best


def _read(path: epath.Path) -> tuple[list[dict[str, Any]], str, str]:
    """The entries of the file, the score that ranked, and the pictures; "": unknown.

    Raises `UserError` if it is damaged.
    """
    if not path.exists():
        return [], GAP, ""
    found, _ = read_json(path, again="remove it: later checkpoints are ranked again")
    entries = found.get("checkpoints") if isinstance(found, dict) else None
    number = lambda x: type(x) in (int, float) and math.isfinite(x)
    good = isinstance(entries, list) and all(
        isinstance(e, dict)
        and type(e.get("step")) is int
        and e["step"] >= 0
        and all(map(number, e.values()))
        for e in entries
    )
    if not good:
        raise UserError(f"{path}: is damaged; remove it: later checkpoints are ranked again")
    by = found.get("ranked_by")  # younger than the file
    name = by.get("score", GAP) if isinstance(by, dict) else GAP
    return sorted(entries, key=lambda entry: entry["step"]), name, str(found.get("pictures", ""))
