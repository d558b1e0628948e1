"""Antialiased bicubic resizing of 8-bit images, bit for bit as PyTorch does it.

Torch-based image processors resize with PyTorch, and Pillow's result is not the same: its weights
have 22 bits instead of 15 (a level of difference here and there), and recent releases change the
order of the two passes where the height shrinks and the width grows (more, wherever a pass clips).
"""

import numpy as np
from jaxtyping import Float, UInt8

REACH = 2.0  # half the kernel's width, in source pixels times the scale when shrinking
KEYS_A = -0.5
WEIGHT_LIMIT = 1 << 15  # weights are 16-bit integers with a sign
MAX_PRECISION = 22


def resize_bicubic(
    image: UInt8[np.ndarray, "h w c"], size: tuple[int, int]
) -> UInt8[np.ndarray, "H W c"]:
    """The image at `size` (rows, columns): columns first, rounded to 8 bits, then rows."""
    rows, columns = size
    if columns != image.shape[1]:
        image = _resize_rows(image.swapaxes(0, 1), columns).swapaxes(0, 1)
    if rows != image.shape[0]:
        image = _resize_rows(image, rows)
    return np.ascontiguousarray(image)


def _resize_rows(image: UInt8[np.ndarray, "h w c"], rows: int) -> UInt8[np.ndarray, "H w c"]:
    weights, precision = integer_weights(image.shape[0], rows)
    # Sums of whole numbers far below 2^53: exact in float64 in any order.
    total = weights @ image.reshape(image.shape[0], -1).astype(np.float64)
    rounded = (total.astype(np.int64) + (1 << (precision - 1))) >> precision
    return np.clip(rounded, 0, 255).astype(np.uint8).reshape(rows, *image.shape[1:])


def integer_weights(source: int, target: int) -> tuple[Float[np.ndarray, "target source"], int]:
    """Weights of the source rows as whole numbers, and how many of their bits are a fraction.

    There are as many fraction bits as let the largest weight fit 16 bits.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    weights = np.zeros((target, source))
    for i in range(target):
        center = scale * (i + 0.5)
        first = max(int(center - REACH * stretch + 0.5), 0)
        last = min(int(center + REACH * stretch + 0.5), source)
        taps = _keys_kernel((np.arange(first, last) - center + 0.5) * (1 / stretch))
        weights[i, first:last] = taps / taps.sum()
    precision, largest = 0, weights.max()
    while precision < MAX_PRECISION and int(0.5 + largest * (2 << precision)) < WEIGHT_LIMIT:
        precision += 1
    scaled = weights * (1 << precision)
    return np.trunc(scaled + np.copysign(0.5, scaled)), precision


def _keys_kernel(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((KEYS_A + 2) * x - (KEYS_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * KEYS_A
    return np.where(x < 1, near, np.where(x < REACH, far, 0.0))
