"""Layout: `.parquet` files as Hugging Face data sets are published: pictures beside their captions.

A column of pictures holds the bytes of picture files, alone or as `bytes` of a structure; every
column of text may be a caption. Needs pyarrow.
"""

import collections
from pathlib import Path
from typing import Any

from dopsd_jax.common.errors import MAX_PROBLEMS
from dopsd_jax.data.blobs import PARQUET, bytes_in, parquet_faults, parquet_module, place_of
from dopsd_jax.data.sources import archives
from dopsd_jax.data.sources.archives import AGAIN, Entry, Index, given_up
from dopsd_jax.data.sources.captions import CONCEPT, captions_of, concept_of
from dopsd_jax.data.sources.collector import Collector, listing
from dopsd_jax.data.sources.files import IMAGE_SUFFIXES
from dopsd_jax.data.sources.layout import Layout, Options

MAX_GROUP = 4 << 30  # bytes of the rows that are read together


def _home(path: Path) -> Path:
    """The folder that the files are in: on the hub it is `data`."""
    inside = path / "data"
    return inside if inside.is_dir() and not archives.matches(path, (PARQUET,)) else path


def matches(path: Path) -> bool:
    # Beside pictures, it is another program's table of these.
    found = archives.matches(_home(path), (PARQUET,))
    return found and not archives.matches(path, IMAGE_SUFFIXES)


def read(path: Path, options: Options) -> Collector:
    parquet_module()
    home = _home(path)
    into = archives.read_archives(home, options, PARQUET, _read_file)
    if home != path:
        into.notes.append(f"{path}: its rows are those of {home.name}/; nothing else is used")
    files = archives.archives_at(home, PARQUET)
    splits = dict.fromkeys(file.name.partition("-")[0] for file in files)
    if len(splits) > 1:
        into.notes.append(
            f"{path}: the rows of {listing(splits)} are used together; a pattern such as "
            f"{files[0].parent}/{next(iter(splits))}-*.parquet takes some of them"
        )
    return into


def _read_file(path: Path, options: Options) -> Index:
    entries, problems = [], []
    try:
        with parquet_module().ParquetFile(path) as file:
            column, fault = _picture_column(file.schema_arrow, options.image_key)
            sizes = [file.metadata.row_group(g).total_byte_size for g in range(file.num_row_groups)]
            if max(sizes, default=0) > MAX_GROUP:
                fault = f"has groups of more than {MAX_GROUP >> 30} GiB; {AGAIN} with smaller ones"
            if fault:
                return Index([], [f"{path}: {fault}"])
            texts = [f.name for f in file.schema_arrow if str(f.type) in ("string", "large_string")]
            more = [name for name in file.schema_arrow.names if name == CONCEPT]
            number = 0
            for group in range(file.num_row_groups):
                rows = file.read_row_group(
                    group, columns=list(dict.fromkeys([column, *texts, *more]))
                )
                for offset in range(rows.num_rows):
                    name, picture = f"{column}[{number}]", bytes_in(rows[column][offset].as_py())
                    record = {key: rows[key][offset].as_py() for key in (*texts, *more)}
                    captions, faults = captions_of(record, [key for key in texts if key != CONCEPT])
                    concept, fault = concept_of(record)
                    captions |= concept
                    faults += [fault] * bool(fault) + ["holds no picture"] * (not picture)
                    problems += [f"{path}:{name}: {fault}; {AGAIN}" for fault in faults]
                    if len(problems) >= MAX_PROBLEMS:
                        return given_up(path, problems)
                    place = place_of(group, offset)
                    entries.append(Entry(name, place, len(picture), list(captions.items())))
                    number += 1
    except parquet_faults() as error:
        return Index([], [f"{path}: is no Parquet file, or is damaged ({error}); {AGAIN}"])
    return Index(entries, problems)


def _picture_column(schema: Any, image_key: str) -> tuple[str, str | None]:
    """The column of pictures, and what is wrong."""
    twice = [name for name, times in collections.Counter(schema.names).items() if times > 1]
    if twice:
        return "", f"has several columns {listing(map(repr, twice))}; keep one of each"
    found = [field.name for field in schema if _holds_bytes(field.type)]
    there = f"its columns are {listing(map(repr, schema.names))}"
    if image_key:
        fault = None if image_key in found else f"has no pictures in {image_key!r} ({there})"
        return image_key, fault and f"{fault}; correct data.image_key"
    if len(found) == 1:
        return found[0], None
    what = f"has pictures in {listing(found)}" if found else f"holds no pictures ({there})"
    return "", f"{what}; name their column in data.image_key"


def _holds_bytes(kind: Any) -> bool:
    """Whether cells of a column are bytes, alone or as the only `bytes` of a structure."""
    if str(kind).startswith("struct<"):
        at = kind.get_field_index("bytes")  # -1 also where there are several
        kind = kind.field(at).type if at >= 0 else None
    return str(kind) in ("binary", "large_binary")


LAYOUT = Layout("Parquet files", matches, read)
