"""What a run measured: metrics.jsonl, one JSON object per step, and the line of progress."""

import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath

from dopsd_jax.common.atomic import atomic_file, disk_error, is_remote
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.progress import duration

FILE = "metrics.jsonl"
STORE_SECONDS = 60.0  # between two versions of the file in an object store


def plain(value: Any) -> Any:
    """Numbers and (nested) arrays as JSON has them; what is not finite becomes null.

    A float32 keeps its shortest decimal form, 0.1 and not 0.10000000149011612.
    """
    if isinstance(value, jax.Array):
        value = jax.device_get(value)
    if isinstance(value, np.ndarray) and value.ndim:
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        value = value[()]
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.bool_ | bool):
        return bool(value)
    if isinstance(value, np.integer | int):
        return int(value)
    if isinstance(value, str) or value is None:
        return value
    number = float(value) if isinstance(value, float) else float(str(value))
    return number if math.isfinite(number) else None


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; empty if there is none.

    A last line that was cut off (by a crash, a full disk) is left out. Raises `UserError` with
    every other line that is not a record.
    """
    path = epath.Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the folder") from None
    # Every whole line ends in a line feed, so what follows the last one is empty or cut off.
    records, problems = [], []
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is int and 0 <= step < 2**53:
            records.append(record)
        else:
            problems.append(f"{path}:{number}: is not a JSON object with a step; remove the line")
    raise_if(problems)
    return records


class MetricsWriter:
    """Appends to `workdir`/metrics.jsonl, one line a step, on disk as soon as it is written.

    `step`: the step the run goes on from. Later lines, written before the run was cut off, are
    dropped, so that the file becomes what an uninterrupted run would have written. `kept`: the
    records before. `write`: False for a process that leaves writing to another.

    An object store (`gs://`) cannot append: there the file is written anew, at most every
    `STORE_SECONDS`, and by `flush`, which belongs before a checkpoint: what a crash then loses is
    what the resumed run measures again.
    """

    def __init__(self, workdir: str | os.PathLike, step: int = 0, *, write: bool = True):
        self.path = epath.Path(workdir) / FILE
        self.kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        self._lines = self._file = None
        if not write:
            return
        with atomic_file(self.path) as file:
            file.writelines(map(_line, self.kept))
        self._last = self.kept[-1]["step"] if self.kept else 0
        if is_remote(self.path):
            self._lines, self._stored = list(map(_line, self.kept)), time.monotonic()
            return
        try:
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._end = self._file.seek(0, os.SEEK_END)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a record; `record["step"]` must be above the last one's."""
        if self._file is None and self._lines is None:
            return
        if record["step"] <= self._last:
            raise ValueError(f"metrics of step {record['step']} after those of {self._last}")
        line = _line(record)
        if self._lines is not None:
            self._lines.append(line)
            self._last = record["step"]
            if time.monotonic() - self._stored > STORE_SECONDS:
                self.flush()
            return
        try:
            done = 0
            while done < len(line):
                done += self._file.write(line[done:])
        except OSError as error:
            # Half a line in the middle would spoil the file once there is space again.
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise disk_error(error, self.path) from error
        self._end += len(line)
        self._last = record["step"]

    def flush(self) -> None:
        """Returns when every record is stored."""
        if self._lines is not None:
            with atomic_file(self.path) as file:
                file.writelines(self._lines)
            self._stored = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _line(record: Mapping[str, Any]) -> bytes:
    values = {name: plain(value) for name, value in record.items()}
    return json.dumps(values, allow_nan=False).encode() + b"\n"


class StepTimer:
    """Time of steps. The first one, in which the program is compiled, does not count as typical."""

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._since = clock()
        self._window: deque[float] = deque(maxlen=window)
        self._first = True

    def tick(self) -> float:
        """Seconds since the last tick (or skip): a step has ended."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        if not self._first:
            self._window.append(seconds)
        self._first = False
        return seconds

    def skip(self) -> None:
        """Begins the next step now: what came before (samples, saving) is not a part of it."""
        self._since = self._clock()

    @property
    def typical(self) -> float | None:
        """Median of the last steps: a new size's compilation weighs little. None at first."""
        return statistics.median(self._window) if self._window else None


class Progress:
    """One line about the run: in place on a terminal, else a new line every `every` seconds.

    `quiet`: nothing at all, in a process that leaves printing to another.
    """

    def __init__(
        self,
        total: int,
        timer: StepTimer,
        *,
        stream: TextIO | None = None,
        every: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ):
        self.quiet = quiet
        self.total = total
        self._timer = timer
        self._stream = sys.stdout if stream is None else stream
        self._in_place = self._stream.isatty()
        self._every = (0.2 if self._in_place else 10.0) if every is None else every
        self._clock = clock
        self._printed: float | None = None
        self._shown = 0

    def update(self, step: int, loss: float, gap: float, images: int) -> None:
        """Tells that `step` of `total` has ended, with the images in it."""
        if self.quiet:
            return
        now = self._clock()
        due = self._printed is None or now - self._printed >= self._every
        if not due and step < self.total:
            return
        self._printed = now
        line = self._text(step, float(loss), float(gap), images)
        if self._in_place:
            self._stream.write("\r" + line.ljust(self._shown))
            self._shown = len(line)
        else:
            self._stream.write(line + "\n")
        if step >= self.total:
            self._end_line()
        self._stream.flush()

    def note(self, text: str) -> None:
        """Prints a line of its own."""
        if self.quiet:
            return
        self._end_line()
        self._stream.write(text + "\n")
        self._stream.flush()

    def _end_line(self) -> None:
        if self._shown:
            self._stream.write("\n")
            self._shown = 0

    def _text(self, step: int, loss: float, gap: float, images: int) -> str:
        width = len(str(self.total))
        parts = [f"step {step:{width}d}/{self.total}", f"loss {loss:.5g}", f"gap {gap:.5g}"]
        typical = self._timer.typical
        if typical is None:
            parts.append("compiled" if step < self.total else "done")
        else:
            parts.append(f"{images / typical:.3g} images/s" if typical else "")
            left = (self.total - step) * typical
            parts.append(f"{duration(left)} left" if step < self.total else "done")
        return "  ".join(part for part in parts if part)
