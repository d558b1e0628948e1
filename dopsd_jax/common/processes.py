"""Which process wrote something, and whether it still runs."""

import contextlib
import os
import socket
from pathlib import Path


def place() -> str:
    """Names the machine, or its container, within which process numbers are unique."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def started(pid: int) -> str | None:
    """Start time of a process, in units of the system; None if it is unknown."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def runs(pid: int, since: str | None) -> bool:
    """Whether the process `pid` of this machine that began at `since` still runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return started(pid) == since
