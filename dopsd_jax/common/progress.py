"""How far a long piece of work is: a line from time to time, with the time left."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
EVERY = 5.0  # seconds between two lines
TOGETHER = 0.02  # seconds: items that come this close to each other were made together
WINDOW = 50  # the pace is that of so many of the last batches


def say(text: str) -> None:
    """Prints a line at once, also where the output is a file."""
    print(text, flush=True)


def duration(seconds: float) -> str:
    """43 s, 12:05 (minutes), 3:20:00 (hours), 2 d 03:20."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{hours // 24} d {hours % 24:02d}:{minutes:02d}"


class Countdown:
    """Counts items of work; says from time to time how many are done and how long the rest takes.

    Items often come in batches, and the first batch of a shape takes long because its program is
    compiled. So the time left is the median time of an item, by batches, without the first one; it
    is not told before there are two batches to measure.
    """

    def __init__(
        self,
        what: str,
        total: int,
        report: Callable[[str], None] = say,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.done = what, total, 0
        self._report, self._clock = report, clock
        self._last = self._said = clock()
        self._batch: tuple[float, int] | None = None  # seconds and items of the present one
        self._paces: deque[float] = deque(maxlen=WINDOW)
        self._first = True

    def advance(self, items: int = 1) -> None:
        """So many more items are done."""
        now = self._clock()
        if self._batch is None or now - self._last > TOGETHER:
            if self._batch is not None and not self._first:
                seconds, count = self._batch
                self._paces.append(seconds / count)
            self._first = self._batch is None
            self._batch = now - self._last, items
        else:
            self._batch = self._batch[0], self._batch[1] + items
        self._last, self.done = now, self.done + items
        if now - self._said > EVERY or self.done == self.total:
            self._said = now
            left = self.left
            told = "" if left is None or self.done == self.total else f", {duration(left)} left"
            self._report(f"{self.what}: {self.done}/{self.total}{told}")

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, counted as they pass."""
        for item in items:
            yield item
            self.advance()

    @property
    def left(self) -> float | None:
        """Seconds until all is done; None as long as there is nothing to judge by."""
        return (self.total - self.done) * statistics.median(self._paces) if self._paces else None
