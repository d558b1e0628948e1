"""Layout: a table that names pictures and captions.

D-OPSD's `.jsonl`, a `.csv` with a header, a `.json` (a list of objects, or pictures' names with
their captions), or a folder with such a table (`metadata.jsonl`: Hugging Face "imagefolder").
"""

import collections
import csv
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dopsd_jax.common.atomic import is_remote
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import BOM, expand, open_regular
from dopsd_jax.common.json_fields import kind_of
from dopsd_jax.common.json_files import parse_json, read_json
from dopsd_jax.data.sources.captions import CAPTION_KEY, captions_of, concept_of, not_utf8
from dopsd_jax.data.sources.collector import Collector, Examples, listing
from dopsd_jax.data.sources.files import IMAGE_SUFFIXES, stem_of, walk
from dopsd_jax.data.sources.layout import Layout, Options
from dopsd_jax.data.sources.references import columns_of, of_record

SUFFIXES = (".jsonl", ".csv", ".tsv", ".json")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.json")
# Taken for a table only where no caption files are: other programs leave them beside those.
CAPTIONS = ("captions.jsonl", "captions.csv", "captions.tsv", "captions.json")

# Tried in this order; the first one that is present and not empty is used.
PATH_LISTS = ("local_path_list", "local_paths", "image_path_list", "image_paths")
PATH_STRINGS = ("image_path", "path", "file_name", "image", "target_image")
REMOTE_LIST = "oss_path_list"  # used upstream when its entries are local
PATH_KEYS = (*PATH_LISTS, *PATH_STRINGS, REMOTE_LIST)

SIZE_KEYS = ("h*w", "w*h")
_SIZE = re.compile(r"\s*(\d{1,7})\s*\*\s*(\d{1,7})\s*")
MAX_LINE = 16 << 20  # bytes
MAX_JSON = 256 << 20  # bytes of a table that is one JSON value; a .jsonl has no limit

SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
QUOTES = "a field that begins with a quote must end with one"

# Number and object of a row; a string in the object's place says what is wrong with it.
NumberedRow = tuple[int, dict | str]


def matches(path: Path) -> bool:
    return bool(_tables(path))


def read(path: Path, options: Options) -> Collector:
    """The rows of the table that `path` is or holds, good ones and faults.

    Relative pictures are looked for in the folder of the table, then in `data_root`.
    """
    tables = _tables(path)
    if len(tables) > 1:
        names = listing(table.relative_to(path) for table in tables)
        if len({table.parent for table in tables}) == 1:
            raise UserError(f"{path}: has both {names.replace(', ', ' and ')}; remove one")
        raise UserError(f"data.path {path}: holds {names}; give one of these folders")
    (table,) = tables
    into = options.collector(table, "lines")
    if table.parent not in (path, path.parent):
        into.notes.append(f"{path}: its rows are those of {table.relative_to(path)}")
    _read_table(table, options, into)
    if path.is_dir() and not into.problems:
        _note_unlisted(path, table, into)
    return into


def _tables(path: Path) -> list[Path]:
    """The tables that `path` means."""
    if not path.is_dir():
        return [path] if path.suffix.lower() in SUFFIXES and path.exists() else []
    tables = [path / name for name in METADATA if (path / name).is_file()]
    if tables:
        return tables
    names = os.listdir(path)
    if not any(name.lower().endswith((".txt", ".caption")) for name in names):
        tables = [path / name for name in CAPTIONS if (path / name).is_file()]
    if not tables and not any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        inside = (
            Path(where, name) for where, files in walk(path) for name in METADATA if name in files
        )
        tables = list(inside)
    return tables


def _read_table(path: Path, options: Options, into: Collector) -> None:
    suffix = path.suffix.lower()
    readers: dict[str, Callable] = {".jsonl": _json_lines, ".json": _json_rows}
    roots = [str(path.parent)]
    if options.data_root:
        roots.append(str(expand(options.data_root)))
    bad_sizes = Examples()
    for number, found in readers.get(suffix, _csv_rows)(path):
        if isinstance(found, str):
            into.problem(f"{path}:{number}: {found}")
            continue
        into.fields = into.fields or tuple(found)
        image, before, fault = _image(found, roots, options)
        faults, references = [fault] if fault else [], []
        if options.references:
            find = lambda name: _find(name, roots)
            references, wrong = of_record(found, options.references, before, find)
            faults += wrong
        texts, text_faults = captions_of(found, into.keys)
        concept, fault = concept_of(found)
        texts |= concept
        faults += text_faults + [fault] * bool(fault)
        for fault in faults:
            into.problem(f"{path}:{number}: {fault}")
        size, sound = _declared_size(found)
        if not sound:
            bad_sizes.add(number)
        if not faults:
            into.add(image, texts.items(), number, line=number, size=size, references=references)
    if bad_sizes:
        into.notes.append(
            f"{path}: 'h*w' or 'w*h' is not a size such as \"832*1264\" in lines "
            f"{bad_sizes}; it is not used"
        )


def _note_unlisted(path: Path, table: Path, into: Collector) -> None:
    """Tells of pictures in the folder that the table does not name."""
    rows = into.table.pictures(range(len(into.table)))
    listed = {os.path.normpath(picture) for row in rows for picture in row}
    unlisted = Examples()
    for where, names in walk(path):
        files = (os.path.join(where, name) for name in names)
        for file in files:
            if os.path.normpath(file) not in listed and stem_of(file) is not None:
                unlisted.add(os.path.relpath(file, path))
    if unlisted:
        into.notes.append(
            f"{path}: pictures that {table.name} does not list are not used: {unlisted}"
        )


# --- the rows of a file


def _json_lines(path: Path) -> Iterator[NumberedRow]:
    """The object of every line that is not blank."""
    with open_regular(path) as file:
        for number, raw in _lines(file):
            if not raw.strip():
                continue
            if len(raw) > MAX_LINE:
                yield number, f"is longer than {MAX_LINE >> 20} MiB; this is not a row"
                return
            try:
                found = parse_json(raw.decode("utf-8").strip(), "row", "correct the line")
            except UnicodeDecodeError as error:
                yield number, not_utf8(error)
            except UserError as error:
                yield number, str(error).removeprefix("row: ")
            else:
                yield number, _object(found)


def _object(found: object) -> dict | str:
    if isinstance(found, dict):
        return found
    return f"is {kind_of(found)}; a row must be one JSON object"


def _json_rows(path: Path) -> Iterator[NumberedRow]:
    """The objects of a list, or the captions (or objects) under the names of pictures."""
    found, _ = read_json(path, limit=MAX_JSON, again="correct it", missing="check data.path")
    if isinstance(found, list):
        for number, row in enumerate(found, start=1):
            yield number, _object(row)
    elif isinstance(found, dict):
        for number, (name, row) in enumerate(found.items(), start=1):
            row = {CAPTION_KEY: row} if isinstance(row, str) else _object(row)
            yield number, row if isinstance(row, str) else {"file_name": name, **row}
    else:
        yield 1, f"is {kind_of(found)}; it must be a list of rows, or pictures with their captions"


def _csv_rows(path: Path) -> Iterator[NumberedRow]:
    """Rows of separated values under a header.

    The separator is a tab in a .tsv file, else the header's: a comma, a semicolon or a tab.
    """
    with open_regular(path) as file:
        lines = (raw.decode("utf-8") for _, raw in _lines(file))
        number, header = 1, []
        try:
            first = next(lines, "")
            tabs = path.suffix.lower() == ".tsv"
            separator = "\t" if tabs else max(SEPARATORS, key=first.count)
            lines = itertools.chain([first], lines)
            reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)
            records = _records(reader, separator)
            number, header = next(records, (1, []))
            if isinstance(header, str):
                yield number, header
                return
            header = [name.strip() for name in header]
            twice = [name for name, times in collections.Counter(header).items() if times > 1]
            if twice:
                named = listing(map(repr, twice))
                yield 1, f"the header names {named} twice; keep one column of each"
                return
            number = reader.line_num
            for where, fields in records:
                number = reader.line_num
                if isinstance(fields, list) and len(fields) not in (0, len(header)):
                    fields = (
                        f"{len(fields)} columns where the header has {len(header)}; "
                        f"quote fields that contain {SEPARATORS[separator]}"
                    )
                if isinstance(fields, str):
                    yield where, fields
                elif fields:
                    yield where, dict(zip(header, fields, strict=True))
        except UnicodeDecodeError as error:
            yield number + 1 if header else 1, not_utf8(error)


def _records(reader, separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """Last line and fields of each record; a string in their place says what is wrong."""
    while True:
        begin = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader goes on with the next line
            yield reader.line_num, f"broken CSV ({error}); {QUOTES}"
            continue
        # Rows between two quotes that are part of captions would become one.
        if separator == "\t" and any("\n" in field and "\t" in field for field in fields):
            fields = f"a field goes on to line {reader.line_num}, over tabs; {QUOTES}"
        yield begin if isinstance(fields, str) else reader.line_num, fields


def _lines(file) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line, of at most `MAX_LINE` bytes and one more."""
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        yield number, raw.removeprefix(BOM) if number == 1 else raw


# --- the fields of a row


def _image(
    record: Mapping, roots: list[str], options: Options
) -> tuple[str | None, list[object], str | None]:
    """The picture of a record on disk, what its list names before it, and what is wrong.

    The picture is the first of a list; of a list that gives the references too the last.
    """
    image_key, before = options.image_key, []
    both = options.references and not columns_of(record, options.references)
    for key in filter(record.__contains__, [image_key] if image_key else PATH_KEYS):
        value = record[key]
        if value is None or value == "" or value == []:
            continue
        if isinstance(value, list) and (key == image_key or key not in PATH_STRINGS):
            *before, value = value if both else value[:1]
        elif key not in (image_key, *PATH_STRINGS):
            return None, [], f"{key!r} must be a list of paths"
        if not isinstance(value, str) or not value:
            return None, [], f"{key!r} is {kind_of(value)}; it must be the path of a picture"
        path, fault = _find(value, roots)
        return path, before, fault
    there = f"its fields are {listing(map(repr, record))}"
    if image_key:
        return None, [], f"has no {image_key!r} ({there}); correct data.image_key"
    fault = (
        f"names no picture ({there}); give its path under one of {listing(PATH_KEYS)}, or name its "
        "field in data.image_key"
    )
    return None, [], fault


def _find(name: str, roots: list[str]) -> tuple[str | None, str | None]:
    if is_remote(name):
        return None, f"{name} is remote; download the pictures first"
    candidates = [os.path.join(root, name) for root in roots]  # an absolute name replaces it
    for candidate in candidates:
        if os.path.isfile(candidate):  # unlike Path.is_file never raises, whatever the name
            return candidate, None
        for form in ("NFC", "NFD"):  # Macs write é as two characters, others as one
            if os.path.isfile(other := unicodedata.normalize(form, candidate)):
                return other, None
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    if any(os.path.isdir(candidate) for candidate in candidates):
        return None, f"{shown} is a folder; name the picture itself"
    if any(os.path.exists(candidate) for candidate in candidates):
        return None, f"{shown} is a device or a pipe, not a picture; correct the path"
    for candidate in candidates:  # kohya's tables name pictures without their ending
        found = [candidate + suffix for suffix in IMAGE_SUFFIXES]
        found = [file for file in found if os.path.isfile(file)]
        if len(found) == 1:
            return found[0], None
    if Path(name).is_absolute():
        return None, f"no such picture {shown}; correct the path"
    return None, (
        f"no such picture {shown} (looked in {listing(roots)}); correct the path or set data.root"
    )


def _declared_size(record: Mapping) -> tuple[tuple[int, int] | None, bool]:
    """(width, height) of the first size given, and whether what is there is sound."""
    for key in SIZE_KEYS:
        value = record.get(key)
        if value is None:
            continue
        if isinstance(value, list) and value:
            value = value[0]
        match = isinstance(value, str) and _SIZE.fullmatch(value)
        if not match:
            return None, False
        first, second = int(match[1]), int(match[2])
        return ((second, first) if key == "h*w" else (first, second)), True
    return None, True


LAYOUT = Layout("a table of pictures and captions", matches, read)
