"""The rows of a data set: a picture and its captions, from any of five layouts.

* a `.jsonl` file in the manner of D-OPSD (also a `.csv`), see `records.py`
* a folder with `metadata.jsonl` or `metadata.csv` (Hugging Face "imagefolder")
* a folder of pictures with caption files of the same stem, see `folder.py`
* `.tar` files (WebDataset) or `.array_record` files, or a folder of them, see `archives.py`

A folder written by `dopsd_jax.prepare` is read by `prepared.py`. Nothing is repaired: all faults of
all rows are raised together, before any work is done.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.data.archives import COMPRESSED, read_archives
from dopsd_jax.data.blobs import ARCHIVES
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.data.folder import IMAGE_SUFFIXES, read_folder
from dopsd_jax.data.records import Collector, listing, open_failure, read_records
from dopsd_jax.data.table import Row, Table

MAX_PROBLEMS = 20
METADATA = ("metadata.jsonl", "metadata.csv")
FOLDER_KEY = "caption"


@dataclass(frozen=True)
class Rows:
    """All rows, the prompt keys that every row has, and what the user should be told."""

    rows: Sequence[Row]
    prompt_keys: tuple[str, ...]
    notes: tuple[str, ...]


def load_rows(
    path: str | Path,
    prompt_keys: Sequence[str] | None = None,
    *,
    caption_extension: str = ".txt",
    caption_lines: bool = False,
    data_root: str | Path | None = None,
    cache: FeatureCache | None = None,
    teacher_key: str | None = None,
) -> Rows:
    """Reads the rows at `path`; pictures are only looked for, not opened.

    Without `prompt_keys`, all known keys that every row has are taken, and a note says which. A row
    without a requested caption is an error. `cache` keeps the indices of archives. `teacher_key`: a
    further key that is requested, of the captions that teachers are told (teacher.prompt_key).
    """
    if "://" in str(path):
        raise UserError(
            f"data.path {path}: pictures are read from local folders only; mount or download it, "
            "or give a folder made by dopsd_jax.prepare"
        )
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
    try:
        archives = _archives(path)
        if archives:
            collector = Collector(str(path), prompt_keys, "samples", teacher_key)
            read_archives(archives, collector, caption_extension, caption_lines, cache)
            return _finish(collector, path)
        table = _table(path)
        if table is not None:
            collector = Collector(str(table), prompt_keys, "lines", teacher_key)
            read_records(table, collector, data_root)
            return _finish(collector, table)
        if teacher_key not in (None, FOLDER_KEY):
            raise UserError(
                f"teacher.prompt_key {teacher_key!r}: a folder with caption files has only the key "
                f"{FOLDER_KEY!r}; write {METADATA[0]} with both captions"
            )
        return _from_folder(path, prompt_keys, caption_extension, caption_lines)
    except OSError as error:
        raise open_failure(path, error) from error


def _finish(collector: Collector, path: Path) -> Rows:
    table, problems, notes = collector.finish()
    if not table and not problems:
        raise UserError(f"{path}: holds no rows")
    raise_if(problems, MAX_PROBLEMS)
    return Rows(table, table.keys, tuple(notes))


def _archives(path: Path) -> list[Path]:
    """The archives that `path` means, in order; none for the other layouts."""
    is_glob = not path.exists() and any(letter in str(path) for letter in "*?[")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith((".", "_")))
    elif is_glob:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    else:
        files = [path]
    compressed = [file for file in files if file.name.lower().endswith(COMPRESSED)]
    found = [file for file in files if file.suffix.lower() in ARCHIVES]
    if is_glob and len(found) + len(compressed) < max(len(files), 1):
        other = [file.name for file in files if file not in found and file not in compressed]
        what = f"also matches {listing(other)}" if other else "matches no file"
        raise UserError(
            f"data.path {path}: {what}; a pattern must match {' or '.join(ARCHIVES)} files only"
        )
    if compressed:
        raise UserError(
            f"data.path {path}: {listing(f.name for f in compressed)}: a compressed archive has no "
            "random access; unpack it to .tar"
        )
    if len({file.suffix.lower() for file in found}) > 1:
        raise UserError(f"data.path {path}: holds both {' and '.join(ARCHIVES)}; keep one kind")
    loose = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES or f.name in METADATA]
    if found and path.is_dir() and loose:
        raise UserError(
            f"data.path {path}: holds archives and also {listing(f.name for f in loose)}; keep "
            "them in different folders"
        )
    return found


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
        f"data.path {path}: is not a data set; give a .jsonl or .csv file, a folder of pictures, "
        f"or {' or '.join(ARCHIVES)} files"
    )


def _from_folder(
    folder: Path, prompt_keys: Sequence[str] | None, extension: str, lines: bool
) -> Rows:
    if prompt_keys is not None and tuple(prompt_keys) != (FOLDER_KEY,):
        raise UserError(
            f"data.prompt_keys {listing(prompt_keys)}: a folder with caption files has only the "
            f"key {FOLDER_KEY!r}; unset it"
        )
    table = Table((FOLDER_KEY,))
    problems, notes = read_folder(folder, table, extension, lines)
    raise_if(problems, MAX_PROBLEMS)
    if not table:
        tables = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (".jsonl", ".csv"))
        hint = f"; it holds {listing(tables)}, give that file" if tables else ""
        raise UserError(f"data.path {folder}: no pictures in this folder{hint}")
    return Rows(table, (FOLDER_KEY,), tuple(notes))
