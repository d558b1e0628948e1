"""Fréchet distance between two sets of pictures, on features that need no weights.

The features are made by hand, so that figures stay comparable when the miniature is trained again,
and so that their meaning is known: which colours are where (means over a grid), and how much change
there is, in which direction, at three scales (fine: crispness and textures; coarse: shapes). They
see a blur, a shift of hue, a missing or misplaced object, and noise. Features of the miniature's
own networks would change with it; random projections measure about the same, but without a clear
meaning. The figure is not comparable with the FID of Inception features.
"""

import numpy as np
from jaxtyping import Float, UInt8

NAME = "colours-edges-1"  # to be changed whenever the features change
GRID, HALVES, SCALES = 4, 2, 3
# Each group's share of the distance is of the same order between unlike pictures.
COLOUR, EDGE = 10.0, 30.0


def features(images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n d"]:
    """84 features of pictures whose sides are multiples of 16."""
    pixels = images.astype(np.float64) / 255
    found = [COLOUR * _pool(pixels, GRID)]
    for _ in range(SCALES):
        found.append(EDGE * _edges(pixels))
        n, h, w, c = pixels.shape
        pixels = pixels.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return np.concatenate([f.reshape(len(pixels), -1) for f in found], 1)


def _pool(values: Float[np.ndarray, "n h w c"], cells: int) -> Float[np.ndarray, "n k k c"]:
    n, h, w, c = values.shape
    return values.reshape(n, cells, h // cells, cells, w // cells, c).mean((2, 4))


def _edges(pixels: Float[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 2 2 3"]:
    """Mean change across, down and diagonally, in each quarter of the picture."""
    padded = np.pad(pixels, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    across = padded[:, :-1, 1:] - padded[:, :-1, :-1]
    down = padded[:, 1:, :-1] - padded[:, :-1, :-1]
    both = across + down
    size = np.stack([np.linalg.norm(d, axis=-1) for d in (across, down, both)], -1)
    return _pool(size, HALVES)


def frechet(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Squared Fréchet distance of the Gaussians with the moments of two sets of features.

    |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), covariances over n.
    Small sets read too large, the smaller the more: compare figures of equal counts, and with the
    floor.
    """
    shift = a.mean(0) - b.mean(0)
    cov_a, cov_b = (np.cov(x, rowvar=False, ddof=0) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
