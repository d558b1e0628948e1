"""Reference pictures as FLUX.2-klein is given them: never enlarged, each of its own shape."""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dopsd_jax.common.errors import UserError

REFERENCE = "reference"  # features of this name, with a number from 0
LEAST_SIDE, MOST_RATIO = 64, 8  # the published pipeline's bounds


def reference_size(
    height: int, width: int, pixels: int, multiple: int, where: str = ""
) -> tuple[int, int]:
    """Height and width of a picture as a reference of at most `pixels`.

    multiple: of both, pixels a side of a cell of the model's latent. Raises `UserError` naming
    `where` for one that is too small or too long.
    """
    where = where or "a reference picture"
    if min(height, width) < LEAST_SIDE:
        raise UserError(
            f"{where}: is {width}x{height}; a reference has at least {LEAST_SIDE} pixels a side"
        )
    if max(height, width) > MOST_RATIO * min(height, width):
        raise UserError(
            f"{where}: is {width}x{height}; a reference is at most {MOST_RATIO} times as long as "
            "wide; cut it"
        )
    height, width = _shrunk(height, width, pixels)
    if min(height, width) < multiple:
        raise UserError(
            f"{where}: {width}x{height} is left of it under config.teacher.reference_pixels = "
            f"{pixels}; allow more"
        )
    return height - height % multiple, width - width % multiple


def prepare_reference(
    picture: UInt8[np.ndarray, "H W 3"], pixels: int, multiple: int, where: str = ""
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture, made smaller if it has more than `pixels`, and cut around its middle."""
    height, width = picture.shape[:2]
    rows, columns = reference_size(height, width, pixels, multiple, where)
    if height * width > pixels:
        height, width = _shrunk(height, width, pixels)
        small = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
        picture = np.asarray(small)
    top, left = (height - rows) // 2, (width - columns) // 2
    return picture[top : top + rows, left : left + columns]


def _shrunk(height: int, width: int, pixels: int) -> tuple[int, int]:
    if height * width <= pixels:
        return height, width
    scale = math.sqrt(pixels / (width * height))
    return int(height * scale), int(width * scale)
