"""The commands in the documents: their options are real, and the recipes are followed literally."""

import functools
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_program
from PIL import Image
from test_documents import DOCUMENTS

from dopsd_jax import families
from dopsd_jax.config import schema
from dopsd_jax.config.loading import load

RECIPES = {page.stem: page for page in DOCUMENTS if page.parent == ROOT / "docs" / "recipes"}


def commands(document):
    """The programs of this package that a document calls, as (name, arguments)."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, flags=re.S | re.M)
    return [call for block in blocks for call in calls(block)]


def calls(script):
    """The programs of this package that a shell script calls, as (name, arguments)."""
    found = []
    for line in re.sub(r"\\\n", " ", script).splitlines():
        words = shlex.split(line, comments=True)
        if "-m" in words and words[words.index("-m") + 1].startswith("dopsd_jax."):
            name, *arguments = words[words.index("-m") + 1 :]
            found.append((name.removeprefix("dopsd_jax."), arguments))
    return found


def configured():
    """(document, configuration, fields that are set) of each command that names one."""
    for document in DOCUMENTS:
        for _, arguments in commands(document):
            named = re.search(r"--config[= ]([a-z]\S+)", " ".join(arguments))  # not FILE, not ...
            if named:
                fields = dict(a[9:].split("=", 1) for a in arguments if a.startswith("--config."))
                where = f"{document.relative_to(ROOT)}: {' '.join(fields) or named[1]}"
                yield pytest.param(named[1], fields, id=where)


@pytest.mark.parametrize(("config", "fields"), list(configured()))
def test_what_the_documents_set_can_be_set(config, fields, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = load(config, {"data.path": "photos"} | fields)  # `estimate` needs no data
    schema.check(found, fields)


# A page that uses what another one has made.
AFTER = {"README": "object", "several": "object"}
# What is put in place of what a page says: configurations and models, and numbers of steps.
PUT = {
    "configs/zimage.py": "zimage:random",
    "configs/flux2_klein.py": "flux2_klein:random",
    "Qwen/Qwen3-VL-4B-Instruct": "model/vlm",
    "Tongyi-MAI/Z-Image-Turbo": "model",
    "black-forest-labs/FLUX.2-klein-4B": "klein",
    **dict.fromkeys(("250", "500"), "1"),  # between checkpoints
    **dict.fromkeys(("2000", "3000", "3001", "4000"), "2"),  # in all
}
# And what is added, so that it is small: few layers, of which every family has some.
CONFIG = (
    *("--config.data.buckets=64x64", "--config.grid=1,0.5"),
    *("--config.lora.targets=*.to_q,*.to_v", "--config.lora.rank=4"),
)
ADDED = {
    "caption": (),
    "check": CONFIG,
    "train": (*CONFIG, "--config.steps=2", "--config.sample_rows=1", "--config.sample_every=0"),
    "sample": ("--height=64", "--width=64", "--steps=2"),
    "push": (),
}
# What is there then, in the folder that an option names.
MADE = {
    "train": ("--workdir", "lora/step_2.safetensors"),
    "sample": ("--out", "*.png"),
    "push": ("--out", "README.md"),
}


def do(page, folder, put=PUT, added=ADDED):
    """Every command of a recipe, in a folder that has what it speaks of."""
    place = re.compile(rf"(?<![a-z0-9/])({'|'.join(map(re.escape, put))})(?!\w)")
    for name, arguments in commands(RECIPES[page]):
        arguments = [place.sub(lambda found: put[found[0]], a) for a in arguments]
        done = run_program(name, *arguments, *added[name], folder=folder)
        assert done.returncode == 0, done.stderr
        if name in MADE:
            option, made = MADE[name]
            assert list((folder / arguments[arguments.index(option) + 1]).glob(made))


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((80, 70)).save(path)


@pytest.fixture(scope="module")
def follow(random_model, tmp_path_factory):
    """Does what a recipe says, in a folder with everything that the recipes speak of."""
    here = tmp_path_factory.mktemp("recipes")
    for folder, caption in (
        *(("photos", "a [trigger] toy"), ("dog", "a [V] dog"), ("cat", "a [W] cat")),
        *(("portraits", "[V] woman"), ("paintings", "a lighthouse")),
    ):
        for i in range(6):
            picture(here / folder / f"{i}.jpg")
            (here / folder / f"{i}.txt").write_text(f"{caption}, picture {i}")
    (here / "prompts.txt").write_text("a [V] dog in the snow\na [V] dog, oil painting\n")
    (here / "dog-captions.txt").write_text("a [V] dog, picture 0\na [V] dog, picture 1\n")
    row = re.search(r"^```json\n(.*)\n```", RECIPES["editor"].read_text(), flags=re.M)[1]
    for name in (json.loads(row)["file_name"], json.loads(row)["reference"]):
        picture(here / "pairs" / name)
    (here / "pairs" / "pairs.jsonl").write_text(f"{row}\n" * 2)
    picture(here / "photo.jpg")
    (here / "model").symlink_to(random_model)
    families.load("flux2_klein").write_random_model(here / "klein")

    @functools.cache
    def followed(page):
        if page in AFTER:
            followed(AFTER[page])
        do(page, here)

    yield followed
    shutil.rmtree(here)


def test_every_recipe_has_a_command_to_copy():
    assert len(RECIPES) >= 6
    assert all(commands(page) for page in RECIPES.values())


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(RECIPES))
def test_a_recipe_can_be_followed(page, follow):
    follow(page)
