"""Masks: which places of a picture count in the loss. White counts, black does not.

A mask is a file beside its picture (`a_mask.png`, `a-masklabel.png`, or `masks/a.png` for `a.png`),
or the picture's own transparency. It is cut as its picture is, and averaged to the latent's cells.
"""

import functools
import hashlib
import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.images import ImageInfo, ImageLimits, open_alpha, open_image
from dopsd_jax.data.sources.collector import listing
from dopsd_jax.data.sources.files import normal, stem_of
from dopsd_jax.data.strings import Strings
from dopsd_jax.data.table import DataRow, Derived, RowList, View
from dopsd_jax.data.views import cut

OFF, FILES, ALPHA = KINDS = ("off", "files", "alpha")  # of config.data.masks
ENDINGS = ("_mask", "-mask", ".mask", "-masklabel")  # of stems
FOLDERS = ("mask", "masks")
WHOLE = ("white everywhere",)  # the notes of a mask that changes nothing
_COLOURED = 48  # of 255: channels further apart than that are no grey, JPEG's errors included


class Masked(Derived):
    """Rows with the mask files that lie beside their pictures."""

    def __init__(self, rows: RowList, masks: Iterable[str]):
        self.rows, self.masks = rows, Strings(masks)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> DataRow:
        row, mask = self.rows[i], self.masks[i]
        return replace(row, mask=Path(mask)) if mask else row

    def origins(self, numbers: Sequence[int]) -> list[tuple[RowList, Sequence[int]]]:
        return [(self.rows, numbers)]

    def any(self) -> bool:
        """Whether a row has one."""
        return any(map(bool, self.masks))


def with_masks(rows: RowList) -> Masked:
    """The rows with their mask files. Raises `UserError` for several of a picture."""
    faults, found, images = [], [], set()
    for row in rows:
        path = str(row.image)
        images.add(os.path.realpath(path))
        masks = _files_of(path)
        if len(masks) > 1:
            faults.append(f"{path}: has several masks, {listing(masks)}; keep one")
        found.append(masks[0] if masks else "")
    faults += [
        f"{mask}: is a mask and a picture of the data set as well; remove its row, or rename it"
        for mask in dict.fromkeys(found)
        if mask and os.path.realpath(mask) in images
    ]
    raise_if(faults)
    return Masked(rows, found)


def none_found(where: str) -> UserError:
    """No picture of the data sets `where` has a mask file."""
    return UserError(
        f"{where}: config.data.masks = {FILES}, and no picture has a mask; put a_mask.png "
        f"beside a.png or a.png into a folder {FOLDERS[1]} there, or set it to {OFF}"
    )


def is_mask(
    where: str,
    top: str,
    stem: str,
    pictures: Container[str],
    folders: Sequence[str] = FOLDERS,
    endings: Sequence[str] = ENDINGS,
) -> bool:
    """Whether a picture in the folder `where`, `top` or one below it, is a mask by its name.

    pictures: all stems of the folder; folders, endings: the names of folders and the endings of
    stems that masks have.
    """
    if where != top and os.path.basename(where).lower() in folders:
        return True
    return any(stem.endswith(end) and stem.removesuffix(end) in pictures for end in endings)


def _files_of(path: str) -> list[str]:
    """The masks of a picture."""
    folder, stem = os.path.dirname(path), normal(stem_of(path) or os.path.basename(path))
    found = [file for end in ENDINGS for file in _stems(folder).get(stem + end, ())]
    for name in _folders(folder):
        found += _stems(os.path.join(folder, name)).get(stem, ())
    return found


@functools.lru_cache(64)
def _stems(folder: str) -> dict[str, list[str]]:
    """The pictures of a folder by stem."""
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder or ".")):
        path = os.path.join(folder, name)
        if not name.startswith(".") and (stem := stem_of(path)) is not None:
            found.setdefault(normal(stem), []).append(path)
    return found


@functools.lru_cache(64)
def _folders(folder: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder or ".") if name.lower() in FOLDERS)
    return [name for name in names if os.path.isdir(os.path.join(folder, name))]


def forget() -> None:
    """Folders are listed anew: they may have changed."""
    _stems.cache_clear()
    _folders.cache_clear()


def open_mask(row: DataRow, limits: ImageLimits | None = None) -> UInt8[np.ndarray, "H W"]:
    """The mask of a row that has one, as large as its picture: 255 counts. Raises `UserError`."""
    if row.mask is None:
        return open_alpha(row.image, limits)
    if open_alpha(row.mask, limits).min() < 255:
        raise UserError(f"{row.mask}: is transparent in places; save the mask as black and white")
    image = open_image(row.mask, limits)
    if int(np.ptp(image, axis=2).max()) > _COLOURED:
        raise UserError(
            f"{row.mask}: has colours, and a mask is black, white or grey; save it so, or rename "
            "it if it is none"
        )
    return image[..., 1]


def inspect_mask(row: DataRow, limits: ImageLimits) -> ImageInfo:
    """Size and digest of a row's mask; its notes are `WHOLE` if it is white. Raises `UserError`."""
    mask, path = open_mask(row, limits), row.mask or row.image
    if not mask.any():
        what = "is black everywhere" if row.mask else "is transparent everywhere"
        raise UserError(f"{path}: {what}, so nothing of its picture counts; correct or remove it")
    digest = hashlib.sha256(mask.tobytes()).hexdigest()
    height, width = mask.shape
    return ImageInfo(width, height, digest, WHOLE if mask.min() == 255 else ())


def faults(row: DataRow, picture: ImageInfo, mask: ImageInfo | UserError | None) -> list[str]:
    """What is wrong with the mask of a row, as it was found."""
    if mask is None:
        return []
    if isinstance(mask, UserError):
        return list(mask.problems)
    size, own = (mask.width, mask.height), (picture.width, picture.height)
    if size != own:
        return [
            f"{row.mask}: is {size[0]}x{size[1]}, and its picture {row.image} is "
            f"{own[0]}x{own[1]}; make the mask as large as the picture"
        ]
    return []


def cut_mask(
    mask: UInt8[np.ndarray, "H W"], size: Bucket, view: View, digest: str, factor: int
) -> UInt8[np.ndarray, "h w"]:
    """The mask on the latent's cells of `factor` pixels a side; `digest`: of its picture."""
    pixels = cut(np.repeat(mask[..., None], 3, axis=2), size, view, digest)[..., 0]
    cells = pixels.reshape(size.height // factor, factor, size.width // factor, factor)
    return np.round(cells.mean((1, 3))).astype(np.uint8)


def region(cells: UInt8[np.ndarray, "h w"], floor: float) -> Float[np.ndarray, "h w 1"]:
    """How much each cell counts, 1 on average; black ones count `floor` times as much as white.

    Of a crop that shows nothing of the white nothing counts.
    """
    if not cells.any():
        return np.zeros((*cells.shape, 1), np.float32)
    weight = floor + (1 - floor) * cells.astype(np.float64) / 255
    return (weight / weight.mean()).astype(np.float32)[..., None]
