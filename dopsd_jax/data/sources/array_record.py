"""Layout: `.array_record` files; each record is a line of JSON with captions, then a picture."""

import functools
import os
from pathlib import Path

from dopsd_jax.common.atomic import partial_of, remove_leftovers
from dopsd_jax.common.errors import MAX_PROBLEMS, UserError
from dopsd_jax.data.blobs import (
    RECORDS,
    array_record_module,
    join_record,
    open_records,
    split_record,
)
from dopsd_jax.data.sources import archives
from dopsd_jax.data.sources.archives import AGAIN, Entry, Index, given_up
from dopsd_jax.data.sources.captions import json_captions
from dopsd_jax.data.sources.layout import Layout, Options


def _read_records(path: Path, options: Options) -> Index:
    """Records as `blobs.join_record` makes them; caption options are for tar files."""
    del options
    entries, problems = [], []
    try:
        reader = open_records(str(path))
        count = reader.num_records() if reader.ok() else 0
    except (RuntimeError, ValueError):
        count = 0
    if not count:
        return Index([], [f"{path}: is no ArrayRecord file, is empty or truncated; {AGAIN}"])
    for number in range(count):
        where = f"{path}:{number}"
        try:
            (record,) = reader.read([number])
        except (RuntimeError, ValueError) as error:
            texts, picture, fault = {}, b"", f"is damaged ({error})"
        else:
            header, picture = split_record(record)
            texts, fault = json_captions(header)
            if not fault and not picture:
                fault = "holds no picture behind its line of JSON"
        if fault:
            problems.append(f"{where}: {fault}; {AGAIN}")
            if len(problems) == MAX_PROBLEMS:
                return given_up(path, problems)
        else:
            entries.append(Entry(str(number), number, len(picture), list(texts.items())))
    return Index(entries, problems)


def write_array_record(path: str | os.PathLike, rows) -> None:
    """Writes rows (captions by key, bytes of a picture file) as an `.array_record` file."""
    path = Path(path)
    if path.suffix != RECORDS:
        raise UserError(f"{path}: must end in {RECORDS}")
    remove_leftovers(path.parent, name=path.name)
    partial = partial_of(path)
    # Pictures are compressed already; groups of one make a random read cost one record.
    writer = array_record_module().ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    try:
        for captions, picture in rows:
            writer.write(join_record(captions, picture))
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


LAYOUT = Layout(
    "ArrayRecord files",
    functools.partial(archives.matches, suffixes=(RECORDS,)),
    functools.partial(archives.read_archives, suffix=RECORDS, read=_read_records),
)
