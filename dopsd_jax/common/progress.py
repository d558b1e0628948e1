"""How much of a long piece of work is done, and how long the rest takes: one line."""

import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")
LINE_SECONDS = 10.0  # between two lines; on a terminal, where one line is written over: 0.2
TOGETHER = 0.02  # seconds: items that come this close to each other were made together
BATCH_SECONDS = 1.0  # no batch lasts longer after its first item
CLEAR = "\r\x1b[K"  # back to the start of a terminal's line, and empties it
WINDOW = 50  # the time left is judged by this many of the last batches


class Progress:
    """Counts items of work and prints a line from time to time.

    Items often come in batches, and the first batch waits for the compilation of its program. So
    the time left is that of an item, the median over batches without the first one; it is not shown
    before there are two batches.

    what: begins the line. total: items. done: items that an earlier run did. unit: writes a number
    of items. rate: writes items per second; None: not written. every: seconds between lines, 0: a
    line for each call of `advance`; None: in place on a terminal, else every `LINE_SECONDS`.
    quiet: nothing is printed, as in all processes but one.
    """

    def __init__(
        self,
        what: str,
        total: int = 0,
        *,
        done: int = 0,
        unit: Callable[[int], str] = str,
        rate: Callable[[float], str] | None = None,
        every: float | None = None,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.done, self.quiet = what, total, done, quiet
        self._unit, self._rate, self._clock = unit, rate, clock
        self._stream = sys.stdout if stream is None else stream
        self._in_place = every is None and self._stream.isatty()
        self._every = (0.2 if self._in_place else LINE_SECONDS) if every is None else every
        self._last = self._printed = clock()
        self._open = False  # whether a line without its end is on the terminal
        self._batch: tuple[float, int] | None = None  # seconds and items of the present one
        self._opened = self._last  # when its first item came
        self._first = True
        self._paces: deque[float] = deque(maxlen=WINDOW)  # seconds per item

    def start(self, total: int) -> None:
        """The work begins now, and has `total` items."""
        self.total, self._last = total, self._clock()

    def skip(self) -> None:
        """What happened since the last item is not a part of the work."""
        self._last = self._clock()

    def advance(self, items: int = 1, text: str = "") -> float:
        """So many more items are done; the seconds they took. `text` is shown in the line."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        self.done += items
        if self._batch and seconds <= TOGETHER and now - self._opened <= BATCH_SECONDS:
            self._batch = self._batch[0] + seconds, self._batch[1] + items
        else:
            if self._batch and not self._first and self._batch[1]:
                self._paces.append(self._batch[0] / self._batch[1])
            self._first, self._batch, self._opened = self._batch is None, (seconds, items), now
        if not self.quiet and (now - self._printed >= self._every or self.done >= self.total):
            self._printed = now
            self._print(text)
        return seconds

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, counted as they pass."""
        for item in items:
            yield item
            self.advance()

    def note(self, text: str) -> None:
        """Prints a line of its own."""
        if not self.quiet:
            self._write("\n" * self._open + f"{text}\n")
            self._open = False

    @property
    def left(self) -> float | None:
        """Seconds until all is done; None as long as nothing is known."""
        return (self.total - self.done) * statistics.median(self._paces) if self._paces else None

    def _print(self, text: str) -> None:
        total, left = self._unit(self.total), self.left
        parts = [f"{self.what} {self._unit(self.done):>{len(total)}}/{total}", text]
        if self._rate and self._paces and (pace := statistics.median(self._paces)) > 0:
            parts.append(self._rate(1 / pace))
        if left is not None and self.done < self.total:
            parts.append(f"{duration(left)} left")
        line = "  ".join(filter(None, parts))
        if not self._in_place:
            return self._write(f"{line}\n")
        line = line[: shutil.get_terminal_size().columns - 1]
        self._open = self.done < self.total
        self._write(f"{CLEAR}{line}" + "\n" * (not self._open))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


SILENT = Progress("", quiet=True)


def byte_progress(what: str, **options) -> Progress:
    """Progress of bytes that are read or written; `start` tells it how many."""
    return Progress(what, unit=size, rate=lambda speed: f"{size(speed)}/s", **options)


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


def size(nbytes: float) -> str:
    """Bytes for people: 12.31 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.2f} {unit}" if unit != "bytes" else f"{int(nbytes)} bytes"
        nbytes /= 1000
    raise AssertionError("the loop returns")
