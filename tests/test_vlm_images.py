"""Image preprocessing against transformers' torch image processor.

The 8-bit pixels are equal, every one; the normalised values to one rounding of float32.
"""

import hashlib
import json
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from shape_checks import unchecked

from dopsd_jax.common.errors import UserError
from dopsd_jax.models.resample import resize_bicubic
from dopsd_jax.models.vlm_images import ImageSettings, preprocess

DATA = pathlib.Path(__file__).parent / "data"
REFERENCE = runpy.run_path(str(DATA / "make_vlm_image_reference.py"))
picture, levels = REFERENCE["picture"], REFERENCE["levels"]
CASES = REFERENCE["WHOLE"] + REFERENCE["DIGESTED"]
ROUNDING = 2.0**-24  # of a float32 near 1


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "vlm_image_reference.npz", allow_pickle=False) as file:
        return dict(file)


def published() -> dict:
    return json.loads((DATA / "qwen3_vl_preprocessor_config.json").read_text())


def settings(low: int, high: int) -> ImageSettings:
    return ImageSettings.from_dict(published(), "p.json", min_pixels=low, max_pixels=high)


@pytest.mark.parametrize("i", range(len(CASES)), ids=[f"{h}x{w}" for h, w, *_ in CASES])
def test_pixels_equal_the_torch_processor(golden, i):
    height, width, kind, bounds = CASES[i]
    patches, grid = preprocess(picture(height, width, kind), settings(*bounds))
    assert patches.dtype == np.float32
    assert grid == tuple(golden[f"grid_{i}"])
    found = levels(patches)
    # Nothing is lost by comparing levels: the values are those of whole levels.
    assert np.abs((patches + 1) * 127.5 - found).max() < 1e-4
    if f"levels_{i}" in golden:
        np.testing.assert_array_equal(found, golden[f"levels_{i}"])
    else:
        assert hashlib.sha256(found.tobytes()).digest() == golden[f"digest_{i}"].tobytes()


def test_normalised_values_equal_the_torch_processor_to_one_rounding(golden):
    patches, _ = preprocess(picture(*CASES[0][:3]), settings(*CASES[0][3]))
    values = np.unique(patches)
    assert values.shape == (256,)
    assert np.abs(values.astype(np.float64) - golden["level_values"]).max() <= ROUNDING


@pytest.mark.parametrize("case", CASES, ids=[f"{h}x{w}" for h, w, *_ in CASES])
def test_whole_processor_equals_torchvision_live(case):
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    height, width, kind, (low, high) = case
    image = picture(height, width, kind)
    size = {"shortest_edge": low, "longest_edge": high}
    names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    theirs = Qwen2VLImageProcessor(size=size, **{n: published()[n] for n in names})(
        images=[image], input_data_format="channels_last", return_tensors="np"
    )
    patches, grid = preprocess(image, settings(low, high))
    expected = np.asarray(theirs["pixel_values"])
    assert [1, *grid] == np.asarray(theirs["image_grid_thw"])[0].tolist()
    np.testing.assert_array_equal(levels(patches), levels(expected))
    assert np.abs(patches.astype(np.float64) - expected).max() <= ROUNDING


def test_resizing_equals_torch_bit_for_bit_whichever_sides_grow():
    random = np.random.default_rng(0)
    sizes = [tuple(random.integers(1, 180, 4)) for _ in range(24)]
    sizes += [(50, 70, 50, 31), (50, 70, 90, 70), (50, 70, 50, 70), (1, 1, 5, 3), (200, 3, 3, 200)]
    for height, width, rows, columns in sizes:
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = torch.nn.functional.interpolate(
            torch.tensor(image).permute(2, 0, 1)[None],
            (int(rows), int(columns)),
            mode="bicubic",
            antialias=True,
        )
        found = resize_bicubic(image, (int(rows), int(columns)))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected[0].permute(1, 2, 0).numpy())


def test_patches_are_channel_frame_row_column_in_merge_blocks():
    image = picture(64, 96, "noise")
    patches, grid = preprocess(image, settings(1024, 65536))
    assert grid == (4, 6)
    found = levels(patches).reshape(2, 3, 2, 2, 3, 2, 16, 16)
    for block_row, block, row, column in ((0, 0, 0, 0), (0, 2, 0, 1), (1, 1, 1, 0)):
        y, x = 16 * (2 * block_row + row), 16 * (2 * block + column)
        tile = image[y : y + 16, x : x + 16].transpose(2, 0, 1)
        for frame in (0, 1):
            np.testing.assert_array_equal(found[block_row, block, row, column][:, frame], tile)


def test_no_program_imports_torch_where_it_is_installed(random_model):
    """It would take seconds of every start, and memory beside the accelerator's."""
    code = """
import importlib, sys
import numpy as np
for name in ("train", "check", "sample", "prepare", "estimate", "evaluate"):
    importlib.import_module(f"dopsd_jax.{name}")  # two of them may share names of options
from dopsd_jax.models.vlm_images import ImageSettings, preprocess
from dopsd_jax.families.pipeline import pipeline
s = ImageSettings(16, 2, 2, 1024, 65536, (0.5,) * 3, (0.5,) * 3)
patches, _ = preprocess(np.zeros((40, 50, 3), np.uint8), s)
tokens = pipeline(sys.argv[1]).tokenizer("a dog").input_ids
print(patches.shape, len(tokens) > 1, "torch" in sys.modules)
"""
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-c", code, random_model]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.stdout.split("\n")[-2] == "(8, 1536) True False", done.stderr


def test_published_settings_are_read():
    found = ImageSettings.from_dict(published(), "p.json")
    assert (found.min_pixels, found.max_pixels) == (65536, 16777216)
    assert (found.patch_size, found.merge_size, found.multiple) == (16, 2, 32)
    assert found.mean == found.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(patch_size=None), "patch_size is missing"),
        (dict(merge_size=0), "merge_size is 0"),
        (dict(size={"height": 4, "width": 4}), "shortest_edge is missing"),
        (dict(size=3), "size is 3"),
        (dict(size={"shortest_edge": 9, "longest_edge": 4}), "empty"),
        (dict(image_mean=[0.5, 0.5]), "image_mean"),
        (dict(image_std=[0.5, 0, 0.5]), "image_std"),
        (dict(do_resize=False), "do_resize is false"),
        (dict(resample=2), "resample is 2"),
        (dict(rescale_factor=1), "rescale_factor"),
        (dict(image_processor_type="CLIPImageProcessor"), "CLIPImageProcessor"),
    ],
)
def test_each_unsupported_setting_is_named(changes, word):
    with pytest.raises(UserError) as caught:
        ImageSettings.from_dict(published() | changes, "vlm/preprocessor_config.json")
    assert any(word in p for p in caught.value.problems)
    assert all(p.startswith("vlm/preprocessor_config.json") for p in caught.value.problems)


def test_bounds_that_leave_no_size_are_refused():
    with pytest.raises(UserError, match="empty"):
        settings(4096, 1024)


def test_a_strip_is_refused_by_name():
    with pytest.raises(UserError, match=r"a\.png: 402 x 2 pixels"):
        preprocess(np.zeros((2, 402, 3), np.uint8), settings(1024, 65536), "a.png")


def test_only_8_bit_rgb_is_taken():
    for image in (np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3), np.float32)):
        with pytest.raises(ValueError, match="8-bit RGB"), unchecked():
            preprocess(image, settings(1024, 65536))
