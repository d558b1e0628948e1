"""Pictures as PNG files: one, or a labelled grid with a row a prompt and a column a model."""

import bisect
import dataclasses
import functools
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dopsd_jax.common.atomic import atomic_file, make_folder
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_files import parse_json

FOLDER = "samples"
TRAINING = f"{FOLDER}/training.png"  # some of the pictures that a run learns from
CELL = 320  # pixels of the longer side of a picture in a grid
LABELS = "dopsd_jax"  # PNG text chunk: `Labels` as JSON
BACKGROUND, INK, FAINT, EMPTY = "#ffffff", "#1b1b1b", "#6b6b6b", "#ececec"
MARGIN, GAP, CAPTION_LINES = 16, 8, 2
ENLARGED = 2  # pictures enlarged so many times or more show their pixels: smooth ones look blurred
ELLIPSIS = "..."  # one letter is not in Pillow's font
# Pillow's own font has ASCII letters only; then the first of these that has the letters.
OTHER_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "msyh.ttc",
)


@dataclasses.dataclass(frozen=True)
class GridRow:
    """The pictures of one prompt, one for each column; None where there is none."""

    caption: str
    images: Sequence[UInt8[np.ndarray, "_h _w 3"] | None]


class Cell(NamedTuple):
    """Where a picture stands in its grid, in pixels; `own_width`, `own_height`: before resizing."""

    x: int
    y: int
    width: int
    height: int
    own_width: int
    own_height: int

    def cut(self, sheet: Image.Image) -> Image.Image:
        """The picture; in its own size if it was enlarged pixel by pixel."""
        box = (self.x, self.y, self.x + self.width, self.y + self.height)
        picture = sheet.crop(box)
        if self.width < ENLARGED * self.own_width or self.height < ENLARGED * self.own_height:
            return picture
        return picture.resize((self.own_width, self.own_height), Image.Resampling.NEAREST)


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a grid shows, in full; the picture itself may show captions cut short.

    cells: of each row, one for each column; None where there is no picture.
    """

    title: str
    columns: tuple[str, ...]
    captions: tuple[str, ...]
    cells: tuple[tuple[Cell | None, ...], ...]


def reference_columns(references: Iterable[Sequence]) -> tuple[str, ...]:
    """Names of the columns for the pictures that rows edit; none where no row edits any."""
    most = max(map(len, references), default=0)
    return tuple(f"reference {k}" if most > 1 else "reference" for k in range(1, most + 1))


def filled(references: Sequence, count: int) -> list:
    """A row's references in so many cells."""
    return [*references, *[None] * (count - len(references))]


def grid(
    columns: Sequence[str],
    rows: Sequence[GridRow],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    cell: int = CELL,
):
    """Draws a grid as a `PIL.Image`; `notes` stand under the columns, in lines.

    Every picture is resized to `cell` pixels on its longer side, keeping its aspect and never
    cropped, and centred in its cell. Cells are as wide as the widest picture, and as high as the
    highest of their row.
    """
    return _drawn(columns, rows, title, notes, cell)[0]


def _drawn(
    columns: Sequence[str], rows: Sequence[GridRow], title: str, notes: Sequence[str], cell: int
) -> tuple[Image.Image, list[list[Cell | None]]]:
    """A grid, and where its pictures are."""
    _check(columns, rows)
    sizes = [[_fit(image, cell) for image in row.images if image is not None] for row in rows]
    width = max((w for row in sizes for w, _ in row), default=cell)
    heights = [max((h for _, h in row), default=width) for row in sizes]
    small = max(12, round(cell / 22))
    line = round(small * 1.35)
    inner = len(columns) * (width + GAP) - GAP

    captions = [_wrap(_typable(row.caption), inner, small) for row in rows]
    top = MARGIN + (round(line * 1.5) if title else 0) + line + GAP
    total = top + sum(heights) + MARGIN * len(rows)
    total += sum(line * len(lines) + GAP // 2 for lines in captions if lines)
    below = [note.split("\n") for note in notes]
    total += line * max(map(len, below), default=0)
    sheet = Image.new("RGB", (inner + 2 * MARGIN, total), BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    if title:
        size = round(small * 1.15)
        draw.text((MARGIN, MARGIN), _cut(title, inner, size), INK, _font(title, size))
    for i, name in enumerate(columns):
        centre = MARGIN + i * (width + GAP) + width // 2
        name = _cut(name, width, small)
        draw.text((centre, top - GAP), name, INK, _font(name, small), anchor="md")
    y, cells = top, []
    for row, lines, height in zip(rows, captions, heights, strict=True):
        cells.append([])
        for i, image in enumerate(row.images):
            x = MARGIN + i * (width + GAP)
            if image is None:
                cells[-1].append(None)
                draw.rectangle((x, y, x + width - 1, y + height - 1), EMPTY)
                middle = (x + width // 2, y + height // 2)
                draw.text(middle, "none", FAINT, _font("none", small), anchor="mm")
                continue
            w, h = _fit(image, cell)
            place = (x + (width - w) // 2, y + (height - h) // 2)
            sheet.paste(_resized(image, (w, h)), place)
            cells[-1].append(Cell(*place, w, h, image.shape[1], image.shape[0]))
        y += height + (GAP // 2 if lines else 0)
        for text in lines:
            draw.text((MARGIN, y), text, FAINT, _font(text, small))
            y += line
        y += MARGIN
    for i, lines in enumerate(below):
        centre = MARGIN + i * (width + GAP) + width // 2
        for k, text in enumerate(_cut(text, width, small) for text in lines):
            draw.text((centre, y + k * line), text, INK, _font(text, small), anchor="ma")
    return sheet, cells


def save_grid(
    path: str | os.PathLike,
    columns: Sequence[str],
    rows: Sequence[GridRow],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    cell: int = CELL,
) -> None:
    """Writes a grid as a PNG file, whole or not at all; its labels can be had by `read_labels`."""
    path = epath.Path(path)
    sheet, cells = _drawn(columns, rows, title, notes, cell)
    captions = [row.caption for row in rows]
    labels = {"title": title, "columns": list(columns), "captions": captions, "cells": cells}
    info = PngImagePlugin.PngInfo()
    text = json.dumps(labels, ensure_ascii=False).encode("utf-8", "replace")  # halves of letters
    info.add_itxt(LABELS, text.decode())
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG", pnginfo=info)
    make_folder(path.parent)
    with atomic_file(path) as file:
        file.write(encoded.getbuffer())


def shrunk(image: UInt8[np.ndarray, "_H _W 3"]) -> UInt8[np.ndarray, "_h _w 3"]:
    """A picture as a grid shows it: of many rows only these are kept until it is drawn."""
    return np.asarray(_resized(image, _fit(image, CELL)))


def save_picture(
    path: str | os.PathLike, image: UInt8[np.ndarray, "h w 3"], about: Mapping[str, str]
) -> None:
    """A PNG file that says how it was made, written whole or not at all."""
    info = PngImagePlugin.PngInfo()
    for name, text in about.items():
        info.add_text(name, text)  # Latin-1 where it can be: not all programs read other chunks
    with atomic_file(path) as file:
        Image.fromarray(image).save(file, "PNG", pnginfo=info)


def read_labels(image: Image.Image) -> Labels | None:
    """The labels of an opened PNG file; None if it is not one of `save_grid`'s."""
    try:
        labels = parse_json(getattr(image, "text", {}).get(LABELS, "null"), "labels")
    except UserError:
        return None
    if not isinstance(labels, dict) or labels.keys() != {"title", "columns", "captions", "cells"}:
        return None
    texts = (labels["columns"], labels["captions"])
    if not all(isinstance(own, list) and all(isinstance(t, str) for t in own) for own in texts):
        return None
    columns, captions = map(tuple, texts)
    cells = _cells(labels["cells"], len(captions), len(columns), image.size)
    return None if cells is None else Labels(str(labels["title"]), columns, captions, cells)


def _cells(
    found: Any, rows: int, columns: int, size: tuple[int, int]
) -> tuple[tuple[Cell | None, ...], ...] | None:
    """Cells as a file has them; None if these are no cells of such a grid."""
    is_row = lambda row: isinstance(row, list) and len(row) == columns
    if not isinstance(found, list) or len(found) != rows or not all(map(is_row, found)):
        return None
    for own in (own for row in found for own in row if own is not None):
        whole = isinstance(own, list) and len(own) == 6 and all(type(n) is int for n in own)
        if not whole or min(own) < 0 or min(own[2:]) < 1:
            return None
        x, y, width, height, *_ = own
        if x + width > size[0] or y + height > size[1]:
            return None
    return tuple(tuple(None if own is None else Cell(*own) for own in row) for row in found)


def sample_path(workdir: str | os.PathLike, step: int) -> epath.Path:
    """Where the grid of a step stands."""
    return epath.Path(workdir) / FOLDER / f"step_{step:06d}.png"


def sample_files(workdir: str | os.PathLike) -> list[tuple[int, epath.Path]]:
    """(step, file) of every grid of a run, by step."""
    found = []
    for path in (epath.Path(workdir) / FOLDER).glob("step_*.png"):
        match = re.fullmatch(r"step_(\d+)\.png", path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def _check(columns: Sequence[str], rows: Sequence[GridRow]) -> None:
    for number, row in enumerate(rows):
        if len(row.images) != len(columns):
            raise ValueError(f"row {number}: {len(row.images)} images, {len(columns)} columns")
        for image in row.images:
            if image is not None and (
                image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size
            ):
                raise ValueError(
                    f"row {number}: an image is uint8 [h, w, 3], not {image.dtype} {image.shape}"
                )


def _fit(image: np.ndarray, cell: int) -> tuple[int, int]:
    """Width and height with the longer side `cell`."""
    h, w = image.shape[:2]
    scale = cell / max(h, w)
    return max(1, round(w * scale)), max(1, round(h * scale))


def _resized(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    picture, how = Image.fromarray(np.asarray(image)), Image.Resampling.BICUBIC
    if size[0] < picture.width:
        how = Image.Resampling.LANCZOS
    elif size[0] >= ENLARGED * picture.width:
        how = Image.Resampling.NEAREST
    return picture.resize(size, how)


@functools.cache
def _load_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font by file name, Pillow's own if the name is empty; None if it is not installed."""
    if not name:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@functools.cache
def _has(name: str, letter: str) -> bool:
    """Whether a font has the letter, rather than a box in its place."""
    font = _load_font(name, 16)
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010fffe"))


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    return _load_font(_font_name(text), size)


def _font_name(text: str) -> str:
    """The first installed font that has every letter of the text; else Pillow's own."""
    letters = set(text)
    for name in ("", *OTHER_FONTS):
        if _load_font(name, 16) is not None and all(_has(name, letter) for letter in letters):
            return name
    return ""


def _typable(text: str) -> str:
    """The text without letters that no font at hand has, or a remark if little would be left."""
    text = text.encode("utf-8", "replace").decode()  # halves of surrogate pairs
    name = _font_name(text)
    kept = "".join(
        # é is better read as e than left out
        letter if _has(name, letter) else unicodedata.normalize("NFKD", letter)[:1]
        for letter in text
    )
    kept = "".join(letter for letter in kept if _has(name, letter))
    return kept if len(kept) * 2 >= len(text) else "(no installed font has this caption's letters)"


def _fitting(text: str, width: int, size: int, end: str = "") -> int:
    """How many letters of the text, followed by `end`, fit into `width` pixels."""
    font = _font(text, size)
    if font.getlength(text + end) <= width:
        return len(text)
    fits = lambda count: font.getlength(text[:count].rstrip() + end) > width
    return bisect.bisect_left(range(len(text)), True, key=fits) - 1


def _cut(text: str, width: int, size: int) -> str:
    """The text, or as much of it as fits, and an ellipsis."""
    if _fitting(text, width, size) == len(text):
        return text
    return text[: max(0, _fitting(text, width, size, ELLIPSIS))].rstrip() + ELLIPSIS


def _wrap(text: str, width: int, size: int) -> list[str]:
    """At most `CAPTION_LINES` lines; the last one is cut if there is more."""
    words = " ".join(text.split())[: CAPTION_LINES * width]
    lines = []
    while words and len(lines) < CAPTION_LINES - 1:
        fits = max(1, _fitting(words, width, size))
        space = words.rfind(" ", 0, fits + 1)
        if fits < len(words) and space > fits // 2:  # else one long word, or no spaces at all
            fits = space
        lines.append(words[:fits])
        words = words[fits:].lstrip()
    return [*lines, _cut(words, width, size)] if words else lines
