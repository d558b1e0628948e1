"""A prepared data set: read by random access, without pictures and without encoders."""

import contextlib
import io
import itertools
import math
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dopsd_jax.common.config_fields import as_option
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.data import prepared_parts as parts
from dopsd_jax.data.buckets import Bucket, Reference
from dopsd_jax.data.images import ImageInfo
from dopsd_jax.data.picture_index import Infos
from dopsd_jax.data.sources.collector import KEYS_FIELD, listing
from dopsd_jax.data.table import WHOLE, Table, View
from dopsd_jax.data.varied import EMPTY
from dopsd_jax.weights.tensors import DTYPES

THREADS = 16  # parts are opened at once, for storage that is far away
AT_ONCE = 64  # parts
MASKS = "masks"  # of a manifest's settings: which, and how many pixels a side of a cell has
Caption = tuple[int, int]  # row of the data set, caption of the row


class Prepared:
    """The features of a prepared data set.

    Attributes:
      manifest: what it was made from, and how.
      rows, infos, buckets, references: what a `Dataset` holds, for the prompt keys that were asked
        for.
      masks: of each row the sha256 of its mask, "" where all of its picture counts.
      shown: the rows whose pictures were kept.
    """

    def __init__(
        self,
        folder: str,
        prompt_keys: Sequence[str] | None = None,
        report: Callable[[str], None] = print,
        required: str | None = None,
        keys_field: str = KEYS_FIELD,
    ):
        self.folder = parts.local(folder)
        self.manifest = parts.read_manifest(self.folder)
        known, besides = self.manifest.prompt_keys, (required,) if required else ()
        raise_if(
            f"{field} {listing(unknown)}: {folder} was prepared with {listing(known)} only; choose "
            "among them, or prepare it again"
            for field, keys in ((keys_field, prompt_keys or ()), ("teacher.prompt_key", besides))
            if (unknown := [key for key in keys if key not in known])
        )
        asked = (*prompt_keys, *besides) if prompt_keys else known
        self.prompt_keys = tuple(dict.fromkeys(asked))
        self._check_all_there()
        self._paths = [self.folder / parts.part_name(n) for n in range(self.manifest.parts)]
        self.rows, self.infos = Table((*self.prompt_keys, EMPTY), str(folder)), Infos()
        self.buckets: list[Bucket] = []
        self.references: list[tuple[Reference, ...]] = []
        self.masks: list[str] = []
        self._starts = [0] * self.manifest.parts
        self._numbers = array("i")  # of each caption that is used, within its part
        self._index: list[np.ndarray] = []
        self._layouts: list[list[parts.Layout]] = []
        self._crcs: list[np.ndarray] = []
        self._pictures: dict[int, list[tuple[int, int, int]]] = {}
        self._masks: dict[int, tuple[int, int, int]] = {}
        known: dict = {}  # equal buckets and layouts are kept once
        with ThreadPoolExecutor(THREADS) as pool:
            read = lambda path: parts.read_part(path, self.manifest.identity)
            for first in range(0, len(self._paths), AT_ONCE):
                opened = pool.map(read, self._paths[first : first + AT_ONCE])
                for number, part in enumerate(opened, first):
                    self._add(number, part, known)
                if first and first % 1024 == 0:
                    report(f"prepared data: {first}/{self.manifest.parts} parts opened")
        self.shown = sorted(self._pictures)
        if not any(self.references):
            self.references = []

    def _check_all_there(self) -> None:
        with parts.reading(self.folder):
            there = {path.name for path in self.folder.iterdir()}
        count = self.manifest.parts  # any number, should the manifest be damaged
        lacking = (n for n in range(count) if parts.part_name(n) not in there)
        if first := list(itertools.islice(lacking, 10)):
            raise UserError(
                f"{self.folder}: of {count} parts some are missing ({listing(first)}"
                f"{', ...' * (len(first) == 10)}); run dopsd_jax.prepare until all shards are done"
            )

    def _add(self, number: int, part: parts.Part, known: dict) -> None:
        path, own = self._paths[number], self.manifest.rows_of(number)
        if len(part.rows) != len(own) or len(part.index) != sum(
            len(row["captions"]) for row in part.rows
        ):
            raise UserError(f"{path}: holds other rows than it should; {parts.AGAIN}")
        self._starts[number] = part.start
        self._index.append(part.index)
        self._layouts.append([known.setdefault(one, one) for one in part.layouts])
        self._crcs.append(part.crc32.astype(np.uint32))
        caption = 0
        for row_number, row in zip(own, part.rows, strict=True):
            chosen = []
            for key, text in row["captions"]:
                if key in self.rows.keys:
                    chosen.append((key, text))
                    self._numbers.append(caption)
                caption += 1
            if {key for key, _ in chosen} - {EMPTY} != set(self.prompt_keys):
                raise UserError(f"{path}: row {row_number} lacks captions; {parts.AGAIN}")
            crop, mirrored, level = row.get(parts.VIEW, WHOLE)
            view = View(crop, bool(mirrored), level)
            self.rows.append(row["picture"], chosen, line=row_number, view=view)
            info = ImageInfo(*row["size"], row["digest"], tuple(row["notes"]))
            self.infos.append(info)
            bucket = Bucket(*row["bucket"])
            self.buckets.append(known.setdefault(bucket, bucket))
            edited = (Reference(digest, Bucket(*sides)) for digest, sides in row["references"])
            self.references.append(tuple(edited))
            place = lambda first, size, crc: (part.pictures + first, size, crc)
            if row["shown"]:
                self._pictures[row_number] = [place(*one) for one in row["shown"]]
            mask, *own = row.get(parts.MASK, [""])
            self.masks.append(mask)
            if mask:
                self._masks[row_number] = place(*own)

    def check(self, settings: Mapping[str, Any], what: Mapping[str, str]) -> None:
        """Raises `UserError` for every one of `settings` under which it was not made.

        `what`: for each setting the name that a message gives it.
        """
        have = self.manifest.settings
        raise_if(
            f"{self.folder}: was prepared with {what[name]} {short(have.get(name))}, now it is "
            f"{short(value)}; set it back, or prepare the data set again"
            for name, value in settings.items()
            if have.get(name) != value
        )

    def shapes(
        self, role: int, keys: Sequence[str] | None = None
    ) -> list[dict[str, tuple[int, ...]]]:
        """All shapes that the features of the student (0) or the teacher (1) have, by name.

        `keys`: of the captions under these alone.
        """
        chosen, used = np.array(self._numbers, np.int64), self.rows.under(keys)
        ends = np.array(self.rows.caption_ends(), np.int64)
        found, size = set(), self.manifest.rows_per_part
        for number, (index, layouts) in enumerate(zip(self._index, self._layouts, strict=True)):
            rows = self.manifest.rows_of(number)
            part = slice(ends[number * size], ends[rows.stop])
            own = chosen[part][used[part]]
            found.update(layouts[n - 1] for n in np.unique(index[own, role, 1]) if n)
        return [{name: shape for name, _, shape in layout} for layout in sorted(found)]

    def survey(self) -> None:
        """All features are there."""

    def compute(self) -> None:
        """All features are there."""

    def outline(self, caption: Caption, role: int) -> dict[str, np.ndarray]:
        """Arrays like the features of a caption: these themselves."""
        return self.load(caption, (role,))[0]

    def load(
        self, caption: Caption, roles: Sequence[int] = tuple(range(parts.ROLES))
    ) -> tuple[dict[str, np.ndarray], ...]:
        """The features of a caption, from storage: for the student (0), for the teacher (1)."""
        row, i = caption
        part = row // self.manifest.rows_per_part
        number = self._numbers[self.rows.caption_ends()[row] + i]
        found = []
        with parts.reading(self._paths[part]), self._paths[part].open("rb") as file:
            for role in roles:
                first, kind = self._index[part][number, role].tolist()
                layout = self._layouts[part][kind - 1] if kind else ()
                file.seek(self._starts[part] + first)
                content = file.read(parts.layout_bytes(layout))
                # What is cut short has another checksum.
                if zlib.crc32(content) != self._crcs[part][number, role]:
                    raise UserError(
                        f"{self._paths[part]}: a feature of row {row} is damaged; {parts.AGAIN}"
                    )
                found.append(_arrays(content, layout))
        return tuple(found)

    def picture(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """The picture of one of the rows `shown`, as training saw it."""
        return self._png(row, self._pictures[row][0], self.buckets[row])

    def edited(self, row: int) -> list[UInt8[np.ndarray, "_h _w 3"]]:
        """What one of the rows `shown` edits."""
        own = self.references[row] if self.references else ()
        places = self._pictures[row][1:]
        pairs = zip(places, own, strict=True)
        return [self._png(row, place, reference.size) for place, reference in pairs]

    def mask(self, row: int) -> UInt8[np.ndarray, "h w"]:
        """The mask of a row that has one, on the cells of its latent."""
        _, cell = self.manifest.settings[MASKS]
        width, height = self.buckets[row]
        return self._png(row, self._masks[row], (width // cell, height // cell), "L")

    def _png(
        self, row: int, where: tuple[int, int, int], sides: tuple[int, int], mode: str = "RGB"
    ) -> np.ndarray:
        place, size, crc = where
        path = self._paths[row // self.manifest.rows_per_part]
        with parts.reading(path), path.open("rb") as file:
            file.seek(place)
            content = file.read(size)
        wrong = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
        with contextlib.suppress(*wrong), Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            right = image.size == sides and image.mode == mode
            if right and zlib.crc32(content) == crc:
                return np.asarray(image)
        what = "picture" if mode == "RGB" else "mask"
        raise UserError(f"{path}: the {what} of row {row} is damaged; {parts.AGAIN}")


def _arrays(content: bytes, layout: parts.Layout) -> dict[str, np.ndarray]:
    found, place = {}, 0
    for name, code, shape in layout:
        count, dtype = math.prod(shape), DTYPES[code]
        found[name] = np.frombuffer(content, dtype, count, place).reshape(shape)
        place += count * dtype.itemsize
    return found


def short(value: object) -> str:
    """A setting in a message; None: it has none."""
    text = "none" if value is None else as_option(value)
    return text if len(text) <= 80 else f"{text[:12]}..."
