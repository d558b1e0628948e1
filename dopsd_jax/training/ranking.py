"""Which checkpoint is the best, and whether a run still gets better.

A checkpoint's score is the gap on pictures that are not trained on (`heldout_gap`): how far the
student is from its teacher where it has not been taught. The anchor gap beside it says what was
forgotten; it does not rank.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from dopsd_jax.common.atomic import atomic_file, write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_files import read_json

FILE, BEST = "ranking.json", "best.safetensors"
GAP, ANCHOR_GAP = "heldout_gap", "anchor_gap"


class Ranking:
    """The scores of a run's checkpoints; kept in `workdir`.

    patience: so many checkpoints in a row that are no better end the run; 0: none do. tolerance: a
    checkpoint is better if its gap is lower by this share of the best so far. first: the step that
    the run goes on from: what was scored after it will be scored again.
    """

    def __init__(self, workdir: epath.PathLike, patience: int, tolerance: float, first: int):
        self.path, self.patience, self.tolerance = epath.Path(workdir) / FILE, patience, tolerance
        self.entries = [entry for entry in _read(self.path) if entry["step"] <= first]

    def add(self, step: int, scores: Mapping[str, float], write: bool) -> None:
        """Notes a checkpoint's scores; with `write` in the file too."""
        others = [entry for entry in self.entries if entry["step"] < step]
        finite = {name: value for name, value in scores.items() if math.isfinite(value)}
        self.entries = [*others, {"step": step, **finite}]
        if write:
            content = {"best": self.best, "checkpoints": self.entries}
            write_text(self.path, json.dumps(content, indent=1) + "\n")

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the lowest gap; step 0, which has no file, is none."""
        scored = [entry for entry in self.entries if entry["step"] and GAP in entry]
        return min(scored, key=lambda entry: entry[GAP])["step"] if scored else None

    def over(self) -> bool:
        """Whether the last `patience` checkpoints were no better than one before them."""
        best, waited = math.inf, 0
        for entry in self.entries:
            gap = entry.get(GAP, math.inf)
            lower = gap < math.inf if best == math.inf else gap < (1 - self.tolerance) * best
            waited = 0 if lower else waited + 1
            best = min(best, gap)
        return 0 < self.patience <= waited

    def lines(self) -> list[str]:
        """A table, the best first."""
        scored = sorted(self.entries, key=lambda entry: entry.get(GAP, math.inf))
        found = []
        for entry in scored:
            anchor = f", anchor gap {entry[ANCHOR_GAP]:.4g}" if ANCHOR_GAP in entry else ""
            gap = f"{entry[GAP]:.4g}" if GAP in entry else "not finite"
            mark = "  <- best" if entry["step"] == self.best else ""
            found.append(f"  step {entry['step']}: held-out gap {gap}{anchor}{mark}")
        return found


def copy_best(path: epath.Path) -> epath.Path:
    """Copies the LoRA file at `path` to the name of the best one beside it."""
    with atomic_file(path.parent / BEST) as file:
        file.write(path.read_bytes())
    return path.parent / BEST


def _read(path: epath.Path) -> list[dict[str, Any]]:
    """The entries of the file. Raises `UserError` where it is damaged."""
    if not path.exists():
        return []
    found, _ = read_json(path, again="remove it: later checkpoints are ranked again")
    entries = found.get("checkpoints") if isinstance(found, dict) else None
    number = lambda x: type(x) in (int, float) and x >= 0
    good = isinstance(entries, list) and all(
        isinstance(e, dict) and type(e.get("step")) is int and all(map(number, e.values()))
        for e in entries
    )
    if not good:
        raise UserError(f"{path}: is damaged; remove it: later checkpoints are ranked again")
    return sorted(entries, key=lambda entry: entry["step"])
