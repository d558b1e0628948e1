"""Steps that went wrong: a loss or gradient that is not finite, and a loss far above the usual.

What is not finite never enters the state: the compiled step refuses it (`state.make_step`). Here
the run learns of it, one step later, and writes down which batch it was.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dopsd_jax.common.atomic import write_text
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.reporting.metrics import plain

FOLDER = "incidents"
MAX_SKIPPED = 10  # steps in a row without a finite gradient: then it is not the batch
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


def finite(metrics: Mapping[str, Any]) -> bool:
    """Whether a step's loss and gradient were: the question the compiled step asks too."""
    return all(x is not None and math.isfinite(x) for x in (metrics["loss"], metrics["grad_norm"]))


class Guard:
    """Follows a run's metrics. `records`: those of the steps before, so that a resumed run agrees.

    skipped: steps without a finite gradient so far; in_a_row: how many of the last ones.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]] = ()):
        self.spikes = Spikes([record["loss"] for record in records])
        bad = [not finite(record) for record in records]
        self.skipped = sum(bad)
        self.in_a_row = len(bad) - 1 - max((i for i, b in enumerate(bad) if not b), default=-1)

    def look(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What a step's record says beyond its metrics: `skipped` so far, and `spike`."""
        bad = not finite(metrics)
        self.skipped += bad
        self.in_a_row = self.in_a_row + 1 if bad else 0
        return {"skipped": self.skipped, "spike": self.spikes.add(float(metrics["loss"]))}

    def fault(self, record: Mapping[str, Any]) -> str | None:
        """What was wrong with the step just looked at, if anything."""
        if self.in_a_row:
            return f"the loss is {record['loss']}, its gradient's norm {record['grad_norm']}"
        return f"the loss, {record['loss']:.5g}, is a spike" if record["spike"] else None

    def must_stop(self, nonfinite: str) -> bool:
        """Whether the run ends here; `nonfinite`: the field of the configuration."""
        return self.in_a_row > (0 if nonfinite == "stop" else MAX_SKIPPED - 1)

    def advice(self, step: int, nonfinite: str, kept: int) -> str:
        """The line that such a run ends with; `kept`: the step that was saved."""
        saved = f"the good state after step {kept} is saved" if kept else "nothing was trained yet"
        if nonfinite == "stop":
            todo = "set config.nonfinite=skip to go on without such steps"
        else:
            todo = f"{self.in_a_row} steps in a row were skipped"
        return (
            f"step {step}: its loss or gradient is not finite, and was not applied; {saved}; see "
            f"{FOLDER}/step_{step}.json for its batch; {todo}, or start anew with a lower "
            "config.learning_rate"
        )


def write_incident(
    workdir: epath.Path, why: str, metrics: Mapping[str, Any], batch: BatchIndex, dataset: Dataset
) -> epath.Path:
    """Writes incidents/step_N.json: which rows, files and captions the step saw; returns its path.

    `metrics`: the step's record, with `step`.
    """
    samples = []
    for row, key, caption in zip(batch.rows, batch.prompt_keys, batch.captions, strict=True):
        content = dataset.rows[row]
        samples.append(
            {
                "row": content.where,
                "image": str(content.image),
                "prompt_key": key,
                "caption": content.captions[caption][1],
            }
        )
    step = metrics["step"]
    record = {
        "why": why,
        "metrics": {name: plain(value) for name, value in metrics.items()},
        "size": list(batch.bucket),
        "samples": samples,
    }
    path = workdir / FOLDER / f"step_{step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path
