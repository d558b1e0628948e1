"""From a folder of a phone's pictures to a LoRA file and a picture, by one recipe."""

import re
import shlex

import numpy as np
import pytest
from caption_model import SENTENCE, write_captioner
from conftest import run_program
from PIL import ExifTags, Image
from safetensors.numpy import load_file
from test_recipes import ADDED, CONFIG, PUT, RECIPES, do

from dopsd_jax.config.find import shipped
from dopsd_jax.data import heic
from dopsd_jax.data.images import fit, open_image
from dopsd_jax.miniature import concepts, phone_folder, world

# The trained miniature in place of the real model; it has no words for pictures: another captions.
MINIATURE = PUT | {
    "configs/zimage.py": "zimage:tiny",
    "Tongyi-MAI/Z-Image-Turbo": str(shipped("examples", "miniature", "model")),
    "Qwen/Qwen3-VL-4B-Instruct": "captioner",
}
SMALL = (*CONFIG, "--config.batch_size=2", "--config.sample_rows=1", "--config.sample_every=0")
LITTLE = ADDED | {
    "caption": ("--max_pixels=4096", "--max_tokens=16"),
    "check": SMALL,
    "train": SMALL,
    "sample": ("--height=64", "--width=64"),
}


def the_command():
    """(program, arguments) of the sentence in the recipes' first page."""
    (words,) = re.findall(r"`python -m dopsd_jax\.(miniature.*?)`", RECIPES["README"].read_text())
    return shlex.split(words)


def test_the_folder_is_as_a_phone_leaves_it(tmp_path):
    names = phone_folder.write_folder(tmp_path / "photos", count=5, seed=3)
    last = "IMG_0005.HEIC" if heic.available() else "IMG_0005.JPG"
    assert names == [*(f"IMG_000{i}.JPG" for i in range(1, 5)), last]
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == names  # no captions
    rng = np.random.default_rng(3)
    scenes = concepts.arrangements(rng, world.random_concept(rng), "", 5)
    stored = set()
    for name, truth in zip(names, world.pictures(scenes, rng), strict=True):
        path = tmp_path / "photos" / name
        with Image.open(path) as file:
            exif = file.getexif()
            stored.add(exif[ExifTags.Base.Orientation])
            assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FNumber] == 1.8
            assert exif.get_ifd(ExifTags.IFD.GPSInfo)
        upright = fit(open_image(path), 64, 64)
        assert np.abs(upright.astype(float) - truth).mean() < 6
    assert stored == {1, 3, 6, 8}


@pytest.mark.slow
def test_a_recipe_leads_from_the_phone_to_a_lora_and_its_picture(tmp_path):
    made = run_program(*the_command(), folder=tmp_path)
    assert made.returncode == 0, made.stderr
    photos = tmp_path / "photos"
    pictures = {path.stem for path in photos.iterdir()}
    write_captioner(tmp_path / "captioner")
    do("object", tmp_path, MINIATURE, LITTLE)
    captions = {path.stem: path.read_text() for path in photos.glob("*.txt")}
    assert captions == dict.fromkeys(pictures, f"[V] dog, {SENTENCE}\n")
    lora = load_file(tmp_path / "runs" / "dog" / "lora" / "best.safetensors")
    learned = [tensor for name, tensor in lora.items() if "lora_B" in name]
    assert learned and all(np.isfinite(tensor).all() and tensor.any() for tensor in learned)
    (picture,) = (tmp_path / "pictures").glob("*.png")
    with Image.open(picture) as drawn:
        assert drawn.size == (64, 64) and np.asarray(drawn).std() > 10
