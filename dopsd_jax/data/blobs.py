"""Pictures inside archives: where their bytes are, and how to read them."""

import functools
import io
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dopsd_jax.common.errors import UserError

TAR, RECORDS, PARQUET = ".tar", ".array_record", ".parquet"
# Readers kept open; each thread has its own, since reading moves a position.
_OPEN = threading.local()
_KEPT = 16
_GROUPS = 2  # groups of rows of Parquet files that are kept in memory
_GROUP = 1 << 32  # rows, more than any group has


@dataclass(frozen=True, slots=True)
class Blob:
    """A picture inside an archive: its name, and the position and number of its bytes."""

    archive: Path
    name: str
    place: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"

    def open(self) -> BinaryIO:
        """Its bytes as a file. Raises `OSError`, or `UserError` where the archive has changed."""
        content = self.read()
        if len(content) != self.size:
            raise UserError(f"{self}: the archive has changed or is truncated; start again")
        return io.BytesIO(content)

    def read(self) -> bytes:
        raise NotImplementedError


class TarMember(Blob):
    """`place` is the offset of the first byte."""

    __slots__ = ()

    def read(self) -> bytes:
        with open(self.archive, "rb", buffering=0) as file:
            file.seek(self.place)
            return file.read(self.size)


class ArrayRecordEntry(Blob):
    """`place` is the number of the record: a line of JSON, then `size` bytes of picture."""

    __slots__ = ()

    def read(self) -> bytes:
        status = self.archive.stat()
        reader = _reader(str(self.archive), status.st_size, status.st_mtime_ns)
        try:
            (record,) = reader.read([self.place])
        except (ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"{self}: the record cannot be read ({error}); make it again") from None
        return split_record(record)[1]


class ParquetCell(Blob):
    """`place` is that of `place_of`; the name is COLUMN[ROW]."""

    __slots__ = ()

    def read(self) -> bytes:
        status, column = self.archive.stat(), self.name.rpartition("[")[0]
        group, offset = divmod(self.place, _GROUP)
        cells = _cells(str(self.archive), status.st_size, status.st_mtime_ns, group, column)
        return bytes_in(cells[offset].as_py()) if offset < len(cells) else b""


ARCHIVES = {TAR: TarMember, RECORDS: ArrayRecordEntry, PARQUET: ParquetCell}


def place_of(group: int, offset: int) -> int:
    """One number for a row of a Parquet file: of its group, and within that."""
    return group * _GROUP + offset


def bytes_in(cell: dict | bytes | None) -> bytes:
    """The bytes of a picture in a cell of a Parquet file; none if there are none."""
    return (cell.get("bytes") if isinstance(cell, dict) else cell) or b""


def parquet_module():
    """The library, which is not installed by itself."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            ".parquet files are read with pyarrow, which is not installed; pip install "
            "'dopsd_jax[parquet]', or unpack them to pictures and a metadata.jsonl"
        ) from None
    return pyarrow.parquet


def parquet_faults() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises; ValueError for text that is not UTF-8."""
    import pyarrow

    return (OSError, ValueError, pyarrow.ArrowException)


@functools.lru_cache(_GROUPS)
def _cells(path: str, size: int, mtime_ns: int, group: int, column: str):
    """One column of a group of rows of the file in its present state; they are stored together."""
    try:
        with parquet_module().ParquetFile(path) as file:
            return file.read_row_group(group, columns=[column])[column]
    except (*parquet_faults(), IndexError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); make it again") from None


def split_record(record: bytes) -> tuple[bytes, bytes]:
    """The line of JSON and the picture of an ArrayRecord record."""
    header, _, picture = record.partition(b"\n")
    return header, picture


def join_record(captions: dict, picture: bytes) -> bytes:
    """The inverse of `split_record`."""
    return json.dumps(captions, ensure_ascii=False).encode() + b"\n" + picture


def array_record_module():
    """The library, which comes with grain everywhere but on Windows."""
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise UserError(
            "array_record is not installed, so .array_record files cannot be read; pip install "
            "array_record, or use .tar files"
        ) from None
    return array_record_module


def _reader(path: str, size: int, mtime_ns: int):
    """A reader of the file in its present state."""
    if not hasattr(_OPEN, "readers"):
        _OPEN.readers = functools.lru_cache(_KEPT)(open_records)
    return _OPEN.readers(path, size, mtime_ns)


def open_records(path: str, size: int = 0, mtime_ns: int = 0):
    """Opens an ArrayRecord file for random access; `size` and `mtime_ns` only tell states apart."""
    options = "readahead_buffer_size:0,max_parallelism:0"
    return array_record_module().ArrayRecordReader(path, options)
