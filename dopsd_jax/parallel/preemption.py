"""Stopping after SIGTERM or Ctrl-C, at a step on which all processes agree."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

from dopsd_jax.parallel import multihost

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
STOPPED_EXIT = 75


def leave_at_once(line: str) -> None:
    """From now on SIGTERM ends this process with `line`: for programs that lose little by it.

    With many processes jax's preemption service would take it, and tell nobody.
    """
    signal.signal(signal.SIGTERM, lambda *_: multihost.leave(STOPPED_EXIT, line))


class StopRequest:
    """Inside its block SIGTERM and the first SIGINT only request a stop; a second SIGINT ends it.

    With many processes jax's preemption service watches for SIGTERM, from `jax.distributed` on: a
    signal to any one of them stops all at one step.
    """

    def __init__(self):
        self.signal: str | None = None

    def __enter__(self) -> "StopRequest":
        signals = [signal.SIGINT]
        if jax.process_count() == 1:
            signals.append(signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            multihost.leave(130, "interrupted")  # without waiting for a save under way
        self.signal = signal.Signals(number).name
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)  # to the preemption service, which tells the others

    def reached(self, step: int) -> bool:
        """Whether to stop after this step. Every process asks after every step."""
        if jax.process_count() == 1:
            return self.signal is not None
        return multihost_utils.reached_preemption_sync_point(step)
