"""Rows inside archives: WebDataset `.tar` files and `.array_record` files.

An archive is read through once; the index that comes of it (where each picture's bytes are, and the
captions) is kept under the archive's path, size and time. Nothing is unpacked: names inside an
archive are labels and never become paths.
"""

import functools
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.blobs import (
    ARCHIVES,
    RECORDS,
    TAR,
    array_record_module,
    join_record,
    open_records,
    split_record,
)
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.data.folder import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    UNREADABLE_SUFFIXES,
    captions_in,
)
from dopsd_jax.data.records import KNOWN_KEYS, Collector, captions_of, kind_of

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
CAPTION_KEY = "caption"
VERSION = 1  # of the index
MAX_PICTURE = 1 << 30  # bytes
AGAIN = "make the archive again"


class Sample(NamedTuple):
    """A picture of an archive with its captions: a list of (key, text)."""

    name: str
    place: int
    size: int
    captions: list


class _Index(NamedTuple):
    samples: list[Sample]
    problems: list[str]


def read_archives(
    paths: Sequence[Path],
    into: Collector,
    caption_extension: str,
    caption_lines: bool,
    cache: FeatureCache | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Adds the samples of all archives, in order; collects their faults."""
    for number, path in enumerate(paths, 1):
        options = [caption_extension, caption_lines]
        index = _indexed(path, options, cache)
        for problem in index.problems:
            into.problem(problem)
        archive = ARCHIVES[path.suffix.lower()]
        for sample in index.samples:
            captions = [(key, text) for key, text in sample.captions if key in into.keys]
            blob = archive(path, sample.name, sample.place, sample.size)
            into.add(blob, captions, f"{path.name}:{sample.name}")
        if len(paths) > 1 and (number % 50 == 0 or number == len(paths)):
            report(f"archives: {number}/{len(paths)} indexed, {len(into.table)} rows")


def _indexed(path: Path, options: list, cache: FeatureCache | None) -> _Index:
    """The index of one archive, from the cache where the archive is as it was."""
    status = path.stat()
    stamp = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    key = hashlib.sha256(json.dumps(["archive", VERSION, *stamp, *options]).encode()).hexdigest()
    stored = cache.get(key) if cache is not None else None
    if stored is not None:
        lines = stored["samples"].tobytes().splitlines()
        return _Index([Sample(*json.loads(line)) for line in lines], [])
    read = _read_tar if path.suffix.lower() == TAR else _read_records
    index = read(path, *options)
    if not index.samples and not index.problems:
        index.problems.append(f"{path}: holds no pictures; {AGAIN}, or leave it out")
    if cache is not None and not index.problems:
        text = b"\n".join(json.dumps(sample).encode() for sample in index.samples)
        cache.put(key, {"samples": np.frombuffer(text, np.uint8)})
    return index


# --- tar


def _read_tar(path: Path, caption_extension: str, caption_lines: bool) -> _Index:
    problems: list[str] = []
    groups: dict[str, dict[str, tuple[int, int, bytes | None]]] = {}
    text_suffixes = (caption_extension.lower(), ".json")
    last = None
    with open(path, "rb") as file:
        for member in _members(path, file, problems):
            fault = _member_fault(member)
            key, suffix = _split_name(member.name)
            if not fault and suffix not in (*IMAGE_SUFFIXES, *text_suffixes):
                fault = (
                    f"{suffix[1:]} cannot be read; convert it to PNG or JPEG"
                    if suffix in UNREADABLE_SUFFIXES
                    else f"is neither a picture nor {' or '.join(text_suffixes)}; remove it"
                )
            if not fault and suffix in groups.get(key, {}):
                fault = f"is there twice; {AGAIN}"
            if not fault and key in groups and key != last:
                fault = f"is apart from the other members of its sample; {AGAIN}, sorted by name"
            limit = MAX_CAPTION_BYTES if suffix in text_suffixes else MAX_PICTURE
            if not fault and not 0 < member.size <= limit:
                what = "is empty" if not member.size else f"is larger than {limit >> 20} MiB"
                fault = f"{what}; {AGAIN}"
            if fault:
                problems.append(f"{path}:{member.name}: {fault}")
                continue
            content = None
            if suffix in text_suffixes:
                file.seek(member.offset_data)
                content = file.read(member.size)
            groups.setdefault(key, {})[suffix] = member.offset_data, member.size, content
            last = key
    samples = []
    for key, parts in groups.items():
        sample, fault = _sample(key, parts, caption_extension.lower(), caption_lines)
        if fault:
            problems.append(f"{path}:{key}: {fault}")
        else:
            samples.append(sample)
    return _Index(samples, problems)


def _members(path: Path, file, problems: list[str]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file that are not folders; faults of the archive itself."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # tarfile would keep them all
                if not member.isdir():
                    yield member
            end = archive.offset
    except tarfile.TarError as error:
        problems.append(f"{path}: is no tar file, or is truncated or damaged ({error}); {AGAIN}")
        return
    # tarfile takes the end of the file for the end of the archive, and ignores what follows one.
    file.seek(end)
    rest = iter(functools.partial(file.read, 1 << 20), b"")
    first = next(rest, b"")
    if len(first) < tarfile.BLOCKSIZE:
        problems.append(f"{path}: has no end mark, so it is truncated; {AGAIN}")
    elif any(first) or any(map(any, rest)):
        problems.append(f"{path}: holds data behind its end mark, or is damaged; {AGAIN}")


def _member_fault(member: tarfile.TarInfo) -> str | None:
    name = member.name
    if not name or name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        return f"its name is not a plain relative path; {AGAIN}"
    if not member.isreg() or member.issparse():
        return "is a link or a special file, not a file; pack the file itself"
    return None


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the sample is everything before the first dot of the file name."""
    folder, _, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return os.path.join(folder, stem), (dot + suffix).lower()


def _sample(
    key: str, parts: dict[str, tuple[int, int, bytes | None]], extension: str, lines: bool
) -> tuple[Sample | None, str | None]:
    pictures = [suffix for suffix in parts if parts[suffix][2] is None]
    if len(pictures) != 1:
        there = f"{len(pictures)} pictures ({', '.join(pictures)})" if pictures else "no picture"
        return None, f"has {there}; a sample is one picture with its captions"
    captions, faults = [], []
    if extension in parts:
        texts, fault = captions_in(parts[extension][2], lines)
        captions += [(CAPTION_KEY, text) for text in texts]
        faults += [f"{extension} {fault}"] if fault else []
    if ".json" in parts:
        texts, fault = _json_captions(parts[".json"][2])
        own = [text for _, text in captions]
        if own and CAPTION_KEY in texts and texts.pop(CAPTION_KEY).strip() not in own:
            fault = fault or f"and {extension} hold different captions; keep one"
        captions += texts.items()
        faults += [f".json {fault}"] if fault else []
    if not captions and not faults:
        faults.append(f"has no caption; pack {extension} or .json beside the picture")
    place, size, _ = parts[pictures[0]]
    return Sample(key + pictures[0], place, size, captions), "; ".join(faults) or None


def _json_captions(content: bytes) -> tuple[dict[str, str], str | None]:
    """Every field of a record that is text: which of them are captions is decided later."""
    try:
        record = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return {}, f"is not JSON ({error}); mend it"
    if not isinstance(record, dict):
        return {}, f"is {kind_of(record)}; it must be one JSON object"
    keys = [k for k, v in record.items() if isinstance(v, str) or k in KNOWN_KEYS]
    texts, faults = captions_of(record, keys)
    return texts, "; ".join(faults) or None


# --- ArrayRecord


def _read_records(path: Path, caption_extension: str, caption_lines: bool) -> _Index:
    """Records as `blobs.join_record` makes them; caption options are for tar files."""
    del caption_extension, caption_lines
    samples, problems = [], []
    reader = open_records(str(path))
    if not reader.ok() or not reader.num_records():
        return _Index([], [f"{path}: is no ArrayRecord file, is empty or truncated; {AGAIN}"])
    for number in range(reader.num_records()):
        where = f"{path}:{number}"
        try:
            (record,) = reader.read([number])
        except RuntimeError as error:
            problems.append(f"{where}: is damaged ({error}); {AGAIN}")
            continue
        header, picture = split_record(record)
        texts, fault = _json_captions(header)
        if not fault and not picture:
            fault = "holds no picture behind its line of JSON"
        if fault:
            problems.append(f"{where}: {fault}; {AGAIN}")
        else:
            samples.append(Sample(str(number), number, len(picture), list(texts.items())))
    return _Index(samples, problems)


def write_array_record(path: str | os.PathLike, rows) -> None:
    """Writes rows (captions by key, bytes of a picture file) as an `.array_record` file."""
    path = Path(path)
    if path.suffix != RECORDS:
        raise UserError(f"{path}: must end in {RECORDS}")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    # Pictures are compressed already; groups of one make a random read cost one record.
    writer = array_record_module().ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    try:
        for captions, picture in rows:
            writer.write(join_record(captions, picture))
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
