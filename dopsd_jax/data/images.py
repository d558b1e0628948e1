"""Pictures from files: checked, decoded, and cut to a bucket."""

import contextlib
import functools
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float64, Int64, UInt8
from PIL import ExifTags, Image, ImageOps

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import open_regular
from dopsd_jax.data import heic
from dopsd_jax.data.blobs import Blob
from dopsd_jax.data.rgb import CONVERT, UnsupportedModeError, mark_depth, opacity, to_srgb

# Names of Pillow's readers.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", heic.FORMAT)
Sides = int | Int64[np.ndarray, " n"]  # of a picture, or of many
FIRST_BYTES = 16  # enough for `format_of`
# Bytes of a file; the second for formats that Pillow reads whole, which pack their pixels well.
MAX_FILE, MAX_PACKED = 1 << 30, 1 << 27
PACKED = ("WEBP", "AVIF", heic.FORMAT)
# Phones add a second view, a preview or the shots before and after; the first picture is meant.
WITH_MORE = ("MPO", heic.FORMAT)

# What Pillow's decoders raise on damaged files.
DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
    RuntimeError,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageLimits:
    """What a picture must keep to."""

    max_pixels: int = 150_000_000  # a file can claim any size; this much is 450 MB decoded
    min_side: int = 32  # pixels; smaller ones hold nothing to learn from
    max_aspect: float = 8.0  # long side / short side; a crop would keep too little


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Size as displayed, content digest (sha256 of the file) and notes for the user."""

    width: int
    height: int
    digest: str
    notes: tuple[str, ...]


def open_image(
    path: str | Path | Blob, limits: ImageLimits | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes a picture: upright, flattened on white, 8-bit sRGB. Raises `UserError`."""
    path = Path(path) if isinstance(path, str) else path
    with _reading(path) as file:
        image, _ = _decode(path, file, _header(path, file, limits or ImageLimits()))
        return np.asarray(image)


def open_alpha(
    path: str | Path | Blob, limits: ImageLimits | None = None
) -> UInt8[np.ndarray, "H W"]:
    """How opaque a picture is, upright; 255 everywhere if it says nothing. Raises `UserError`."""
    path = Path(path) if isinstance(path, str) else path
    with _reading(path) as file:
        header = _header(path, file, limits or ImageLimits())
        image, _ = _decode(path, file, header, lambda image: (opacity(image), ()))
        return np.asarray(image)


def inspect_image(
    path: str | Path | Blob, limits: ImageLimits | None = None, *, verify: bool = True
) -> ImageInfo:
    """Checks a picture and tells its size and digest. Raises `UserError`.

    With `verify` the pixels are decoded too; without it damage behind the header is not found.
    """
    path = Path(path) if isinstance(path, str) else path
    with _reading(path) as file:
        limits, notes = limits or ImageLimits(), ()
        # `_decode` alone holds the picture, and drops its pixels before it makes others.
        if verify:
            image, notes = _decode(path, file, _header(path, file, limits))
            width, height = image.size
        else:
            width, height = _upright_size(path, _header(path, file, limits))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ImageInfo(width, height, digest, notes)


@contextlib.contextmanager
def _reading(path: Path | Blob) -> Iterator[BinaryIO]:
    """Opens a file for reading; a fault of the file system is a `UserError`."""
    if not isinstance(path, Blob) and not os.path.exists(path):
        raise UserError(f"{path}: no such picture; correct the path")
    try:
        with path.open() if isinstance(path, Blob) else open_regular(path) as file:
            if not file.read(1):
                raise UserError(f"{path}: is empty (zero bytes); replace or remove it")
            file.seek(0)
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from error


def format_of(prefix: bytes) -> str | None:
    """Pillow's name of the format of a picture, by its first bytes; None for anything else."""
    Image.init()
    heic.available()
    for name in FORMATS:
        _, accepts = Image.OPEN.get(name, (None, None))
        if accepts is not None and accepts(prefix) is True:
            return name
    return None


def _header(path: Path | Blob, file: BinaryIO, limits: ImageLimits) -> Image.Image:
    """The picture with only its header read, after all checks that need no pixels.

    Pillow's readers are called one by one and not through `Image.open`, whose limit on the size is
    a global of the process.
    """
    prefix = file.read(FIRST_BYTES)
    name = format_of(prefix)
    if name is None:
        raise UserError(f"{path}: {_foreign(prefix)}")
    limit = MAX_PACKED if name in PACKED else MAX_FILE
    if file.seek(0, os.SEEK_END) > limit:
        raise UserError(f"{path}: is larger than {limit >> 20} MiB; is this a picture?")
    file.seek(0)
    try:
        image = Image.OPEN[name][0](file, str(path))
    except DECODE_ERRORS as error:
        raise _damaged(path, error) from error

    width, height = image.size
    if width * height > limits.max_pixels:
        raise UserError(
            f"{path}: {width}x{height} is {width * height / 1e6:.0f} megapixels, the limit is "
            f"{limits.max_pixels / 1e6:.0f}; shrink it, or raise data.max_pixels if it is meant"
        )
    if min(width, height) < limits.min_side:
        raise UserError(
            f"{path}: {width}x{height} is smaller than {limits.min_side} pixels on a side; "
            "replace or remove it"
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise UserError(
            f"{path}: {width}x{height} is longer than {limits.max_aspect:g}:1; crop or remove it"
        )
    try:
        frames = getattr(image, "n_frames", 1)
    except DECODE_ERRORS as error:
        raise _damaged(path, error) from error
    if frames > 1 and image.format not in WITH_MORE:
        kind = "pages" if image.format == "TIFF" else "frames (animated)"
        raise UserError(f"{path}: has {frames} {kind}; save the one you mean as PNG or JPEG")
    return image


def _decode(
    path: Path | Blob, file: BinaryIO, image: Image.Image, convert: Callable = to_srgb
) -> tuple[Image.Image, tuple[str, ...]]:
    """The pixels, upright, as sRGB or whatever `convert` makes, and what the user should know."""
    notes: tuple[str, ...] = ()
    try:
        if image.format == "PNG":  # Pillow's decoder ignores the checksums of the pixels
            image.verify()
            file.seek(0)
            image = Image.OPEN["PNG"][0](file, str(path))
        mark_depth(image)
        try:
            image.load()
        except OSError:
            if image.format != "JPEG":
                raise
            image = None  # its pixels, as the next ones come
        if image is None:
            image = _without_end_mark(file)
            notes = ("the JPEG's end mark is missing; all its pixels are there",)
        ImageOps.exif_transpose(image, in_place=True)
        image, more = convert(image)
        return image, notes + more
    except UnsupportedModeError as error:
        raise UserError(f"{path}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory; shrink it") from error
    except DECODE_ERRORS as error:
        raise _damaged(path, error) from error


def _without_end_mark(file: BinaryIO) -> Image.Image:
    """A JPEG of which only the end mark is missing. Raises `OSError` where pixels are too.

    With an end mark the decoder does not notice missing pixels, and invents them. But they depend
    on the bytes before the mark, so two endings give two pictures.
    """
    file.seek(0)
    content = file.read(MAX_PACKED).removesuffix(b"\xff")
    found = set()
    for ending in (b"\x5a" * 64, bytes(64), b""):
        image = None  # one at a time in memory
        image = Image.OPEN["JPEG"][0](io.BytesIO(content + ending + b"\xff\xd9"), "")
        image.load()
        strips = (image.crop((0, y, image.width, y + 64)) for y in range(0, image.height, 64))
        found.add(functools.reduce(lambda total, s: zlib.crc32(s.tobytes(), total), strips, 0))
    if len(found) > 1:
        raise OSError("image file is truncated")
    return image


def _upright_size(path: Path | Blob, image: Image.Image) -> tuple[int, int]:
    """(width, height) after the EXIF orientation; a TIFF's size has it already."""
    width, height = image.size
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS as error:
        raise _damaged(path, error) from error
    if image.format != "TIFF" and orientation in (5, 6, 7, 8):
        return height, width
    return width, height


def _damaged(path: Path | Blob, error: BaseException) -> UserError:
    reason = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):  # some readers have Pillow's own limit
        return UserError(f"{path}: too large for Pillow ({reason}); shrink it")
    return UserError(f"{path}: is damaged or truncated ({reason}); replace or remove it")


def _foreign(prefix: bytes) -> str:
    """What a file is that no reader knows, and what to do."""
    if prefix[4:8] == b"ftyp" and prefix[8:12] in heic.BRANDS and not heic.available():
        return heic.MISSING
    if prefix[4:8] == b"ftyp":
        return f"is a film or a picture of an unknown kind, which cannot be read; {CONVERT}"
    if prefix.lstrip()[:1] in (b"<", b"{"):
        return f"is not a picture but text (a failed download?); {CONVERT}"
    return f"is not a picture of a known format; {CONVERT}"


def fit(image: UInt8[np.ndarray, "H W 3"], width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
    """Scales to cover `width` x `height` (bicubic, antialiased) and crops the centre.

    The scaled sides are rounded and never short of the target, so no edge is made up.
    """
    scaled_width, scaled_height = covering_size(image.shape[1], image.shape[0], width, height)
    picture = Image.fromarray(image)
    if picture.size != (scaled_width, scaled_height):
        picture = picture.resize((scaled_width, scaled_height), Image.Resampling.BICUBIC)
    left, top = (scaled_width - width) // 2, (scaled_height - height) // 2
    return np.asarray(picture)[top : top + height, left : left + width]


def covering_size(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int]:
    """The size after scaling by max(to_width / width, to_height / height), in whole numbers."""
    if to_width * height >= to_height * width:
        return to_width, max(to_height, (2 * height * to_width + width) // (2 * width))
    return max(to_width, (2 * width * to_height + height) // (2 * height)), to_height


def crop_name(width: int, height: int) -> str:
    """Names what `fit` does, for cache keys; to be changed whenever its pixels change."""
    return f"cover-bicubic-centre-1:{width}x{height}"


def enlargement(
    width: Sides, height: Sides, to_width: Sides, to_height: Sides
) -> float | Float64[np.ndarray, " n"]:
    """How many times `fit` enlarges; 1 or less means that no pixels are invented."""
    return np.maximum(to_width / width, to_height / height)
