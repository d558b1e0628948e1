"""Pictures shown in several ways, each a row of its own: mirrored, other crops, other sizes."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.draws import shares
from dopsd_jax.data.images import crop_name, fit
from dopsd_jax.data.table import DataRow, Derived, RowList, View

LEAST = 0.8  # of the sides of the largest crop that the bucket's shape allows


def views_of(crops: int = 1, mirrored: bool = False, levels: int = 1) -> tuple[View, ...]:
    """The views of a picture: `crops` places, the centre first, each mirrored, at every level.

    Examples:
      >>> [(view.crop, view.mirrored) for view in views_of(crops=2, mirrored=True)]
      [(0, False), (0, True), (1, False), (1, True)]
    """
    sides = (False, True) if mirrored else (False,)
    return tuple(itertools.starmap(View, itertools.product(range(crops), sides, range(levels))))


class Viewed(Derived):
    """Rows in all views, those of a row one behind the other."""

    def __init__(self, rows: RowList, views: Sequence[View]):
        self.rows, self.shown = rows, views

    def __len__(self) -> int:
        return len(self.rows) * len(self.shown)

    def __getitem__(self, i: int) -> DataRow:
        row, view = divmod(range(len(self))[i], len(self.shown))
        return replace(self.rows[row], view=self.shown[view])

    def origins(self, numbers: Sequence[int]) -> list[tuple[RowList, Sequence[int]]]:
        return [(self.rows, [i // len(self.shown) for i in numbers])]

    def views(self, numbers: Sequence[int]) -> list[View]:
        return [self.shown[i % len(self.shown)] for i in numbers]


def cut(
    image: UInt8[np.ndarray, "H W 3"], size: Bucket, view: View, digest: str
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture as a row with this view shows it; `digest`: of its file, decides the crops."""
    if view.crop:
        box = crop_box(image.shape[1], image.shape[0], size, view.crop, digest)
        picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, box=box)
        image = np.asarray(picture)
    else:
        image = fit(image, *size)
    return np.ascontiguousarray(image[:, ::-1]) if view.mirrored else image


def crop_box(
    width: int, height: int, size: Bucket, crop: int, digest: str
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a crop of the bucket's shape, at a random place.

    Its sides are 0.8 to 1 of the largest that there is, and never fewer pixels than the bucket has
    where the picture itself has them.
    """
    scale = min(width / size.width, height / size.height)  # of the largest crop
    least = min(1.0, max(LEAST, 1 / scale))
    side, across, down = shares(3, int(digest[:32], 16), crop).tolist()
    scale *= least + (1 - least) * side
    crop_width, crop_height = size.width * scale, size.height * scale
    left = max(0.0, (width - crop_width) * across)
    top = max(0.0, (height - crop_height) * down)
    return left, top, min(width, left + crop_width), min(height, top + crop_height)


def view_name(size: Bucket, view: View) -> str:
    """Names what `cut` does, for cache keys; to be changed whenever its pixels change."""
    name = crop_name(*size)
    if view.crop:
        name += f" random-crop-1:{view.crop}"
    return name + " mirrored" * view.mirrored
