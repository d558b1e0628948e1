"""Reads files of others: a folder, a device or an endless file is refused first."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath

from dopsd_jax.common.atomic import is_remote
from dopsd_jax.common.errors import UserError

MAX_TEXT = 8 << 20  # bytes of a configuration: parsed JSON takes up to 30 times as much memory
BOM = b"\xef\xbb\xbf"  # to take it away by the codec takes several times as long
_SMALL = 1 << 14  # bytes


def expand(path: str | os.PathLike) -> Path:
    """The path with `~` as the home folder; `~name` of nobody is a name like others."""
    return Path(os.path.expanduser(path))


def can_enter(folder: str | os.PathLike) -> bool:
    """Whether a folder is there, and what is in it can be listed and opened."""
    try:
        with os.scandir(folder):
            return os.path.isdir(os.path.join(folder, "."))
    except (OSError, ValueError):
        return False


def open_regular(path: str | os.PathLike, advice: str = "check the path") -> BinaryIO:
    """Opens a file for reading. Raises `UserError` unless it is a regular file.

    The kind is looked at before the file is opened: opening a FIFO would wait for a writer. In an
    object store there are only files. `advice` says what to do about a file that is missing.
    """
    try:
        if is_remote(path):
            return epath.Path(path).open("rb")
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{path}: is a folder, a file is needed; name the file")
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: is a device or a pipe, not a file; name a file")
        # With a buffer of a given size nobody asks whether the file is a terminal.
        return open(path, "rb", _SMALL)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {advice}") from None
    except ValueError:  # a zero byte in the name
        raise UserError(f"{path}: is not a file name; {advice}") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); check its permissions") from None


@contextlib.contextmanager
def readable(path: str | os.PathLike) -> Iterator[None]:
    """What the block cannot read, `path` or something below it, is a `UserError` with its name."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise UserError(
            f"{where}: cannot be read ({error.strerror}); check its permissions"
        ) from error


@contextlib.contextmanager
def local_file(path: str | os.PathLike) -> Iterator[Path]:
    """The file itself, or while the block lasts a copy of what lies in a store (`gs://`).

    Raises `UserError` for one that cannot be read.
    """
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / epath.Path(path).name
        with open_regular(path) as source, open(copy, "wb") as file:
            shutil.copyfileobj(source, file)
        yield copy


def read_bytes(
    path: str | os.PathLike, limit: int = MAX_TEXT, advice: str = "check the path"
) -> bytes:
    """Content of a regular file of at most `limit` bytes. Raises `UserError`."""
    try:
        with open_regular(path, advice) as file:
            content = file.read(min(_SMALL, limit + 1))
            if len(content) == _SMALL:  # a buffer of the whole limit takes longer than most files
                content += file.read(limit + 1 - _SMALL)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > limit:
        raise UserError(f"{path}: is larger than {limit >> 20} MiB; is this the right file?")
    return content


def read_text(
    path: str | os.PathLike, limit: int = MAX_TEXT, advice: str = "check the path"
) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises `UserError`."""
    return decode(read_bytes(path, limit, advice), str(path))


def decode(content: bytes, where: str) -> str:
    """Text of bytes in UTF-8. Raises `UserError` naming `where` and the first wrong byte."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
