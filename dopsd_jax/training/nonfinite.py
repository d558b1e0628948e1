"""Steps that went wrong: numbers that are not finite, and a loss far above the usual.

The compiled step refuses a state that is not finite (`train_step.make_step`); the run learns of it
here, one step later.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dopsd_jax.common.errors import raise_if

FOLDER = "incidents"  # of the work directory: one file for each such step
PARTS = ("loss", "gradient", "student", "teacher", "optimizer")  # what must be finite in a step
MAX_SKIPPED = 10  # refused steps in a row; then the batch is not the cause
SPIKE_WINDOW, SPIKE_MIN = 100, 20  # losses compared with; as many are needed at least
SPIKE_DEVIATIONS = 8.0


class Spikes:
    """Which losses are far above the last ones.

    Losses spread over decades and have outliers, so the logarithm is compared, with the median of
    the last `SPIKE_WINDOW` finite losses, in units of 1.4826 times their median absolute deviation
    (the standard deviation, if they were normal). Above `SPIKE_DEVIATIONS` it is a spike.
    """

    def __init__(self, losses: Sequence[float | None] = ()):
        self._logs: deque[float] = deque(maxlen=SPIKE_WINDOW)
        for loss in losses:
            self.add(loss)

    def add(self, loss: float | None) -> bool:
        """Whether this loss is a spike; from then on it is one of the last."""
        if loss is None or not math.isfinite(loss) or loss <= 0:
            return False
        # In float32, as metrics.jsonl has it: a resumed run must agree.
        value, logs = math.log(np.float32(loss)), self._logs
        spike = False
        if len(logs) >= SPIKE_MIN:
            middle = statistics.median(logs)
            spread = 1.4826 * statistics.median(abs(x - middle) for x in logs)
            spike = value - middle > SPIKE_DEVIATIONS * spread > 0
        logs.append(value)
        return spike


def nonfinite_parts(metrics: Mapping[str, Any]) -> list[str]:
    """Which of `PARTS` were not finite in a step, by its metrics or its line in metrics.jsonl."""
    if "finite" in metrics:
        return [part for part, ok in zip(PARTS, metrics["finite"], strict=True) if not ok]
    if "nonfinite" in metrics:
        return list(metrics["nonfinite"])
    values = {"loss": metrics["loss"], "gradient": metrics["grad_norm"]}
    return [part for part, x in values.items() if x is None or not math.isfinite(x)]


def finite(metrics: Mapping[str, Any]) -> bool:
    """Whether all of a step was: the question the compiled step asks too."""
    return not nonfinite_parts(metrics)


class Guard:
    """Follows a run's metrics. `records`: those of the steps before, so that a resumed run agrees.

    skipped: refused steps so far; in_a_row: how many of the last ones. Raises `UserError` for
    records that are not of a step.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]] = ()):
        measured = lambda value: value is None or type(value) in (int, float)
        raise_if(
            f"metrics.jsonl: step {record['step']} has no number under {name!r}; remove its line"
            for record in records
            for name in ("loss", "grad_norm")
            if name not in record or not measured(record[name])
        )
        self.spikes = Spikes([record["loss"] for record in records])
        bad = [not finite(record) for record in records]
        self.skipped = sum(bad)
        self.in_a_row = len(bad) - 1 - max((i for i, b in enumerate(bad) if not b), default=-1)

    def look(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What a step's record says beyond its metrics: `skipped` so far, and `spike`.

        Of a refused step also `nonfinite`, the parts that were not finite.
        """
        bad = nonfinite_parts(metrics)
        self.skipped += bool(bad)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        found = {"skipped": self.skipped, "spike": self.spikes.add(float(metrics["loss"]))}
        return found | {"nonfinite": bad} if bad else found

    def fault(self, record: Mapping[str, Any]) -> str | None:
        """What was wrong with the step just looked at, if anything."""
        if self.in_a_row:
            return (
                f"not finite: {', '.join(nonfinite_parts(record))} (the loss is {record['loss']}, "
                f"its gradient's norm {record['grad_norm']})"
            )
        return f"the loss, {record['loss']:.5g}, is a spike" if record["spike"] else None

    def must_stop(self, nonfinite: str) -> bool:
        """Whether the run ends here; `nonfinite`: the field of the configuration."""
        return self.in_a_row > (0 if nonfinite == "stop" else MAX_SKIPPED - 1)

    def advice(self, record: Mapping[str, Any], nonfinite: str, kept: int) -> str:
        """The line that such a run ends with; `kept`: the step that was saved."""
        step, parts = record["step"], nonfinite_parts(record)
        if {"loss", "gradient"} & set(parts):
            what = "its loss or gradient is not finite"
        else:
            what = f"it makes numbers that are not finite in the {' and the '.join(parts)}"
        saved = f"the good state after step {kept} is saved" if kept else "nothing was trained yet"
        if nonfinite == "stop":
            todo = "set config.nonfinite=skip to go on without such steps"
        else:
            todo = f"{self.in_a_row} steps in a row were skipped"
        return (
            f"step {step}: {what}, and was not applied; {saved}; see "
            f"{FOLDER}/step_{step}.json for its batch; {todo}, or start anew with a lower "
            "config.learning_rate"
        )
