"""A family is one room and one line: `second_family` runs through every program, unchanged."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from second_family import LISTING, family

from dopsd_jax import families
from dopsd_jax.common.errors import UserError
from dopsd_jax.config.loading import load
from dopsd_jax.run.build import open_pipeline
from dopsd_jax.weights.safetensors_io import TensorFiles

pytestmark = pytest.mark.slow
ANCHORS = ROOT / "tests" / "data" / "anchors.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of what the programs wrote, run one after the other as a user runs them."""
    out = tmp_path_factory.mktemp("second")
    model, data, prompt = out / "whole/random_model", out / "whole/random_data", "a red circle"
    fields = {
        "family": "second", "teacher.context": "reference", "grid": "own4", "steps": 4,
        "checkpoint_every": 2, "sample_every": 4, "sample_rows": 1, "lora.rank": 4,
        "data.buckets": "64x64,72x56", "anchor.share": 0.25,
        "anchor.prompts": ANCHORS, "data.caption_dropout": 0.5, "data.shuffle_tags": True,
        "data.tag_variants": 2, "data.flip": True, "data.crops": 2,
    }  # fmt: skip
    config = ["--config=zimage:random", *(f"--config.{n}={v}" for n, v in fields.items())]
    whole, again = [*config, f"--workdir={out / 'whole'}"], f"--workdir={out / 'again'}"
    rest = [f"--config.model={model}", f"--config.data.path={data}", again]
    lora = out / "whole/lora/step_4.safetensors"
    alone = "--distributed=off"  # it is looked for before JAX is first used
    commands = [
        ["train", alone, *whole],
        ["train", alone, *config, *rest, "--config.steps=2"],
        ["train", alone, *config, *rest],
        ["sample", f"--model={model}", f"--lora={lora}", f"--prompt={prompt}",
         f"--out={out / 'pictures'}"],
        ["check", *whole],
        ["prepare", alone, *whole, f"--out={out / 'prepared'}"],
        ["train", alone, *config, f"--config.model={model}",
         f"--config.data.path={out / 'prepared'}", f"--workdir={out / 'from_prepared'}"],
        ["estimate", *config],
        ["evaluate", *whole, "--rows=1", "--seeds=1",
         "--scorers=second_family.brightness:Brightness"],
        ["convert", "import", str(model), str(out / "imported")],
        ["convert", "export", str(out / "imported"), str(out / "exported"), "--format=diffusers"],
        ["convert", "lora", str(lora), str(out / "kohya.safetensors"), "--to=K"],
        ["convert", "inspect", str(out / "imported")],
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    command = [sys.executable, "-m", "second_family", json.dumps(commands)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    (out / "said.txt").write_text(result.stdout)
    return out


def arrays(*paths):
    found = {}
    for path in paths:
        files = TensorFiles.open(path)
        found |= {name: files.read(name) for name in files.infos}
    return found


def same(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    """Of the rows and of the anchors."""
    return [[record["loss"], record["anchor_loss"]] for record in records(run)]


def test_it_learns_and_a_resumed_run_is_the_whole_run(folder):
    found = losses(folder / "whole")
    assert len(found) == 4 and all(loss > 0 for loss, _ in found)
    assert [loss > 0 for _, loss in found] == [False, True, True, True]  # it starts at the start
    assert losses(folder / "again") == found
    step = "lora/step_4.safetensors"
    same(arrays(folder / "whole" / step), arrays(folder / "again" / step))


def test_prepared_data_gives_the_same_run(folder):
    np.testing.assert_allclose(
        losses(folder / "from_prepared"), losses(folder / "whole"), rtol=1e-5
    )
    digest = lambda run: json.loads((folder / run / "config.json").read_text())["facts"]["data"]
    assert digest("from_prepared") == digest("whole")  # either goes on with the other's data


def test_the_adapter_has_its_pytorch_names(folder):
    names = arrays(folder / "whole/lora/step_4.safetensors").keys()
    layers = {name.removeprefix("transformer.").split(".lora_")[0] for name in names}
    assert layers == {f"blocks.{i}.to_{n}" for i in range(2) for n in ("q", "k", "v", "out")}


def test_the_sampler_and_the_grids_draw_pictures(folder):
    for path in ("pictures/000_seed0.png", "whole/samples/step_000004.png"):
        with Image.open(folder / path) as picture:
            assert len(np.unique(np.asarray(picture))) > 8


def test_the_exported_model_is_the_imported_one(folder):
    part = "transformer/diffusion_pytorch_model.safetensors"
    same(arrays(folder / "exported" / part), arrays(folder / "whole/random_model" / part))


def test_programs_say_what_it_is(folder):
    said = (folder / "said.txt").read_text()
    assert "converted model, family second" in said
    assert "grid: 1.0000, 0.9474, 0.8571, 0.6667, 0.0000" in said  # shift 6: 8 x 8 cells
    assert "brightness" in said and "TFLOP" in said


def test_its_grid_follows_the_size_of_the_picture():
    sigma = lambda height, width: family.grid("own4", 1.0, height, width)[1]
    assert sigma(8, 8) < sigma(16, 16)


def test_what_another_family_has_is_refused(folder, monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "second", LISTING)
    config = load("zimage:random", {"model": str(folder / "whole/random_model")})
    with pytest.raises(UserError, match=r"teacher\.context: 'vlm' is not one of reference, prompt"):
        open_pipeline(config, folder)
    wanted = {"model": config.model, "family": "zimage"}
    with pytest.raises(UserError, match=r"config\.family: is zimage, but .* says second"):
        open_pipeline(load("zimage:random", wanted), folder)
