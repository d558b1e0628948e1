"""An image as the vision tower of Qwen3-VL takes it: resized, normalised, cut into patches.

Equal to transformers' torch image processor, in NumPy: transformers' image processors import
PyTorch where it is installed, which costs seconds of every start and half a gigabyte.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.models.resample import resize_bicubic

PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
BICUBIC = 3  # in Pillow's numbering
MAX_ASPECT = 200  # the processor refuses a longer side of more than so many shorter ones


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """Settings of the image processor, as in preprocessor_config.json.

    Attributes:
      min_pixels, max_pixels: bounds of the area after resizing. The file calls them `shortest_edge`
        and `longest_edge`.
      merge_size: patches a side that become one position in the text.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_dict(
        cls,
        json_dict: Any,
        where: str,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> "ImageSettings":
        """Reads preprocessor_config.json; `where` names the file in errors.

        `min_pixels` and `max_pixels` replace the file's. Raises `UserError` with every missing or
        unsupported field.
        """
        fields = Fields(json_dict, where)
        fields.only("image_processor_type", *PROCESSORS)
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            fields.only(name, True, None)
        fields.only("resample", BICUBIC, None)
        fields.only("rescale_factor", 1 / 255, None)
        size = fields.part("size")
        low, high = size.count("shortest_edge"), size.count("longest_edge")
        # Where the older names stand too, the processor takes those.
        low = fields.count("min_pixels") if fields.json.get("min_pixels") is not None else low
        high = fields.count("max_pixels") if fields.json.get("max_pixels") is not None else high
        settings = cls(
            patch_size=fields.count("patch_size"),
            temporal_patch_size=fields.count("temporal_patch_size"),
            merge_size=fields.count("merge_size"),
            min_pixels=low if min_pixels is None else min_pixels,
            max_pixels=high if max_pixels is None else max_pixels,
            mean=fields.numbers("image_mean", 3),
            std=fields.numbers("image_std", 3, positive=True),
        )
        if 0 not in (low, high) and not 0 < settings.min_pixels <= settings.max_pixels:
            fields.problem(
                f"area bounds {settings.min_pixels} to {settings.max_pixels} are empty; "
                "min_pixels must be positive and at most max_pixels"
            )
        fields.finish()
        return settings

    @property
    def multiple(self) -> int:
        """Both sides of a resized image are multiples of it."""
        return self.patch_size * self.merge_size


def grid_of(settings: ImageSettings, height: int, width: int, where: str) -> tuple[int, int]:
    """Patch rows and columns of an image of these sides. Raises `UserError` naming `where`."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"{where}: {width} x {height} pixels; one side is more than {MAX_ASPECT} times the "
            "other; crop the image"
        )
    rows, columns = _resized(height, width, settings)
    return rows // settings.patch_size, columns // settings.patch_size


def _resized(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """Sides near these that are multiples, with an area within the bounds where that can be.

    `smart_resize` of transformers; its roundings decide how many tokens a picture has.
    """
    multiple = settings.multiple
    rows, columns = (round(side / multiple) * multiple for side in (height, width))
    if rows * columns > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        fit = lambda side: max(multiple, math.floor(side / shrink / multiple) * multiple)
    elif rows * columns < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        fit = lambda side: math.ceil(side * grow / multiple) * multiple
    else:
        return rows, columns
    return fit(height), fit(width)


def preprocess(
    image: UInt8[np.ndarray, "h w 3"], settings: ImageSettings, where: str = "image"
) -> tuple[Float[np.ndarray, "p c"], tuple[int, int]]:
    """Patches, float32, in merge-block order and their grid (patch rows, patch columns).

    A patch is flattened in the order (channel, frame, row, column); the one image stands for every
    frame. `where` names the image in a `UserError`.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{where}: {image.dtype} {image.shape} is not an 8-bit RGB image")
    grid = grid_of(settings, *image.shape[:2], where)
    size = (grid[0] * settings.patch_size, grid[1] * settings.patch_size)
    pixels = resize_bicubic(image, size).astype(np.float64) * (1 / 255)
    mean, std = np.float32(settings.mean), np.float32(settings.std)
    pixels = (pixels.astype(np.float32) - mean) / std
    merge, patch = settings.merge_size, settings.patch_size
    blocks = pixels.reshape(grid[0] // merge, merge, patch, grid[1] // merge, merge, patch, 3)
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    frames = np.repeat(patches, settings.temporal_patch_size, axis=5)
    return frames.reshape(grid[0] * grid[1], -1), grid
