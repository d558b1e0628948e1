"""How a picture was drawn, in its file: what is written is read, here and by other programs."""

import hashlib
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file
from test_images import png

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.reporting import parameters
from dopsd_jax.reporting.parameters import Lora, Parameters
from dopsd_jax.reporting.pictures import save_picture

LETTERS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=40)
NAMES = st.from_regex(r"[\w. -]+", fullmatch=True)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
LORAS = st.lists(st.builds(Lora, NAMES, NUMBERS, st.just("0123456789ab")), max_size=3)
MADE = st.builds(
    Parameters,
    LETTERS,
    st.integers(1, 1000),
    st.integers(0, 2**32 - 1),
    st.integers(16, 4096),
    st.integers(16, 4096),
    LETTERS,
    st.just(1.0),
    LORAS.map(tuple),
)
DOG = Parameters(
    "a dog, in a\nforest", 8, 7, 96, 64, "Z-Image-Turbo", 1.0, (Lora("dog", 0.5, "0123456789ab"),)
)


@given(MADE)
def test_what_is_written_is_read(made):
    assert parameters.parse(parameters.text(made), "x") == made


def test_the_text_is_of_the_form_that_others_read():
    """The expressions are those of AUTOMATIC1111's `parse_generation_parameters`."""
    *lines, last = parameters.text(DOG).split("\n")
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    found = dict(re.findall(pattern, last))
    assert lines == ["a dog, in a", "forest", "<lora:dog:0.5>"]
    assert found["Lora hashes"] == '"dog: 0123456789ab"'
    del found["Lora hashes"], found["Version"]
    assert found == {
        "Steps": "8", "Sampler": "Euler", "CFG scale": "1", "Seed": "7", "Size": "96x64",
        "Model": "Z-Image-Turbo",
    }  # fmt: skip


def test_pictures_of_others_are_read():
    given = "a dog <lora:x:1>\nNegative prompt: cat\nSteps: 4, Seed: 5, Size: 64x32, CFG scale: 7.5"
    made = parameters.parse(given, "x")
    assert made[1:5] == (4, 5, 64, 32) and made.guidance == 7.5
    assert made.prompt == "a dog <lora:x:1>\nNegative prompt: cat"


def test_a_picture_keeps_it(tmp_path):
    path = tmp_path / "dog.png"
    save_picture(path, np.zeros((64, 96, 3), np.uint8), parameters.chunks(DOG))
    assert parameters.read_parameters(path) == DOG
    with Image.open(path) as picture:
        assert picture.text["prompt"] == DOG.prompt and picture.text["lora"] == "dog:0.5"


def test_the_digest_is_that_of_the_tensors(tmp_path):
    for name, title in (("a", "one"), ("b", "another, longer")):
        save_file({"x": np.arange(4.0)}, tmp_path / f"{name}.safetensors", {"title": title})
    options = [LoraOption(tmp_path / f"{name}.safetensors", 0.5) for name in "ab"]
    a, b = parameters.used(options)
    assert a.digest == b.digest == hashlib.sha256(np.arange(4.0).tobytes()).hexdigest()[:12]
    assert (a.name, a.strength) == ("a", 0.5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a dog", "its parameters have no Steps, Seed, Size"),
        ("a dog\nSteps: 8, Seed: 1, Size: big", "have no Size"),
        ("a dog\n" + "a " * 100_000, "a line of 200000 characters"),
        ("a dog\nSteps: many, Seed: 1, Size: 8x8", "'many' for a number"),
    ],
)
def test_what_cannot_be_read_is_said(text, message, tmp_path):
    path = tmp_path / "a.png"
    save_picture(path, np.zeros((8, 8, 3), np.uint8), {"parameters": text})
    with pytest.raises(UserError, match=message):
        parameters.read_parameters(path)


def test_a_picture_that_does_not_say_and_a_file_that_is_none(tmp_path):
    save_picture(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), {})
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(UserError, match="does not say how it was drawn"):
        parameters.read_parameters(tmp_path / "a.png")
    with pytest.raises(UserError, match="is no picture"):
        parameters.read_parameters(tmp_path / "b.png")


def test_text_without_settings_and_pixels_that_are_claimed_cost_nothing(tmp_path):
    path = tmp_path / "a.png"
    save_picture(path, np.zeros((8, 8, 3), np.uint8), {"parameters": "a " * 30_000})
    began = time.process_time()
    with pytest.raises(UserError, match="no Steps"):
        parameters.read_parameters(path)
    assert time.process_time() - began < 2
    path.write_bytes(png(30_000, 30_000, 8, 2, b""))
    with pytest.raises(UserError, match="is no picture in PNG"):
        parameters.read_texts(path)
