"""Rows written as records: D-OPSD `.jsonl`, `metadata.jsonl` and `metadata.csv`."""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.blobs import Blob
from dopsd_jax.data.table import Table

UPSTREAM_KEYS = tuple(
    f"{length}_{language}"
    for language in ("en", "zh")
    for length in ("short", "medium", "detailed", "user_prompt")
)
GENERIC_KEYS = ("caption", "prompt", "text")
KNOWN_KEYS = UPSTREAM_KEYS + GENERIC_KEYS

# Tried in this order; the first one that is present and not empty is used.
PATH_LISTS = ("local_path_list", "local_paths", "image_path_list", "image_paths")
PATH_STRINGS = ("image_path", "path", "file_name", "image")
REMOTE_LIST = "oss_path_list"  # used upstream when its entries are local
PATH_KEYS = (*PATH_LISTS, *PATH_STRINGS, REMOTE_LIST)

SIZE_KEYS = ("h*w", "w*h")
_BOM = b"\xef\xbb\xbf"


class Examples:
    """How many there are of something, and the first few of them."""

    def __init__(self, kept: int = 10):
        self.count, self.first, self._kept = 0, [], kept

    def add(self, item: object) -> None:
        self.count += 1
        if len(self.first) < self._kept:
            self.first.append(str(item))

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more} more" if more else "")


class Collector:
    """Gathers rows into a `Table` and watches which caption keys they have.

    `where`: the source, for messages; `unit`: what its rows are counted in there. `required`: a key
    that every row must have besides, the teacher's.
    """

    def __init__(
        self, where: str, prompt_keys: Sequence[str] | None, unit: str, required: str | None = None
    ):
        self.where, self.unit, self.required = where, unit, required
        self.chosen, besides = prompt_keys is not None, [required] if required else []
        keys = prompt_keys if self.chosen else KNOWN_KEYS
        self.keys = tuple(dict.fromkeys((*keys, *besides)))
        self.table = Table(self.keys, where)
        self.counts = dict.fromkeys(self.keys, 0)
        self.missing = {key: Examples() for key in (self.keys if self.chosen else besides)}
        self.empty = {key: Examples() for key in self.keys}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.hidden = 0  # faults that are only counted: a list of millions helps nobody

    def problem(self, problem: str) -> None:
        if len(self.problems) < 1000:
            self.problems.append(problem)
        else:
            self.hidden += 1

    def add(
        self,
        image: str | Blob,
        captions: Sequence[tuple[str, str]],
        name: object,
        **facts: object,
    ) -> None:
        """Adds a row whose captions are sound; `name` tells it from others in a list of faults."""
        texts = dict(captions)
        for key in self.keys:
            if key in texts:
                self.counts[key] += 1
                if not texts[key].strip():
                    self.empty[key].add(name)
            elif key in self.missing:
                self.missing[key].add(name)
        self.table.append(image, captions, **facts)

    def finish(self) -> tuple[Table, list[str], list[str]]:
        """The rows with the captions that all have, or that were asked for; faults; notes."""
        keys, rows = self.keys, len(self.table)
        if not self.chosen and rows:
            counts = {key: count for key, count in self.counts.items() if count}
            keys = tuple(key for key, count in counts.items() if count == rows)
            partial = [f"{k} ({n} of {rows} rows)" for k, n in counts.items() if n < rows]
            left = f"; left out, because not in every row: {listing(partial)}" if partial else ""
            if keys:
                self.notes.append(f"{self.where}: prompt keys {listing(keys)}{left}")
            else:
                self.problem(self._no_common_key(counts))
        for what, by_key in (("missing", self.missing), ("empty", self.empty)):
            for key, rows_of in by_key.items():
                if (key in keys or key == self.required) and rows_of:
                    other = "leave the key out of data.prompt_keys"
                    if key == self.required:
                        other = "name another key in teacher.prompt_key"
                    self.problem(
                        f"{self.where}: caption {key!r} is {what} in {self.unit} {rows_of} "
                        f"({rows_of.count} of {rows} rows); write it, or {other}"
                    )
        if self.hidden:
            self.problems.append(f"... and {self.hidden} more")
        return self.table if self.problems else self.table.only(keys), self.problems, self.notes

    def _no_common_key(self, counts: Mapping[str, int]) -> str:
        have = [f"{key} in {n}" for key, n in counts.items()]
        have = f"of {len(self.table)} rows, {listing(have)}" if have else "none is there"
        return (
            f"{self.where}: no caption key is in every row ({have}); write the missing captions "
            f"under one of {listing(KNOWN_KEYS, 11)}, or set data.prompt_keys"
        )


def read_records(path: Path, into: Collector, data_root: Path | None) -> None:
    """Reads a `.jsonl` or `.csv` file: its good records, its faults, its notes.

    Relative pictures are looked for in the folder of the file, then in `data_root`.
    """
    lines = _csv_objects(path) if path.suffix.lower() == ".csv" else _json_objects(path)
    roots = [path.parent, *([data_root] if data_root else [])]
    bad_sizes = Examples()
    for number, found in lines:
        where = f"{path}:{number}"
        if isinstance(found, str):
            into.problem(f"{where}: {found}")
            continue
        image, fault = _image(found, roots)
        faults = [fault] if fault else []
        texts, text_faults = captions_of(found, into.keys)
        for fault in (*faults, *text_faults):
            into.problem(f"{where}: {fault}")
        size, sound = _declared_size(found)
        if not sound:
            bad_sizes.add(number)
        if not faults and not text_faults:
            into.add(image, tuple(texts.items()), number, line=number, size=size)
    if bad_sizes:
        into.notes.append(
            f"{path}: 'h*w' or 'w*h' is not a size such as \"832*1264\" in lines "
            f"{bad_sizes}; it is not used"
        )


def captions_of(record: Mapping, keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The captions of a record under `keys`, empty ones included, and what is wrong with them."""
    texts, faults = {}, []
    for key in keys:
        text = record.get(key)
        if isinstance(text, str):
            texts[key] = text
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                faults.append(f"{key!r} holds half of a surrogate pair; mend the text")
        elif text is not None:
            faults.append(f"{key!r} is {kind_of(text)}; a caption must be a string")
    return texts, faults


def listing(items: Iterable[object], limit: int = 10) -> str:
    """`items` joined by commas; those beyond `limit` are only counted."""
    items = [str(item) for item in items]
    if len(items) <= limit:
        return ", ".join(items)
    return f"{', '.join(items[:limit])} and {len(items) - limit} more"


def _json_objects(path: Path) -> Iterator[tuple[int, dict | str]]:
    """Line number and object of every line that is not blank; a string in its place is a fault."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(_BOM)
            if not raw.strip():
                continue
            try:
                found = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield number, not_utf8(error)
            except json.JSONDecodeError as error:
                yield number, f"broken JSON at column {error.colno} ({error.msg}); mend the line"
            except RecursionError:
                yield number, "JSON nested too deeply; a row is one flat object"
            else:
                if isinstance(found, dict):
                    yield number, found
                else:
                    yield number, f"is {kind_of(found)}; a row must be one JSON object"


def _csv_objects(path: Path) -> Iterator[tuple[int, dict | str]]:
    """The same for comma-separated values with a header line."""
    with path.open("rb") as file:
        texts = (raw.removeprefix(_BOM if n == 0 else b"") for n, raw in enumerate(file))
        reader = csv.reader((raw.decode("utf-8") for raw in texts), strict=True)
        try:
            header = next(reader, [])
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                yield 1, f"the header names {listing(twice)} twice; keep one column of each"
                return
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    yield (
                        reader.line_num,
                        f"{len(fields)} columns where the header has {len(header)}; "
                        "quote fields that contain a comma",
                    )
                else:
                    yield reader.line_num, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            yield reader.line_num, f"broken CSV ({error}); mend the line"
        except UnicodeDecodeError as error:
            yield reader.line_num + 1, not_utf8(error)


def not_utf8(error: UnicodeDecodeError) -> str:
    """What to tell about bytes that are not UTF-8."""
    wide = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
    what = "looks like UTF-16" if wide else f"byte 0x{error.object[error.start]:02x}"
    return f"not UTF-8 text ({what}); save it as UTF-8"


def _image(record: Mapping, roots: list[Path]) -> tuple[str | None, str | None]:
    """The picture of a record on disk, or what is wrong."""
    for key in PATH_KEYS:
        value = record.get(key)
        if value is None or value == "" or value == []:
            continue
        if key in PATH_STRINGS:
            if not isinstance(value, str):
                return None, f"{key!r} is {kind_of(value)}; it must be the path of a picture"
            return _find(value, roots)
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            return None, f"{key!r} must be a list of paths"
        return _find(value[0], roots)
    return None, f"names no picture; give its path under one of {listing(PATH_KEYS)}"


def _find(name: str, roots: list[Path]) -> tuple[str | None, str | None]:
    if "://" in name:
        return None, f"{name} is remote; download the pictures first"
    candidates = [os.path.join(root, name) for root in roots]  # an absolute name replaces it
    for candidate in candidates:
        if os.path.isfile(candidate):  # unlike Path.is_file never raises, whatever the name
            return candidate, None
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    if any(os.path.isdir(candidate) for candidate in candidates):
        return None, f"{shown} is a folder; name the picture itself"
    if Path(name).is_absolute():
        return None, f"no such picture {shown}; mend the path"
    return None, (
        f"no such picture {shown} (looked in {listing(roots)}); mend the path or set data.root"
    )


def _declared_size(record: Mapping) -> tuple[tuple[int, int] | None, bool]:
    """(width, height) of the first size given, and whether what is there is sound."""
    for key in SIZE_KEYS:
        value = record.get(key)
        if value is None:
            continue
        if isinstance(value, list) and value:
            value = value[0]
        match = isinstance(value, str) and re.fullmatch(r"\s*(\d{1,7})\s*\*\s*(\d{1,7})\s*", value)
        if not match:
            return None, False
        first, second = int(match[1]), int(match[2])
        return ((second, first) if key == "h*w" else (first, second)), True
    return None, True


def kind_of(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def open_failure(path: Path, error: OSError) -> UserError:
    """A file or folder that is there and cannot be read."""
    return UserError(
        f"{error.filename or path}: cannot be read ({error.strerror}); check its permissions"
    )
