"""An image as the vision tower of Qwen3-VL takes it: resized, normalised, cut into patches.

Equal to transformers' torch image processor, without torch: the resizing is ours (`resample`), the
rest is transformers' Pillow image processor, given an image that needs no resizing.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl

from dopsd_jax.data.resample import resize_bicubic
from dopsd_jax.errors import UserError
from dopsd_jax.fields import Fields

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
            std=fields.numbers("image_std", 3),
        )
        if any(s <= 0 for s in settings.std):
            fields.problem(f"field image_std is {list(settings.std)}; it must be above zero")
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
    rows, columns = qwen2_vl.smart_resize(
        height, width, settings.multiple, settings.min_pixels, settings.max_pixels
    )
    return rows // settings.patch_size, columns // settings.patch_size


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
    found = _processor(settings)(
        images=[resize_bicubic(image, size)], input_data_format="channels_last", do_resize=False
    )
    return np.asarray(found["pixel_values"], np.float32), grid


@functools.cache
def _processor(settings: ImageSettings) -> qwen2_vl.Qwen2VLImageProcessorPil:
    return qwen2_vl.Qwen2VLImageProcessorPil(
        patch_size=settings.patch_size,
        temporal_patch_size=settings.temporal_patch_size,
        merge_size=settings.merge_size,
        image_mean=settings.mean,
        image_std=settings.std,
    )
