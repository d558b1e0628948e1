"""Large images in overlapping tiles, blended linearly, so that memory does not grow with the image.

The scheme of diffusers' `enable_tiling`. The result differs from the untiled one, since each tile
is normalised by itself: latents by a fifth of their mean size, in random and in trained small
networks. So only images are cut for which memory would not suffice.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float

from dopsd_jax.common.errors import UserError, raise_if


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How, and from which size on, images are cut.

    Attributes:
      sample_size: side of a tile, in pixels of the image.
      overlap: part of a tile that it shares with its neighbour.
      above: images with more pixels than this are tiled; None: more than one tile has.
    """

    sample_size: int = 1024
    overlap: float = 0.25
    above: int | None = None

    def __post_init__(self):
        size, problems = self.sample_size, []
        if size < 1:
            problems.append(f"tiling.sample_size is {size}; it should be a side in pixels")
        if not 0 <= self.overlap <= 0.5:
            problems.append(f"tiling.overlap is {self.overlap}; it should be between 0 and 0.5")
        if self.above is not None and self.above < size**2:
            problems.append(f"tiling.above is {self.above}; it should be at least {size}**2")
        raise_if(problems)

    def needed(self, sides: tuple[int, int]) -> bool:
        """Whether an image of these sides (pixels) is cut."""
        return math.prod(sides) > (self.sample_size**2 if self.above is None else self.above)

    def sizes(self, factor: int) -> tuple[int, int]:
        """Side of a tile in the image and in the latent (`factor` times smaller).

        Raises `UserError` unless tiles and their overlaps are whole numbers of latent pixels; they
        would not meet otherwise.
        """
        size, latent = self.sample_size, self.sample_size // factor
        if size % factor:
            raise UserError(f"tiling.sample_size is {size}; it should be a multiple of {factor}")
        if latent * self.overlap % 1:
            raise UserError(
                f"tiling.overlap is {self.overlap} of {latent} latent pixels (sample_size {size}); "
                "it should make a whole number"
            )
        return size, latent


def run_tiled(
    function: Callable[[Array], Array],
    x: Float[Array, "b h w c"],
    side_in: int,
    side_out: int,
    overlap: float,
) -> Float[Array, "b h2 w2 c2"]:
    """Applies `function` to tiles of `x` and joins the results.

    A tile of `side_in` gives one of `side_out`, and smaller ones at the right and lower edge in
    proportion. Only one tile is on the device at a time; the rest waits in the host's memory.
    """
    source = np.asarray(jax.device_get(x))
    stride = int(side_in * (1 - overlap))
    blend = int(side_out * overlap)
    kept = side_out - blend
    _, height, width, _ = source.shape

    bands, above = [], []
    for top in range(0, height, stride):
        row, left = [], None
        for column, start in enumerate(range(0, width, stride)):
            tile = source[:, top : top + side_in, start : start + side_in]
            tile = np.array(jax.device_get(function(jax.device_put(tile))))
            if above:
                tile = _blend(above[column], tile, blend, axis=1)
            if left is not None:
                tile = _blend(left, tile, blend, axis=2)
            left = tile
            row.append(tile)
        bands.append(np.concatenate([tile[:, :kept, :kept] for tile in row], axis=2))
        # Of the tiles above only the lower edges are needed from here on.
        above = [tile[:, -blend:] if blend else tile[:, :0] for tile in row]
    return jax.device_put(np.concatenate(bands, axis=1))


def _blend(before: np.ndarray, after: np.ndarray, extent: int, axis: int) -> np.ndarray:
    """Fades from the end of `before` into the beginning of `after`, in place."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if extent == 0:
        return after
    end = np.take(before, range(before.shape[axis] - extent, before.shape[axis]), axis)
    start = after[:, :extent] if axis == 1 else after[:, :, :extent]
    share = np.arange(extent, dtype=np.float32) / extent
    share = share.reshape((1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1)).astype(after.dtype)
    start[...] = end * (1 - share) + start * share
    return after
