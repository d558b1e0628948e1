"""Layout: `.tar` files as WebDataset writes them: members of one name are a picture's sample."""

import functools
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from dopsd_jax.common.errors import MAX_PROBLEMS, one_line
from dopsd_jax.common.files import open_regular
from dopsd_jax.data.blobs import TAR
from dopsd_jax.data.sources import archives
from dopsd_jax.data.sources.archives import AGAIN, COMPRESSED, Entry, Index, given_up
from dopsd_jax.data.sources.captions import (
    CAPTION_KEY,
    MAX_CAPTION_BYTES,
    captions_in,
    json_captions,
)
from dopsd_jax.data.sources.files import IMAGE_SUFFIXES, is_rubbish, unreadable
from dopsd_jax.data.sources.layout import Layout, Options

MAX_PICTURE = 1 << 30  # bytes
MAX_EXTRA = 1 << 16  # bytes of a long name or of further fields, which tarfile keeps in memory
_LONG_NUMBER = re.compile(rb"[0-9]{100}")
_EXTRAS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def _read_tar(path: Path, options: Options) -> Index:
    extension = options.caption_extension.lower()
    problems: list[str] = []
    groups: dict[str, dict[str, tuple[int, int, bytes | None]]] = {}
    text_suffixes = (extension, ".json")
    last = None
    with open_regular(path) as file:
        for member in _members(path, file, problems):
            key, suffix = _split_name(member.name)
            fault = _member_fault(member) or unreadable(suffix)
            if not fault and suffix not in (*IMAGE_SUFFIXES, *text_suffixes):
                fault = f"is neither a picture nor {' or '.join(text_suffixes)}; remove it"
            if not fault and suffix in groups.get(key, {}):
                fault = f"is there twice; {AGAIN}"
            if not fault and key in groups and key != last:
                fault = f"is apart from the other members of its sample; {AGAIN}, sorted by name"
            limit = MAX_CAPTION_BYTES if suffix in text_suffixes else MAX_PICTURE
            if not fault and not 0 < member.size <= limit:
                what = "is empty" if not member.size else f"is larger than {limit >> 20} MiB"
                fault = f"{what}; {AGAIN}"
            if fault:
                problems.append(one_line(f"{path}:{member.name}: {fault}"))
                if len(problems) == MAX_PROBLEMS:
                    return given_up(path, problems)
                continue
            content = None
            if suffix in text_suffixes:
                file.seek(member.offset_data)
                content = file.read(member.size)
            groups.setdefault(key, {})[suffix] = member.offset_data, member.size, content
            last = key
    entries = []
    for key, parts in groups.items():
        entry, fault = _entry(key, parts, extension, options.caption_lines)
        if fault:
            problems.append(f"{path}:{key}: {fault}")
        else:
            entries.append(entry)
    return Index(entries, problems)


class _Member(tarfile.TarInfo):
    """A member whose further headers are not read into memory without limit."""

    def _proc_member(self, archive):
        if self.type in _EXTRAS and not 0 <= self.size <= MAX_EXTRA:
            raise tarfile.ReadError(f"a name or header of {self.size} bytes")
        return super()._proc_member(archive)

    def _proc_pax(self, archive):
        place = archive.fileobj.tell()
        if not _sound_pax(archive.fileobj.read(self.size)):
            raise tarfile.ReadError("further fields that are none")
        archive.fileobj.seek(place)
        found = super()._proc_pax(archive)
        if sum(map(len, archive.pax_headers.values())) > MAX_EXTRA:  # of all members
            raise tarfile.ReadError(f"fields for all members of more than {MAX_EXTRA} bytes")
        return found


def _sound_pax(content: bytes) -> bool:
    """Whether these are pax records: their length in bytes, a space, key=value, a line feed.

    The patterns of tarfile, for which it may be anything, take time by the square of what is not.
    """
    place = 0
    while place < len(content):
        length, space, _ = content[place : place + 10].partition(b" ")
        size = int(length) if space and length.isdigit() else 0
        record = content[place : place + size]
        place += size
        if not 5 <= size == len(record) or not record.endswith(b"\n") or b"=" not in record:
            return False
        if _LONG_NUMBER.search(record):
            return False
    return True


def _members(path: Path, file, problems: list[str]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file that are not folders; faults of the archive itself."""
    size, end = os.fstat(file.fileno()).st_size, -1
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # tarfile would keep them all
                # Sizes come from the file: with a negative one the reading would never end.
                if not end < archive.offset <= size + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                end = archive.offset
                if not member.isdir() and not is_rubbish(os.path.basename(member.name)):
                    yield member
            end = archive.offset
    # tarfile lets a few other exceptions of damaged headers through.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
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


def _entry(
    key: str, parts: dict[str, tuple[int, int, bytes | None]], extension: str, lines: bool
) -> tuple[Entry | None, str | None]:
    pictures = [suffix for suffix in parts if parts[suffix][2] is None]
    if len(pictures) != 1:
        there = f"{len(pictures)} pictures ({', '.join(pictures)})" if pictures else "no picture"
        return None, f"has {there}; a sample is one picture with its captions"
    captions, faults = [], []
    if extension in parts and extension != ".json":  # which is no text: see below
        texts, fault = captions_in(parts[extension][2], lines)
        captions += [(CAPTION_KEY, text) for text in texts]
        faults += [f"{extension} {fault}"] if fault else []
    if ".json" in parts:
        texts, fault = json_captions(parts[".json"][2])
        own = [text for _, text in captions]
        if own and CAPTION_KEY in texts and texts.pop(CAPTION_KEY).strip() not in own:
            fault = fault or f"and {extension} hold different captions; keep one"
        captions += texts.items()
        faults += [f".json {fault}"] if fault else []
    if not captions and not faults:
        faults.append(f"has no caption; pack {extension} or .json beside the picture")
    place, size, _ = parts[pictures[0]]
    return Entry(key + pictures[0], place, size, captions), "; ".join(faults) or None


LAYOUT = Layout(
    "tar files",
    functools.partial(archives.matches, suffixes=(TAR, *COMPRESSED)),
    functools.partial(archives.read_archives, suffix=TAR, read=_read_tar),
)
