"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from dopsd_jax.common import processes
from dopsd_jax.common.errors import FULL, UserError, disk_full, is_utf8

# Faults of a disk that a user must mend. Others pass, as of a network's storage that is away for a
# moment: they stay a crash, after which a launcher starts the same command again.
_MENDED = (
    *(*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENODEV),
    *(errno.ENXIO, errno.ENOTSUP, errno.EXDEV, errno.EMFILE, errno.ENFILE),
)
NOT_UTF8 = "is not a name in UTF-8; rename it"
MAX_NAME = 255  # bytes of a name, on all usual file systems
ROOM = 80  # bytes for what `partial_of` adds
ABANDONED = 24 * 3600.0  # seconds after which no other machine writes a file any more
_PARTIAL = re.compile(
    r"\.(?P<name>.+)\.partial-(?P<place>[0-9a-f]{8})-(?P<pid>\d{1,10})-(?P<since>\d+)-[0-9a-f]{8}",
    re.DOTALL,
)


def disk_error(error: OSError, path: str | os.PathLike) -> UserError | OSError:
    """What to raise when writing `path` failed; a `UserError` where the user must mend it."""
    if error.errno in FULL:
        return UserError(disk_full(path))
    why = f"cannot be written ({error.strerror or error})"
    passes = isinstance(error, TimeoutError | ConnectionError)
    if error.errno in _MENDED or (error.errno is None and not passes):
        return UserError(f"{path}: {why}; check the folder")
    return OSError(error.errno, why, str(path))


def make_folder(path: str | os.PathLike) -> None:
    """Makes a folder, with those that it lies in, where it is not there yet."""
    try:
        epath.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator:
    """A binary file that replaces `path` when the block ends without an error.

    An object store (`gs://`) has no rename, and a file appears there when it is closed: so the
    content goes to a local file first.
    """
    if is_remote(path):
        with _stored_file(epath.Path(path)) as file:
            yield file
        return
    path = Path(path)
    partial = partial_of(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # as when its name could not be made at all
            partial.unlink()


def partial_of(path: Path) -> Path:
    """The temporary file of `path`: beside it, with a name that identifies the writer."""
    pid = os.getpid()
    writer = f"{_place()}-{pid}-{processes.started(pid) or 0}"
    return path.with_name(f".{_short(path.name)}.partial-{writer}-{secrets.token_hex(4)}")


def _short(name: str) -> str:
    """A name that leaves room for more: of a long one the beginning and a digest.

    What is too long for a file of its own stays so, to be refused before anything is written.
    """
    whole = os.fsencode(name)
    if not MAX_NAME - ROOM < len(whole) <= MAX_NAME:
        return name
    digest = hashlib.sha256(whole).hexdigest()[:16]
    return f"{whole[: MAX_NAME - ROOM - 17].decode(errors='ignore')}-{digest}"


def remove_leftovers(*folders: str | os.PathLike, name: str = "") -> None:
    """Removes what writers that were killed left in `folders`; of the file or folder `name` alone.

    A writer that still runs keeps its own, as does one of another machine for a day.
    """
    for folder in folders:
        # A file that cannot be removed, or that another process removes now, does no harm.
        with contextlib.suppress(OSError):
            for path in () if is_remote(folder) else list(Path(folder).iterdir()):
                match = _PARTIAL.fullmatch(path.name)
                if match and _short(name) in ("", match["name"]) and not _in_use(path, match):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _in_use(path: Path, match: re.Match) -> bool:
    if match["place"] == _place():
        since = match["since"]
        return processes.runs(int(match["pid"]), None if since == "0" else since)
    return time.time() - path.stat().st_mtime < ABANDONED


def _place() -> str:
    return f"{zlib.crc32(processes.place().encode()):08x}"


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path names an object in a store, such as gs://bucket/run, and not a file."""
    return "://" in str(path)


def path_fault(text: str, *, stores: bool = False) -> str | None:
    """What is wrong with text in the place of a path; with `stores`, gs:// may stand there too."""
    scheme, separator, _ = text.partition("://")
    if separator and not (stores and scheme == "gs"):
        return "is an address; name what is on this machine" + (", or gs://" if stores else "")
    if "\0" in text:
        return "must not contain a null character"
    return None if is_utf8(text) else NOT_UTF8


@contextlib.contextmanager
def _stored_file(path: epath.Path) -> Iterator:
    try:
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as target:
                shutil.copyfileobj(file, target, 1 << 22)
    except OSError as error:
        raise disk_error(error, path) from error


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, *, replace: bool = False) -> Iterator[Path]:
    """A folder that gets its name when the block ends without an error.

    Raises `UserError` if the name is taken, unless `replace`.
    """
    path = Path(path)
    if not replace:
        need_free(path)
    partial = partial_of(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            shutil.rmtree(path) if replace else path.rmdir()
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    except UserError as error:  # of a file inside, under the name that it was to have
        raise UserError(*(p.replace(str(partial), str(path)) for p in error.problems)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a small text file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def need_free(path: Path) -> None:
    """Raises `UserError` where something is already at `path`, other than an empty folder."""
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:  # such as a name that is too long
        raise disk_error(error, path) from None
    if taken:
        raise UserError(f"{path}: already there; give another name, or remove it")


def need_file(path: Path) -> None:
    """Raises `UserError` where no new file can be made at `path`."""
    need_free(path)
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give the name of a new file")
    if not os.path.isdir(path.parent):
        raise UserError(f"{path.parent}: no such folder; create it first")


def need_space(folder: str | os.PathLike, nbytes: int) -> None:
    """Raises `UserError` when the disk that will hold `folder` has less than `nbytes` free."""
    folder = Path(folder).absolute()
    while not os.path.exists(folder):
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise UserError(
            f"{folder}: {nbytes / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free; free some space"
        )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
