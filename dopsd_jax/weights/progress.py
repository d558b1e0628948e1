"""How far a long reading or writing has come."""

import sys
import time
from typing import TextIO


class Progress:
    """Told of bytes that are done; this one keeps it to itself."""

    def start(self, total: int) -> None:
        """`total` bytes are to come."""

    def advance(self, name: str, nbytes: int) -> None:
        """`nbytes` more are done; they belonged to `name`."""


SILENT = Progress()


class ConsoleProgress(Progress):
    """A line with size, speed and time left; redrawn on a terminal, else one every ten seconds."""

    def __init__(self, stream: TextIO = sys.stderr):
        self.stream, self.live = stream, stream.isatty()
        self.interval = 0.2 if self.live else 10.0
        self.total = self.done = 0
        self.began = self.shown = time.monotonic()

    def start(self, total: int) -> None:
        self.total, self.done = total, 0
        self.began = self.shown = time.monotonic()

    def advance(self, name: str, nbytes: int) -> None:
        self.done += nbytes
        now, finished = time.monotonic(), self.done >= self.total
        if now - self.shown < self.interval and not finished:
            return
        self.shown = now
        speed = self.done / max(now - self.began, 1e-6)
        left = max(self.total - self.done, 0) / max(speed, 1)
        text = (
            f"{size(self.done)} of {size(self.total)}, {size(speed)}/s, "
            f"{int(left // 60)}:{int(left % 60):02d} left, {name}"
        )
        end = "\n" if finished or not self.live else ""
        print(f"\r{text[:110]:<110}" if self.live else text, end=end, file=self.stream, flush=True)


def size(nbytes: float) -> str:
    """Bytes for people: 12.31 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.2f} {unit}" if unit != "bytes" else f"{int(nbytes)} bytes"
        nbytes /= 1000
    raise AssertionError("the loop returns")
