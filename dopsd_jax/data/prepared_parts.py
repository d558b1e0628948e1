"""The files of a prepared data set: rows with the features that the encoders made of them.

    prepared.json              how many rows, how many a part, from which rows and encoders; of
                               several data sets, how many rows each has, and their weights
    part-000000.safetensors    rows 0..R-1: their features, captions, sizes; part-000001: R..2R-1

A part is one safetensors file with few tensors, so that any number of rows costs one small header:

    features  uint8            all features of the part one behind the other
    index     int64 [k, 2, 2]  for each caption, for student and for teacher: where its features
                               begin, and 1 + which of `layouts` they have (0: there are none)
    crc32     int64 [k, 2]     of the bytes of these features
    layouts   uint8            JSON: a list of layouts, each the list of its arrays [name, type,
                               shape], which stand one behind the other
    rows      uint8            a line of JSON for each row
    pictures  uint8            PNG files: of the few rows that previews show, and of all masks, on
                               the cells of latents
    whole     int64 [1]        crc32 of index, crc32, layouts and rows

Parts are independent of each other: any process may write any of them, and one that is there is
whole, because it gets its name last.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dopsd_jax.common.atomic import atomic_file, is_remote, write_text
from dopsd_jax.common.config_fields import as_paths
from dopsd_jax.common.errors import UserError, is_utf8, raise_if
from dopsd_jax.common.files import open_regular
from dopsd_jax.common.json_files import parse_json, read_json
from dopsd_jax.data.sets import shares_of
from dopsd_jax.weights.safetensors_io import FileInfo, parse_header
from dopsd_jax.weights.safetensors_write import header_bytes
from dopsd_jax.weights.tensors import CODES, DTYPES, TensorInfo

MANIFEST = "prepared.json"
LOCK = "lock-"  # of a shard that is at work
FORMAT = 3
TYPES = ("BF16", "F32", "I32")  # of features
MAX_SMALL = 256 << 20  # bytes of each of the arrays that describe the features
AGAIN = "remove it and run dopsd_jax.prepare again"
ROLES = 2  # student, teacher
ROW_FIELDS = {"captions", "picture", "digest", "notes", "size", "bucket", "references", "shown"}
VIEW = "view"  # a further field of rows that do not show their whole picture
MASK = (
    "mask"  # and of rows of whose picture not all counts: [sha256 of the mask, place, size, crc32]
)
OTHER = "teacher_picture"  # and the sha256 of another picture than its own that its teacher sees
MAX_SIDE = 2**31  # pixels
SETS = ("sets", "weights")
SMALL = ("index", "crc32", "layouts", "rows")
# The arrays that features consist of: name, code of the type, shape.
Layout = tuple[tuple[str, str, tuple[int, ...]], ...]


class Manifest(NamedTuple):
    """What all parts have in common.

    `source` is the digest of the rows (pictures' names and captions), `settings` what the features
    depend on besides: encoders, crops, sizes. `sets`: name and number of rows of each data set, one
    behind the other, if there are several; `weights`: config.data.weights of them.
    """

    rows: int
    rows_per_part: int
    prompt_keys: tuple[str, ...]
    source: str
    settings: dict[str, Any]
    sets: tuple[tuple[str, int], ...] = ()
    weights: tuple[str, ...] = ()

    @property
    def parts(self) -> int:
        return -(-self.rows // self.rows_per_part)

    def rows_of(self, part: int) -> range:
        """The rows of a part."""
        first = part * self.rows_per_part
        return range(first, min(first + self.rows_per_part, self.rows))

    def text(self) -> str:
        content = {"format": FORMAT, **self._asdict()}
        for name in SETS if not self.sets else ():  # as it was written before there were several
            del content[name]
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @property
    def identity(self) -> str:
        """Is written into every part, so that a part of another preparation is noticed."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def is_prepared(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder made by `dopsd_jax.prepare`."""
    with reading(path):
        return (local(path) / MANIFEST).exists()


def local(path: str | os.PathLike) -> epath.Path:
    """A folder, here or in a store; a shell expands no ~ behind an equals sign."""
    return epath.Path(path if is_remote(path) else os.path.expanduser(path))


def names_prepared(path: str | Sequence[str]) -> bool:
    """Whether data.path is a prepared data set. Raises `UserError` for one in a list of several."""
    paths = as_paths(path)
    prepared = [one for one in paths if is_prepared(one)]
    if prepared and len(paths) > 1:
        raise UserError(
            f"data.path {prepared[0]}: is a prepared data set, which has no place in a list; name "
            "it alone, or name the pictures it was made from"
        )
    return bool(prepared)


def read_manifest(folder: epath.Path) -> Manifest:
    """The checked manifest of a prepared data set."""
    path = folder / MANIFEST
    with reading(path):
        found, _ = read_json(path, again="prepare the data set again")
    if isinstance(found, dict) and found.pop("format", None) != FORMAT:
        raise UserError(f"{path}: is of another version; prepare the data set again")
    wanted = {"rows": int, "rows_per_part": int, "prompt_keys": list, "source": str}
    wanted |= {"settings": dict}
    if isinstance(found, dict):
        found |= {name: found.get(name, []) for name in SETS}
        wanted |= dict.fromkeys(SETS, list)
    if (
        not isinstance(found, dict)
        or found.keys() != wanted.keys()
        or any(type(found[name]) is not kind for name, kind in wanted.items())
        or found["rows"] < 1
        or found["rows_per_part"] < 1
        or not found["prompt_keys"]
        or not all(isinstance(key, str) for key in found["prompt_keys"])
        or not _are_sets(found["sets"], found["weights"], found["rows"])
    ):
        raise UserError(f"{path}: is damaged; prepare the data set again")
    found |= {"prompt_keys": tuple(found["prompt_keys"]), "weights": tuple(found["weights"])}
    return Manifest(**found | {"sets": tuple(map(tuple, found["sets"]))})


def _are_sets(sets: list, weights: list, rows: int) -> bool:
    """Whether these are the data sets of so many rows, with their weights."""
    with contextlib.suppress(TypeError, ValueError, UserError):
        named = all(_is_text(name) and type(count) is int and count > 0 for name, count in sets)
        shares_of(weights, len(sets))
        texts = all(isinstance(weight, str) for weight in weights)
        return named and texts and (not sets or sum(count for _, count in sets) == rows)
    return False


def part_name(number: int) -> str:
    return f"part-{number:06d}.safetensors"


def holds_nothing(out: epath.Path) -> bool:
    """Whether a preparation has made no part there yet, and only one shard is at work there.

    Others may be about to write parts of the manifest as it is; a store does not say whether.
    """
    if is_remote(out):
        return False
    names = [path.name for path in Path(out).rglob("*")]
    is_locked_by_others = sum(name.startswith(LOCK) for name in names) > 1
    return not is_locked_by_others and not any(name.startswith("part-") for name in names)


def layout_of(arrays: Mapping[str, Any]) -> Layout:
    """The layout of named arrays, or of their shapes."""
    return tuple((name, CODES[np.dtype(a.dtype)], tuple(a.shape)) for name, a in arrays.items())


def layout_bytes(layout: Layout) -> int:
    return sum(math.prod(shape) * DTYPES[code].itemsize for _, code, shape in layout)


def write_part(
    path: epath.Path,
    identity: str,
    layouts: Sequence[Sequence[Layout]],
    features: Iterable[tuple[int, int, Mapping[str, np.ndarray]]],
    rows: Sequence[Mapping[str, Any]],
    pictures: bytes,
) -> None:
    """Writes a part as its features come: (caption, role, arrays), in any order, each once.

    `layouts`: for each caption those of student and teacher; an empty one where there is nothing.
    Only one caption's features are in memory. Raises `UserError` when it cannot be written.
    """
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    kinds = list(dict.fromkeys(own for pair in layouts for own in pair if own))
    total = sum(layout_bytes(own) for pair in layouts for own in pair)
    small = {
        "index": np.zeros((len(layouts), ROLES, 2), np.int64),
        "crc32": np.zeros((len(layouts), ROLES), np.int64),
        "layouts": np.frombuffer(json.dumps(kinds).encode(), np.uint8),
        "rows": np.frombuffer(lines, np.uint8),
    }
    infos = {"features": TensorInfo("U8", (total,))}
    infos |= {name: TensorInfo(CODES[a.dtype], a.shape) for name, a in small.items()}
    infos |= {"whole": TensorInfo("I64", (1,)), "pictures": TensorInfo("U8", (len(pictures),))}
    done = 0
    with atomic_file(path) as file:
        file.write(header_bytes(list(infos), infos, {"prepared": identity}))
        for caption, role, arrays in features:
            layout = layouts[caption][role]
            if layout_of(arrays) != layout:
                raise ValueError(f"{layout_of(arrays)}, not {layout}")
            content = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays.values())
            small["index"][caption, role] = done, 1 + kinds.index(layout)
            small["crc32"][caption, role] = zlib.crc32(content)
            file.write(content)
            done += len(content)
        announced = [[bool(layout) for layout in pair] for pair in layouts]
        if done != total or (small["index"][..., 1].astype(bool) != announced).any():
            raise ValueError(f"{done} bytes of features, announced {total}")
        for name in SMALL:
            file.write(small[name].tobytes())
        file.write(np.array([_whole(small)], np.int64).tobytes())
        file.write(pictures)


def _whole(small: Mapping[str, np.ndarray]) -> int:
    total = 0
    for name in SMALL:
        total = zlib.crc32(small[name].tobytes(), total)
    return total


class Part(NamedTuple):
    """A part as it is found: where features and pictures begin, and what is said about them."""

    start: int
    pictures: int
    layouts: list[Layout]
    index: np.ndarray
    crc32: np.ndarray
    rows: list[dict[str, Any]]


def read_part(path: epath.Path, identity: str) -> Part:
    """What a part says of its features and pictures. Raises `UserError` where it is not whole."""
    if not is_remote(path):
        open_regular(path).close()
    with reading(path), path.open("rb") as file:
        header = parse_header(Path(path.name), path.stat().length, file)
        infos = header.tensors
        if header.metadata.get("prepared") != identity:
            raise UserError(f"{path}: belongs to another preparation; {AGAIN}")
        _check_shapes(path, infos)
        small = {}
        for name in (*SMALL, "whole"):
            if infos[name].nbytes > MAX_SMALL:
                raise UserError(f"{path}: {name} is larger than {MAX_SMALL >> 20} MiB; {AGAIN}")
            file.seek(infos[name].start)
            content = file.read(infos[name].nbytes)
            small[name] = np.frombuffer(content, infos[name].numpy).reshape(infos[name].shape)
    whole = int(small.pop("whole")[0])
    if _whole(small) != whole:
        raise UserError(f"{path}: is damaged (its checksum is wrong); {AGAIN}")
    try:
        layouts = list(map(_layout, parse_json(small["layouts"].tobytes(), "layouts")))
    except (UserError, ValueError, TypeError):
        raise UserError(f"{path}: is damaged (a layout is none); {AGAIN}") from None
    sizes, index = np.array([0, *map(layout_bytes, layouts)]), small["index"]
    where, kind = index[..., 0], index[..., 1]
    outside = (index < 0).any() or (kind >= len(sizes)).any()
    if outside or (where > infos["features"].nbytes - sizes[kind]).any():
        raise UserError(f"{path}: is damaged (its index points outside); {AGAIN}")
    try:
        rows = [parse_json(line, "row") for line in small["rows"].tobytes().split(b"\n")]
    except UserError:
        rows = [None]
    if not all(_is_row(row, infos["pictures"].nbytes) for row in rows):
        raise UserError(f"{path}: is damaged (a row is no row); {AGAIN}")
    start, pictures = infos["features"].start, infos["pictures"].start
    return Part(start, pictures, layouts, index, small["crc32"], rows)


def _layout(found: Any) -> Layout:
    layout = tuple((name, code, tuple(shape)) for name, code, shape in found)
    for name, code, shape in layout:
        sizes = all(type(n) is int and 0 < n < 2**31 for n in shape)
        if not isinstance(name, str) or code not in TYPES or not shape or not sizes:
            raise ValueError(name)
    return layout


def _check_shapes(path: epath.Path, infos: Mapping[str, FileInfo]) -> None:
    wanted = {"index": (("I64",), 3), "crc32": (("I64",), 2), "whole": (("I64",), 1)}
    wanted |= {name: (("U8",), 1) for name in ("features", "layouts", "rows", "pictures")}
    if infos.keys() != wanted.keys():
        raise UserError(f"{path}: holds {', '.join(sorted(infos))}, which is no part; {AGAIN}")
    raise_if(
        f"{path}: {name} is {infos[name].dtype} {list(infos[name].shape)}; {AGAIN}"
        for name, (types, dims) in wanted.items()
        if infos[name].dtype not in types or len(infos[name].shape) != dims
    )
    captions = infos["index"].shape[0]
    if infos["index"].shape[1:] != (ROLES, 2) or infos["crc32"].shape != (captions, ROLES):
        raise UserError(f"{path}: its index has a wrong shape; {AGAIN}")
    if infos["whole"].shape != (1,):
        raise UserError(f"{path}: has a wrong shape; {AGAIN}")


def _is_row(row: object, picture_bytes: int) -> bool:
    """Whether a line of a part holds what `prepare` writes."""
    if not isinstance(row, dict) or row.keys() - {VIEW, MASK, OTHER} != ROW_FIELDS:
        return False
    counts = lambda value, number: (
        isinstance(value, list)
        and len(value) == number
        and all(type(n) is int and 0 <= n < 2**32 for n in value)
    )
    texts = lambda value: isinstance(value, list) and all(map(_is_text, value))
    size = lambda value: counts(value, 2) and 0 < min(value) <= max(value) < MAX_SIDE
    digest = lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))
    file = lambda value: counts(value, 3) and sum(value[:2]) <= picture_bytes
    mask = lambda value: isinstance(value, list) and all(map(digest, value[:1])) and file(value[1:])
    shown, references = row["shown"], row["references"]
    return (
        isinstance(row["captions"], list)
        and all(texts(caption) and len(caption) == 2 for caption in row["captions"])
        and _is_text(row["picture"])
        and digest(row["digest"])
        and texts(row["notes"])
        and size(row["size"])
        and size(row["bucket"])
        and counts(row.get(VIEW, [0, 0, 0]), 3)
        and isinstance(references, list)
        and all(isinstance(one, list) and len(one) == 2 for one in references)
        and all(digest(name) and size(sides) for name, sides in references)
        and isinstance(shown, list)
        and len(shown) in (0, 1 + len(references))
        and all(map(file, shown))
        and (MASK not in row or mask(row[MASK]))
        and (OTHER not in row or digest(row[OTHER]))
    )


def _is_text(value: object) -> bool:
    """Whether a value is text that can be written: JSON may hold half a character."""
    return isinstance(value, str) and is_utf8(value)


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Makes faults of the file system, here or remote, a `UserError`."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{path}: reading it needs another package ({error}); for gs:// pip install gcsfs"
        ) from None
    except FileNotFoundError:
        raise UserError(f"{path}: is not there; check the path") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check it and its permissions"
        ) from error


def make_folder(folder: epath.Path) -> None:
    """Makes the folder of a preparation, where that means anything."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        raise UserError(
            f"{folder}: writing it needs another package ({error}); for gs:// pip install gcsfs"
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror or error}); choose another --out"
        ) from error


def write_manifest(folder: epath.Path, manifest: Manifest) -> None:
    """Writes the manifest; several processes may do so at once, all write the same."""
    write_text(folder / MANIFEST, manifest.text())
