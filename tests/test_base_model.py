"""What FLUX.2's makers advise: SFT on a base model, and its LoRA used on the distilled one.

The rows edit pictures: the run that is interrupted has references in its batches.
"""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_program
from PIL import Image
from safetensors.numpy import load_file
from test_edits import picture, table
from test_evaluate import OWN_SCORER

from dopsd_jax.families.flux2_klein import family

pytestmark = pytest.mark.slow
PROMPT = "put a red hat on it"
CONFIG = (
    f"--config={ROOT}/configs/flux2_klein.py:random", "--config.data.references=auto",
    "--config.data.buckets=64x64", "--config.batch_size=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Both models, which differ in their weights and in what the index says; and two edits."""
    out = tmp_path_factory.mktemp("base_model")
    family.write_random_model(out / "distilled")
    index = family.write_random_model(out / "base", seed=1) / "model_index.json"
    content = json.loads(index.read_text())
    del content["is_distilled"]  # as in the published base models
    index.write_text(json.dumps(content))
    for name in "ab":
        picture(out / f"{name}.png", 64, 64)
        picture(out / f"{name}{name}.png", 80, 64)
    rows = [{"local_path_list": [f"{n}{n}.png", f"{n}.png"], "prompt": PROMPT} for n in "ab"]
    table(out, rows)
    return out


@pytest.fixture(scope="module")
def trained(out):
    """The work directory of a run on the base model, and what the program said."""
    return out / "run", train(out, out / "run")


def train(out, workdir):
    result = run_program(
        "train", *CONFIG, f"--config.model={out / 'base'}", "--config.method=sft",
        f"--config.data.path={out / 'edits.jsonl'}", f"--workdir={workdir}", "--config.steps=2",
        "--config.checkpoint_every=1", "--config.sample_every=0", "--config.sample_rows=1",
        "--config.lora.targets=single",  # fewer are compiled sooner
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_base_model_is_what_the_method_is_for(trained):
    assert "warning" not in trained[1]


def test_an_interrupted_run_is_the_whole_run(out, trained):
    whole, again = trained[0], out / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "2")
    (again / "lora" / "step_2.safetensors").unlink()
    assert "resuming at step 1" in train(out, again)
    lines = lambda run: (run / "metrics.jsonl").read_text().splitlines()
    losses = lambda run: [json.loads(line)["loss"] for line in lines(run)]
    assert losses(again) == losses(whole) and len(losses(whole)) == 2
    ours, theirs = (load_file(run / "lora/step_2.safetensors") for run in (again, whole))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_its_lora_is_used_on_the_distilled_model(out, trained):
    """Which is evaluated without it, and with it."""
    (out / "mine.py").write_text(OWN_SCORER)
    lora = f"--lora={trained[0] / 'lora/step_2.safetensors'}"
    result = run_program(
        "evaluate", *CONFIG, f"--config.model={out / 'distilled'}", lora,
        f"--config.data.path={out / 'edits.jsonl'}", f"--out={out / 'evaluation'}",
        "--config.teacher.context=gt_ref", "--rows=1", "--seeds=1",
        "--scorers=mine:Brightness", folder=out,
    )  # fmt: skip
    assert result.returncode == 0 and "warning" not in result.stdout, result.stderr
    drawn = {}
    for path in (out / "evaluation" / "pictures").iterdir():
        with Image.open(path) as image:
            drawn[image.text["model"]] = np.asarray(image)
    assert drawn.keys() == {"base", "teacher", "tuned"}
    assert (drawn["base"] != drawn["tuned"]).any()
