"""Work in a thread that a process does not wait for when it ends."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import ClassVar


class Background:
    """`action()` in a thread, from now on. seconds: how long it took, once it is done.

    The thread is told nothing of the end of the process. One that is then inside of a compiler
    cannot be stopped: see `leave_if_busy`.
    """

    _busy: ClassVar[set["Background"]] = set()

    def __init__(self, action: Callable[[], None]):
        self.seconds, self._error = 0.0, None
        self._action, self._done = action, threading.Event()
        self._busy.add(self)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        begin = time.monotonic()
        try:
            self._action()
        except BaseException as error:
            self._error = error
        finally:
            self.seconds = time.monotonic() - begin
            self._busy.discard(self)
            self._done.set()

    def wait(self) -> None:
        """Returns when it is done; raises what it has raised. Signals are handled meanwhile."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    @classmethod
    def leave_if_busy(cls, status: int) -> None:
        """Ends the process at once if any is at work.

        Else a program that was interrupted would stay until its compiler is done, or crash when
        the libraries' memory is taken from under the thread.
        """
        if cls._busy:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
