"""The rows of a data set: a picture and its captions, from any of three layouts.

* a `.jsonl` file in the manner of D-OPSD (also a `.csv`), see `records.py`
* a folder with `metadata.jsonl` or `metadata.csv` (Hugging Face "imagefolder")
* a folder of pictures with caption files of the same stem, see `folder.py`

Nothing is repaired: all faults of all rows are raised together, before any work is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dopsd_jax.data.folder import IMAGE_SUFFIXES, read_folder
from dopsd_jax.data.records import KNOWN_KEYS, Record, listing, open_failure, read_records
from dopsd_jax.errors import UserError, raise_if

MAX_PROBLEMS = 20
METADATA = ("metadata.jsonl", "metadata.csv")
FOLDER_KEY = "caption"


@dataclass(frozen=True, slots=True)
class Row:
    """One picture with its captions as (key, text); several captions may share a key.

    `where` names the row in messages. `declared_size` is the (width, height) that a record claims;
    it is compared with the file and never used.
    """

    image: Path
    captions: tuple[tuple[str, str], ...]
    where: str
    declared_size: tuple[int, int] | None = None

    def having(self, key: str) -> tuple[int, ...]:
        """Indices into `captions` of those under `key`."""
        return tuple(i for i, (name, _) in enumerate(self.captions) if name == key)


@dataclass(frozen=True)
class Rows:
    """All rows, the prompt keys that every row has, and what the user should be told."""

    rows: tuple[Row, ...]
    prompt_keys: tuple[str, ...]
    notes: tuple[str, ...]


def load_rows(
    path: str | Path,
    prompt_keys: Sequence[str] | None = None,
    *,
    caption_extension: str = ".txt",
    caption_lines: bool = False,
    data_root: str | Path | None = None,
) -> Rows:
    """Reads the rows at `path`; pictures are only looked for, not opened.

    Without `prompt_keys`, all known keys that every row has are taken, and a note says which. A row
    without a requested caption is an error.
    """
    if "://" in str(path):
        raise UserError(f"data.path {path}: only local folders are read; mount or download it")
    path = Path(path).expanduser()
    data_root = Path(data_root).expanduser() if data_root else None
    if data_root and not data_root.is_dir():
        raise UserError(f"data.root {data_root}: no such folder")
    if isinstance(prompt_keys, str):
        raise UserError(f"data.prompt_keys is the string {prompt_keys!r}; it must be a list")
    if prompt_keys is not None and not prompt_keys:
        raise UserError("data.prompt_keys is empty; name at least one key, or leave it unset")
    if not caption_extension.startswith("."):
        raise UserError(
            f"data.caption_extension {caption_extension!r}: must start with a dot, as '.txt'"
        )
    table = _table(path)
    try:
        if table is not None:
            rows = _from_table(table, prompt_keys, data_root)
        else:
            rows = _from_folder(path, prompt_keys, caption_extension, caption_lines)
    except OSError as error:
        raise open_failure(path, error) from error
    return rows


def _table(path: Path) -> Path | None:
    """The file of records that `path` means, or None for a folder of caption files."""
    if not path.exists():
        raise UserError(f"data.path {path}: no such file or folder")
    if path.is_dir():
        tables = [path / name for name in METADATA if (path / name).is_file()]
        if len(tables) > 1:
            raise UserError(f"{path}: has both {' and '.join(METADATA)}; remove one")
        return tables[0] if tables else None
    if path.suffix.lower() in (".jsonl", ".csv"):
        return path
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"data.path {path}: is one picture; give the folder it is in")
    raise UserError(
        f"data.path {path}: is not a data set; give a .jsonl or .csv file, or a folder of pictures"
    )


def _from_folder(
    folder: Path, prompt_keys: Sequence[str] | None, extension: str, lines: bool
) -> Rows:
    if prompt_keys is not None and tuple(prompt_keys) != (FOLDER_KEY,):
        raise UserError(
            f"data.prompt_keys {listing(prompt_keys)}: a folder with caption files has only the "
            f"key {FOLDER_KEY!r}; unset it"
        )
    found, problems, notes = read_folder(folder, extension, lines)
    raise_if(problems, MAX_PROBLEMS)
    if not found:
        tables = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (".jsonl", ".csv"))
        hint = f"; it holds {listing(tables)}, give that file" if tables else ""
        raise UserError(f"data.path {folder}: no pictures in this folder{hint}")
    rows = (
        Row(f.image, tuple((FOLDER_KEY, text) for text in f.captions), str(f.image)) for f in found
    )
    return Rows(tuple(rows), (FOLDER_KEY,), tuple(notes))


def _from_table(table: Path, prompt_keys: Sequence[str] | None, data_root: Path | None) -> Rows:
    keys = tuple(dict.fromkeys(prompt_keys)) if prompt_keys is not None else KNOWN_KEYS
    records, problems, notes = read_records(table, keys, data_root)
    if not records and not problems:
        raise UserError(f"{table}: holds no rows")
    if prompt_keys is None and records:
        keys, note = _common_keys(table, records)
        if note:
            notes.append(note)
        if not keys:
            problems.append(_no_common_key(table, records))
    problems += _caption_problems(table, records, keys)
    raise_if(problems, MAX_PROBLEMS)
    rows = (
        Row(
            record.image,
            tuple((key, text) for key, text in record.texts if key in keys),
            f"{table}:{record.line}",
            record.declared_size,
        )
        for record in records
    )
    return Rows(tuple(rows), keys, tuple(notes))


def _count_keys(records: Sequence[Record]) -> dict[str, int]:
    counts = dict.fromkeys(KNOWN_KEYS, 0)
    for record in records:
        for key, _ in record.texts:
            counts[key] += 1
    return {key: count for key, count in counts.items() if count}


def _common_keys(table: Path, records: Sequence[Record]) -> tuple[tuple[str, ...], str | None]:
    counts = _count_keys(records)
    keys = tuple(key for key, count in counts.items() if count == len(records))
    if not keys:
        return (), None
    partial = [f"{k} ({n} of {len(records)} rows)" for k, n in counts.items() if n < len(records)]
    left = f"; left out, because not in every row: {listing(partial)}" if partial else ""
    return keys, f"{table}: prompt keys {listing(keys)}{left}"


def _no_common_key(table: Path, records: Sequence[Record]) -> str:
    counts = [f"{key} in {n}" for key, n in _count_keys(records).items()]
    have = f"of {len(records)} rows, {listing(counts)}" if counts else "none is there"
    return (
        f"{table}: no caption key is in every row ({have}); write the missing captions under one "
        f"of {listing(KNOWN_KEYS, 11)}, or set data.prompt_keys"
    )


def _caption_problems(table: Path, records: Sequence[Record], keys: Sequence[str]) -> list[str]:
    """One line for each key and kind of fault, with the line numbers."""
    missing: dict[str, list[int]] = {key: [] for key in keys}
    empty: dict[str, list[int]] = {key: [] for key in keys}
    for record in records:
        texts = dict(record.texts)
        for key in keys:
            if key not in texts:
                missing[key].append(record.line)
            elif not texts[key].strip():
                empty[key].append(record.line)
    return [
        f"{table}: caption {key!r} is {what} in lines {listing(lines)} ({len(lines)} of "
        f"{len(records)} rows); write it, or leave the key out of data.prompt_keys"
        for what, by_key in (("missing", missing), ("empty", empty))
        for key, lines in by_key.items()
        if lines
    ]
