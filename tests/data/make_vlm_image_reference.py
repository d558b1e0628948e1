"""Writes vlm_image_reference.npz with transformers' torch image processor.

Run it where torch, torchvision and transformers are installed; last made with torch 2.14.1,
torchvision 0.29.1, transformers 5.23.0: `python tests/data/make_vlm_image_reference.py`.
"""

import hashlib
import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
DEFAULT = (65536, 16777216)  # preprocessor_config.json
TEACHER = (512**2, 768**2)  # D-OPSD's teacher
# Height, width, picture, area bounds. The first ones are stored whole, the others as a digest.
WHOLE = [
    (64, 64, "levels", (1024, 65536)),  # nothing to resize
    (50, 80, "noise", (1024, 65536)),
    (45, 101, "noise", (1024, 4096)),  # height grows, width shrinks
    (106, 60, "noise", (1024, 65536)),  # height shrinks, width grows
    (31, 190, "edges", (1024, 65536)),
    (33, 20, "smooth", (4096, 65536)),
]
DIGESTED = [
    (300, 500, "noise", DEFAULT),
    (64, 80, "smooth", DEFAULT),
    (1024, 768, "edges", TEACHER),
    (832, 1248, "smooth", TEACHER),
    (97, 333, "noise", TEACHER),
    (512, 512, "noise", TEACHER),
    (40, 900, "edges", DEFAULT),
]


def picture(height: int, width: int, kind: str) -> np.ndarray:
    """A picture [height, width, 3] made by whole-number arithmetic, the same everywhere."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    if kind == "levels":
        values = y * width + x
    elif kind == "noise":
        values = (y * 7919 + x * 104729 + c * 1299709 + 1) * 2654435761 % 2**32 >> 13
    elif kind == "edges":
        values = 255 * ((y // 9 + x // 13 + c) % 2)
    elif kind == "smooth":
        values = abs((y * 3 + x * 2 + c * 40) % 510 - 255)
    else:
        raise ValueError(kind)
    return (values % 256).astype(np.uint8)


def levels(patches: np.ndarray) -> np.ndarray:
    """Normalised patches as the 8-bit levels they came from."""
    return np.rint((patches.astype(np.float64) + 1) * 127.5).astype(np.uint8)


def main() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    settings = json.loads((HERE / "qwen3_vl_preprocessor_config.json").read_text())
    names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    arrays = {}
    for i, (height, width, kind, (low, high)) in enumerate(WHOLE + DIGESTED):
        size = {"shortest_edge": low, "longest_edge": high}
        processor = Qwen2VLImageProcessor(size=size, **{n: settings[n] for n in names})
        found = processor(
            images=[picture(height, width, kind)],
            input_data_format="channels_last",
            return_tensors="np",
        )
        patches, grid = np.asarray(found["pixel_values"]), np.asarray(found["image_grid_thw"])
        arrays[f"grid_{i}"] = grid[0, 1:]
        if kind == "levels":
            arrays["level_values"] = np.unique(patches)  # float32, of the 256 levels
        if i < len(WHOLE):
            arrays[f"levels_{i}"] = levels(patches)
        else:
            digest = hashlib.sha256(levels(patches).tobytes()).digest()
            arrays[f"digest_{i}"] = np.frombuffer(digest, np.uint8)
    np.savez_compressed(HERE / "vlm_image_reference.npz", **arrays)


if __name__ == "__main__":
    main()
