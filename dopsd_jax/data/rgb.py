"""Any picture Pillow decodes, as 8-bit sRGB."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

CONVERT = "convert it to PNG or JPEG"
REFUSED_MODES = ("F", "I", "LAB", "HSV")
_BITS = {"L;2": 2, "L;4": 4}  # of grey in a file, by Pillow's name for it
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262
_ICC_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


class UnsupportedModeError(ValueError):
    """The picture's kind of pixels is not read as sRGB: why, and what to do."""


def to_srgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """A decoded picture as 8-bit sRGB in mode RGB, and notes on what that took.

    16-bit grey is scaled (not clipped), transparency is laid on white, and colours go through an
    embedded ICC profile. Raises `UnsupportedModeError` for float, 32-bit, Lab and HSV pixels, and
    for 16-bit colour of which one is transparent.
    """
    notes = []
    _scale_clear_value(image)
    profile = image.info.get("icc_profile")
    if _sixteen_bits(image):
        notes.append("16 bits a channel reduced to 8")
        if image.mode.startswith("I"):
            image = _grey_from_16(image)
    if image.mode in REFUSED_MODES:
        raise UnsupportedModeError(f"pixels of kind {image.mode} have no one meaning; {CONVERT}")

    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image, seen = _on_white(image)
        if seen:
            notes.append("transparency laid on white")
    if grey:
        image = image.convert("L")
    elif image.mode != "CMYK":
        image = image.convert("RGB")

    if profile:
        image, note = _through_profile(image, profile)
        if note:
            notes.append(note)
    if image.mode == "CMYK":
        notes.append("CMYK without a usable ICC profile: colours are approximate")
    return image.convert("RGB"), tuple(notes)


def opacity(image: Image.Image) -> Image.Image:
    """How opaque a decoded picture is, as 8-bit grey. Raises `UnsupportedModeError`."""
    _scale_clear_value(image)
    if image.mode.startswith("I") and _sixteen_bits(image):
        image = _grey_from_16(image)
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _sixteen_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or ";16" in image.info.get("in_file", "")


def mark_depth(image: Image.Image) -> None:
    """Remembers in `image.info`, before decoding, the pixels that the file has.

    Pillow reads 16-bit colour as the upper 8 bits, and scales grey of 2 and 4 bits; it forgets the
    depth when it decodes.
    """
    image.info["in_file"] = " ".join(str(tile[3]) for tile in image.tile)


def _scale_clear_value(image: Image.Image) -> None:
    """Makes the value that a PNG marks as transparent one of the decoded pixels."""
    clear, kind = image.info.get("transparency"), image.info.get("in_file", "")
    if kind in _BITS and isinstance(clear, int):
        top = 2 ** _BITS[kind] - 1
        image.info["transparency"] = (clear & top) * (255 // top)
    if image.mode == "RGB" and clear is not None and _sixteen_bits(image):
        raise UnsupportedModeError(
            "has 16-bit colours, of which one is transparent; save it with 8 bits"
        )


def _grey_from_16(image: Image.Image) -> Image.Image:
    """Mode I;16* as mode L (LA, if one value is marked transparent)."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_TIFF_BITS, (16,))
    top = 2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1  # 12-bit TIFFs come as I;16 too
    values = np.asarray(image).astype(np.uint32)
    clear = image.info.get("transparency")
    scaled = ((values * 255 + top // 2) // top).clip(max=255).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # white is zero, which Pillow does not undo at 16 bits
        scaled = 255 - scaled
    grey = Image.fromarray(scaled)
    if isinstance(clear, int):
        grey = Image.merge(
            "LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        )
    return grey


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture over white, and whether any of it was transparent."""
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema()[0] == 255:
        return image.convert("RGB"), False
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB"), True


def _through_profile(image: Image.Image, profile: bytes) -> tuple[Image.Image, str | None]:
    """The picture in sRGB if the profile fits and changes anything; a note if it did or cannot."""
    try:
        space, name = _describe(profile)
        mode = _ICC_SPACES.get(space)
        if mode == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if mode != image.mode:
            return image, f"ICC profile is for {space}, the picture is {image.mode}: ignored"
        transform = _transform(profile, mode)
        if transform is None:
            return image, None
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        return image, f"unreadable ICC profile ignored ({error})"
    return converted, f"converted to sRGB from ICC profile {name!r}"


@functools.lru_cache(maxsize=32)
def _describe(profile: bytes) -> tuple[str, str]:
    """Colour space and name of an ICC profile."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    name = ImageCms.getProfileDescription(opened).strip()
    return opened.profile.xcolor_space.strip(), name


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB; None when it moves no colour by more than 1/255, as sRGB itself."""
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE  # no state to share
    # The usual table of 33 greys is off by up to 10/255 in the shadows of linear pictures.
    exact = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.HIGHRESPRECALC
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags | exact,
    )
    if mode == "CMYK":
        return transform
    ramp = np.arange(256, dtype=np.uint8)
    if mode == "RGB":
        levels = ramp[::15]
        grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    else:
        grid = ramp[None]
    probe = Image.fromarray(grid)
    moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    plain = np.asarray(probe.convert("RGB")).astype(int)
    return None if np.abs(moved - plain).max() <= 1 else transform
