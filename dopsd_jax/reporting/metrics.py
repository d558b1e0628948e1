"""What a run measured: metrics.jsonl, one JSON object per step."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dopsd_jax.common.atomic import atomic_file, disk_error, is_remote
from dopsd_jax.common.errors import MAX_PROBLEMS, UserError, raise_if
from dopsd_jax.common.files import open_regular
from dopsd_jax.common.json_files import parse_json

FILE = "metrics.jsonl"
MAX_LINE = 1 << 20  # bytes
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
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
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
        if not path.exists():
            return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the folder") from None
    records, problems = [], []
    with open_regular(path) as file:
        lines = iter(lambda: file.readline(MAX_LINE), b"")
        for number, line in enumerate(lines, 1):
            try:
                record = parse_json(line, "", finite=False)
            except UserError:
                record = None
            step = record.get("step") if isinstance(record, dict) else None
            # Every whole line ends in a line feed; one that does not was cut off.
            if line.endswith(b"\n") and type(step) is int and 0 <= step < 2**53:
                records.append(record)
            elif line.endswith(b"\n") or len(line) == MAX_LINE:
                problems.append(
                    f"{path}:{number}: is not a JSON object with a step; remove the line"
                )
            if len(problems) == MAX_PROBLEMS:
                break
    raise_if(problems)
    return records


class MetricsWriter:
    """Appends to `workdir`/metrics.jsonl, one line a step, on disk as soon as it is written.

    `step`: the step the run goes on from. Later lines, written before the run was cut off, are
    dropped, so that the file becomes what an uninterrupted run would have written. `kept`: the
    records before. `write`: False for a process that leaves writing to another.

    An object store (`gs://`) cannot append: there the file is written anew, at most every
    `STORE_SECONDS`, and by `flush`, which is called before a checkpoint: a crash then loses only
    records that the resumed run writes again. Where that fails between two checkpoints, a line
    goes to `say`, and it is tried again.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        step: int = 0,
        *,
        write: bool = True,
        say: Callable[[str], None] = print,
    ):
        self._say = say
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
                try:
                    self.flush()
                except (UserError, OSError) as error:
                    self._stored = time.monotonic()
                    self._say(f"{error}; it is tried again")
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
