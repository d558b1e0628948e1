"""Which process wrote something, and whether it still runs."""

import contextlib
import os
import socket
from pathlib import Path


def place() -> str:
    """Where process numbers mean the same: a machine, or a container of one."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def started(pid: int) -> str | None:
    """When a process began, in the system's own count; None where that is not known."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def runs(pid: int, since: str | None) -> bool:
    """Whether the process `pid` of this place that began at `since` still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return started(pid) == since
