"""One program at a time in a folder.

    lock.json    who is at work: host, process, since when; removed when it ends

On file systems that have locks, the operating system holds one for the process and drops it when
the process ends, however it ends. Where they have none, or when the lock is of another machine, a
running process is known by the modification time of the file, which it renews.
"""

import contextlib
import fcntl
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from dopsd_jax.common import processes
from dopsd_jax.common.atomic import disk_error, is_remote, remove_leftovers
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_files import parse_json
from dopsd_jax.parallel import multihost

FILE = "lock.json"
BEAT_SECONDS = 5.0  # between two renewals
WATCH_SECONDS = 16.0  # without a renewal: the process on the other machine has ended


@contextlib.contextmanager
def exclusive(
    folder: epath.PathLike, what: str, *, file: str = FILE, say: Callable[[str], None] = print
) -> Iterator[None]:
    """A block during which no other process is in an `exclusive` block for this folder.

    The folder is made, and removed again if it stays empty. `what`: the program, for messages;
    `file`: another name, for programs that may share a folder. Raises `UserError` naming the
    process that is at work there. A lock whose process has ended never blocks; one of another
    machine costs `WATCH_SECONDS`.
    """
    folder = epath.Path(folder)
    if is_remote(folder):
        say(f"{folder}: an object store has no locks; do not start a second {what} there")
        yield
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, locks = _take(folder / file, say)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another") from None
    if not locks:
        say(f"{folder}: this file system has no locks; do not start a second {what} there")
    content = json.dumps(_self() | {"what": what}, indent=1) + "\n"
    try:
        os.truncate(handle, 0)
        os.pwrite(handle, content.encode(), 0)
    except OSError as error:
        (folder / file).unlink(missing_ok=True)
        os.close(handle)
        raise disk_error(error, folder / file) from error
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            os.utime(handle)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        (folder / file).unlink(missing_ok=True)
        os.close(handle)
        if made and not any(folder.iterdir()):
            folder.rmdir()


@contextlib.contextmanager
def exclusive_run(folder: epath.PathLike, what: str) -> Iterator[None]:
    """`exclusive` for all processes of one run: the first one holds the lock.

    What writers that were killed left in the folder is removed.
    """
    with contextlib.ExitStack() as stack:
        with multihost.together():
            if multihost.is_first():
                stack.enter_context(exclusive(folder, what))
                if not is_remote(folder):
                    inside = (path for path in epath.Path(folder).iterdir() if path.is_dir())
                    remove_leftovers(folder, *inside)
        yield


def _take(path: epath.Path, say: Callable[[str], None]) -> tuple[int, bool]:
    """An open file that is ours alone, and whether a lock of the file system guarantees that."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UserError(f"{path}: is a device or a pipe, not a file; remove it")
        locked, owner = _lock(handle), _read(handle)
        alive = _alive(owner) if owner else locked is False
        if (locked is False and alive is not False) or (locked is None and alive):
            raise UserError(
                f"{path.parent}: is in use by {_who(owner)}; wait until it has ended, stop it, or "
                "use another folder"
            )
        if locked is False:
            path.unlink(missing_ok=True)  # held by a child that outlived its process
        elif _is_at(handle, path):  # and not removed by another process meanwhile
            if alive is None:
                _watch(path, owner, say)
            return handle, locked is True
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return _take(path, say)


def _lock(handle: int) -> bool | None:
    """Whether the system's lock is ours now; None where the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _watch(path: epath.Path, owner: dict[str, Any], say: Callable[[str], None]) -> None:
    """Returns if the process of another machine has ended; raises `UserError` if it works."""
    say(
        f"{path.parent}: was in use by {_who(owner)}; watching for {WATCH_SECONDS:.0f} s whether "
        "it still works"
    )
    first, end = _stamp(path), time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(0.5)
        if _stamp(path) != first:
            raise UserError(
                f"{path.parent}: is in use by {_who(owner)}; wait until it has ended, or stop it"
            )


def _stamp(path: epath.Path) -> tuple[int, int]:
    with open(path, "rb") as file:  # opened anew: only then a network file system asks its server
        status = os.fstat(file.fileno())
        return status.st_mtime_ns, status.st_ino


def _self() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "process": pid,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "place": processes.place(),
        "started": processes.started(pid),
    }


def _alive(owner: dict[str, Any]) -> bool | None:
    """Whether the process that wrote the lock still runs; None if it is not of this machine."""
    process = owner.get("process")
    if owner.get("place") != processes.place() or type(process) is not int or process < 1:
        return None
    return processes.runs(process, owner.get("started"))


def _read(handle: int) -> dict[str, Any]:
    try:
        content = parse_json(os.pread(handle, 1 << 16, 0), FILE)
    except UserError:
        return {}  # its process ended, or another one takes it, before there was anything
    return content if isinstance(content, dict) else {}


def _is_at(handle: int, path: epath.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _who(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    host, process, since, what = (owner.get(name) for name in ("host", "process", "since", "what"))
    return f"process {process} on {host} ({what}, since {since})"
