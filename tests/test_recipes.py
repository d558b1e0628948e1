"""The commands in the documents: their options are real, and one recipe is followed literally."""

import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_program
from PIL import Image
from test_documents import DOCUMENTS

from dopsd_jax.config import schema
from dopsd_jax.config.loading import load

RECIPE = ROOT / "docs" / "recipes" / "object.md"


def commands(document):
    """The programs of this package that a document calls, as (name, arguments)."""
    text = document.read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, flags=re.S | re.M):
        for line in re.sub(r"\\\n", " ", block).splitlines():
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


def test_every_recipe_has_a_command_to_copy():
    pages = [page for page in DOCUMENTS if page.parent == RECIPE.parent and page.stem != "README"]
    assert len(pages) >= 5
    assert all(commands(page) for page in pages)


def test_the_recipe_of_an_object_leads_to_pictures(tmp_path, random_model):
    """Step by step as written; only names of folders, sizes and numbers of steps are others."""
    photos, runs = tmp_path / "photos", tmp_path / "runs"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((160, 140)).save(photos / f"{i}.jpg")
        (photos / f"{i}.txt").write_text(f"a [trigger] toy, picture {i}")
    changed = {
        "photos": str(photos),
        "runs/dog": f"{runs}/dog",
        "pictures": f"{tmp_path}/pictures",
        "Qwen/Qwen3-VL-4B-Instruct": f"{random_model}/vlm",
        "Tongyi-MAI/Z-Image-Turbo": str(random_model),
        "configs/zimage.py": f"{ROOT}/configs/zimage.py:random",
        "2000": "2",
        "250": "1",
    }
    names = re.compile(rf"(?<![\w/])({'|'.join(map(re.escape, changed))})(?!\w)")
    small = {
        "caption": [],  # all have one: a network with random weights writes no sentence
        "check": [],
        "train": ["--config.sample_rows=1", "--config.sample_every=0", "--config.grid=1,0.5"],
        "sample": ["--height=64", "--width=64", "--steps=2"],
    }
    for name, arguments in commands(RECIPE):
        arguments = [names.sub(lambda found: changed[found[0]], a) for a in arguments]
        done = run_program(name, *arguments, *small[name])
        assert done.returncode == 0, done.stderr
    assert (photos / "0.txt").read_text() == "a [trigger] toy, picture 0"
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    shutil.rmtree(runs)
