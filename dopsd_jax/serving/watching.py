"""What the page shows of a run: its last numbers, how far it is, its newest pictures."""

import os
import statistics
from pathlib import Path
from typing import Any

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_files import read_json
from dopsd_jax.common.progress import duration, size
from dopsd_jax.reporting import metrics
from dopsd_jax.reporting.pictures import sample_files
from dopsd_jax.reporting.run_page import CONFIG, holds_run

SHOWN = {
    "loss": "loss",
    "gap": "gap",
    "anchor_gap": "anchor gap",
    "images_per_second": "images/s",
}
PICTURES = 4  # the newest
WINDOW = 50  # steps whose median tells the time left


class Watched:
    """A run's work directory; nothing is written there. Raises `UserError` if it holds no run."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        if not os.path.isdir(workdir) or not holds_run(workdir):
            raise UserError(f"--run {workdir}: holds no run; name the --workdir of a training")
        self._seen: tuple | None = None
        self._records: list[dict[str, Any]] = []

    def numbers(self) -> dict[str, str]:
        """What to show of the last step, by name."""
        records, steps = self.records(), self.steps()
        if not records:
            return {"step": f"0 of {steps}" if steps else "0"}
        last = records[-1]
        found = {"step": f"{last['step']} of {steps}" if steps else str(last["step"])}
        found |= {
            text: f"{last[name]:.5g}"
            for name, text in SHOWN.items()
            if isinstance(last.get(name), int | float)
        }
        if isinstance(memory := last.get("peak_bytes"), int):
            found["memory"] = size(memory)
        paces = [r["seconds"] for r in records[-WINDOW:] if isinstance(r.get("seconds"), float)]
        if steps and paces:
            left = max(0, steps - last["step"]) * statistics.median(paces)
            found["time left"] = duration(left)
        return found

    def share(self) -> float:
        """How much of the run is done, from 0 to 1."""
        records, steps = self.records(), self.steps()
        return min(1.0, records[-1]["step"] / steps) if records and steps else 0.0

    def pictures(self) -> list[tuple[Path, str]]:
        """The newest grids and what to write under them, the newest first."""
        files = sample_files(self.workdir)[-PICTURES:]
        return [(Path(path), f"step {step}") for step, path in reversed(files)]

    def steps(self) -> int | None:
        """How many steps the run shall have."""
        path = self.workdir / CONFIG
        written = (
            read_json(path, again="is the run still being written?")[0]
            if os.path.exists(path)
            else None
        )
        config = written.get("config") if isinstance(written, dict) else None
        found = config.get("steps") if isinstance(config, dict) else None
        return found if type(found) is int and found > 0 else None

    def records(self) -> list[dict[str, Any]]:
        """All of metrics.jsonl, read again only where it has changed."""
        path = self.workdir / metrics.FILE
        try:
            state = os.stat(path)
        except OSError:
            return []
        seen = state.st_size, state.st_mtime_ns, state.st_ino
        if seen != self._seen:
            self._records, self._seen = metrics.read_metrics(path), seen
        return self._records
