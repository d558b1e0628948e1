"""How long a start takes, by part: from the command to the end of the first step."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from etils import epath

from dopsd_jax.common.atomic import write_text

T = TypeVar("T")
FILE = "start.json"  # in the work directory: of the last start


class StartParts:
    """Seconds of the parts of a start, which follow each other.

    beside: of what was done meanwhile, in threads.

    age: of the process when this is made, with its imports. clock: for tests.
    """

    def __init__(self, age: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._last = clock, clock()
        self.seconds = {"imports": age}
        self.beside: dict[str, float] = {}

    def end(self, name: str) -> None:
        """The part `name` ends now; what comes next belongs to another."""
        now = self._clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def describe(self) -> str:
        """One line."""
        parts = [f"{name} {seconds:.1f} s" for name, seconds in self._all().items()]
        return f"start: {sum(self.seconds.values()):.1f} s: {', '.join(parts)}"

    def _all(self) -> dict[str, float]:
        beside = {f"{name} (beside the above)": n for name, n in self.beside.items() if n}
        return self.seconds | beside

    def write(self, workdir: epath.Path) -> None:
        """Writes start.json: seconds by part."""
        rounded = {name: round(seconds, 3) for name, seconds in self._all().items()}
        write_text(workdir / FILE, json.dumps(rounded, indent=2) + "\n")


def process_age() -> float:
    """Seconds since this process began; 0 where the system does not tell, as Linux does."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            begun = int(file.read().rpartition(")")[2].split()[19])  # field 22 of proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - begun / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


class Waits(Generic[T]):
    """The same items; `seconds`: how long the last one was waited for."""

    def __init__(self, items: Iterable[T], clock: Callable[[], float] = time.monotonic):
        self._items, self._clock, self.seconds = iter(items), clock, 0.0

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        begin = self._clock()
        item = next(self._items)
        self.seconds = self._clock() - begin
        return item
