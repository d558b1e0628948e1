"""The local page: what it draws is what `sample` draws, of files that it offers, and no others."""

import builtins
import contextlib
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

import dopsd_jax
from dopsd_jax import dopsd
from dopsd_jax.common.errors import UserError
from dopsd_jax.reporting import parameters, pictures
from dopsd_jax.reporting.metrics import MetricsWriter
from dopsd_jax.serving import page
from dopsd_jax.serving.drawing import Studio, numbers
from dopsd_jax.serving.watching import Watched

PROMPT = "a large red circle"
SIZES = {"height": 32, "width": 32, "steps": 2}


@pytest.fixture(scope="module")
def folder(lora_file, tmp_path_factory):
    """LoRA files: two of the model, one below, a hidden one, and one of something else."""
    folder = tmp_path_factory.mktemp("loras")
    (folder / "dog").mkdir()
    for name in ("a", "dog/b", ".hidden"):
        shutil.copyfile(lora_file, folder / f"{name}.safetensors")
    (folder / "wrong.safetensors").write_text("no tensors")
    return folder


@pytest.fixture(scope="module")
def studio(random_model, folder):
    return Studio(dopsd_jax.load_pipeline(random_model), str(random_model), folder)


@pytest.fixture
def run(tmp_path):
    """A run of 10 steps after the fourth."""
    config = {"config": {"steps": 10}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 5):
            writer.write({"step": step, "loss": 0.5 / step, "gap": float("nan"), "seconds": 2.0})
    for step in (0, 4):
        row = pictures.GridRow("a dog", [np.full((16, 16, 3), 20 * step, np.uint8)])
        pictures.save_grid(pictures.sample_path(tmp_path, step), ["tuned"], [row])
    return tmp_path


def drawn(studio, *arguments):
    return list(studio.draw(PROMPT, 3, *arguments, **SIZES))


def test_pictures_are_those_of_the_model_with_the_file_at_that_strength(
    studio, random_model, lora_file, monkeypatch
):
    traced = []
    rollout = dopsd.rollout
    monkeypatch.setattr(dopsd, "rollout", lambda *given: traced.append(1) or rollout(*given))
    jax.clear_caches()  # other tests of this process may have drawn such pictures
    found = drawn(studio, ["a.safetensors"], [1.0, 0.5, 0.25])
    again = drawn(studio, ["dog/b.safetensors"], [0.5])  # another file of the same shape
    assert len(traced) == 1
    assert [one.label for one in found] == ["base", "strength 1", "strength 0.5", "strength 0.25"]
    monkeypatch.undo()
    for one, lora in zip(found, ([], [lora_file], [f"{lora_file}:0.5"]), strict=False):
        pipe = dopsd_jax.load_pipeline(random_model, lora=[str(path) for path in lora])
        noise = dopsd_jax.families.sampling.start_noise(3, 1, pipe.latent_shape(32, 32))
        expected = pipe([PROMPT], latents=noise, **SIZES)[0].astype(int)
        assert np.abs(one.image - expected).max() <= 1, one.label
    assert np.abs(found[0].image.astype(int) - found[1].image).max() > 20
    assert np.array_equal(again[1].image, found[2].image)
    made = found[2].made
    assert (made.steps, made.seed, made.width) == (2, 3, 32)
    assert [(lora.name, lora.strength) for lora in made.loras] == [("a", 0.5)]
    assert not found[0].made.loras


def test_a_file_that_is_written_again_is_read_again(random_model, lora_file, tmp_path):
    path = tmp_path / "best.safetensors"
    shutil.copyfile(lora_file, path)
    own = Studio(dopsd_jax.load_pipeline(random_model), "m", tmp_path)
    _, before = drawn(own, [path.name])
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    save_file({name: 0.5 * tensor for name, tensor in tensors.items()}, path, header)
    base, after = drawn(own, [path.name])
    assert np.abs(before.image.astype(int) - after.image).max() > 5
    assert np.abs(base.image.astype(int) - after.image).max() > 5
    assert before.made.loras[0].digest != after.made.loras[0].digest


def test_a_strength_that_is_too_large_is_said_not_drawn_black(studio):
    with pytest.raises(UserError, match=r"not made of finite numbers \(strength 1e\+38"):
        drawn(studio, ["a.safetensors"], [1e38])
    assert len(drawn(studio, ["a.safetensors"])) == 2


def test_without_files_the_base_is_drawn(random_model):
    (one,) = drawn(Studio(dopsd_jax.load_pipeline(random_model), "m", None), [], [1.0, 0.5])
    assert one.label == "base"


def test_after_a_long_prompt_all_are_as_long(studio):
    """So that a sampler is compiled again only for a prompt that is longer than all before."""
    own = Studio(studio.pipe, "m", None)
    prompts = PROMPT, f"{PROMPT} " * 20, PROMPT
    contexts = [own._context(prompt) for prompt in prompts]
    rows = [context.features.shape[1] for context in contexts]
    assert rows[0] < rows[1] == rows[2]
    assert contexts[0].lengths == contexts[2].lengths


def test_files_are_those_of_the_folder(studio):
    assert list(studio.files()) == ["a.safetensors", "dog/b.safetensors", "wrong.safetensors"]


@pytest.mark.parametrize(
    "names, message",
    [
        (["../strong.safetensors"], "is not in the folder"),
        (["/etc/passwd"], "is not in the folder"),
        ([".hidden.safetensors"], "is not in the folder"),
        (["wrong.safetensors"], "wrong.safetensors"),
    ],
)
def test_other_files_are_refused_and_the_next_request_is_drawn(studio, names, message):
    with pytest.raises(UserError, match=message):
        drawn(studio, names)
    assert len(drawn(studio, ["a.safetensors"])) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": " "}, "prompt: is empty"),
        ({"seed": -1}, "seed: -1"),
        ({"strengths": [float("inf")]}, "strengths: "),
        ({"strengths": [1.0] * 17}, "strengths: "),
        ({"steps": 0}, "steps: 0"),
        ({"height": 33}, "image height 33: must be a multiple"),
    ],
)
def test_what_cannot_be_drawn_is_said(studio, change, message):
    with pytest.raises(UserError, match=message):
        list(studio.draw(**({"prompt": PROMPT, "seed": 0} | SIZES | change)))


def test_strengths_are_read_from_text():
    assert numbers("0.5, 1;-1,") == [0.5, 1.0, -1.0]
    with pytest.raises(UserError, match="are no numbers"):
        numbers("strong")


def test_a_run_is_watched(run):
    watched = Watched(run)
    assert watched.numbers() == {"step": "4 of 10", "loss": "0.125", "time left": "12 s"}
    assert watched.share() == 0.4
    assert [text for _, text in watched.pictures()] == ["step 4", "step 0"]
    with MetricsWriter(run, 4) as writer:
        writer.write({"step": 5, "loss": 0.01, "seconds": 2.0})
    assert watched.numbers()["step"] == "5 of 10"


def test_a_folder_without_a_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="holds no run"):
            Watched(path)


def test_a_missing_library_is_said(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "gradio":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'dopsd_jax\[ui\]'"):
        page.need_gradio()


@contextlib.contextmanager
def served(*options):
    """The address of the program's page, in a process of its own."""
    command = [sys.executable, "-m", "dopsd_jax.serve", "--port=0", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as program:
        try:
            lines = iter(program.stdout.readline, "")
            yield next(line.split()[1] for line in lines if line.startswith("page: "))
        finally:
            program.kill()


def test_the_page_answers(studio, random_model, folder, run):
    """Through gradio's own client: both tabs, and that only the folder's files are accepted."""
    pytest.importorskip("gradio")
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    with served(f"--model={random_model}", f"--loras={folder}", f"--run={run}") as address:
        assert address.startswith("http://127.0.0.1:")
        client = Client(address, verbose=False, analytics_enabled=False)
        asked = [PROMPT, 3, ["a.safetensors"], "1", 32, 32, 2]
        shown, about = client.predict(*asked, api_name=f"/{page.DRAW}")
        assert [one["caption"] for one in shown] == ["base", "strength 1"]
        expected = drawn(studio, ["a.safetensors"])
        for one, picture in zip(shown, expected, strict=True):
            with Image.open(one["image"]) as image:
                pixels = np.asarray(image.convert("RGB")).astype(int)
            assert np.abs(pixels - picture.image).max() <= 1
            assert parameters.read_parameters(one["image"]) == picture.made
        assert "Seed: 3" in about and "<lora:a:1.0>" in about
        for wrong in ("../a.safetensors", ".hidden.safetensors"):
            with pytest.raises(AppError):
                client.predict(*asked[:2], [wrong], *asked[3:], api_name=f"/{page.DRAW}")
        with pytest.raises(AppError, match="prompt: is empty"):
            client.predict(" ", *asked[1:], api_name=f"/{page.DRAW}")
        with pytest.raises(AppError, match="prompt: is empty"):  # all fields were emptied
            client.predict(*[None] * 7, api_name=f"/{page.DRAW}")
        with pytest.raises(AppError, match="Seed: 'many' is no number"):
            client.predict(PROMPT, "many", *asked[2:], api_name=f"/{page.DRAW}")
        done, table, grids = client.predict(api_name=f"/{page.WATCH}")
        assert done["confidences"][0]["confidence"] == pytest.approx(0.4)
        assert ["loss", "0.125"] in table["data"] and len(grids) == 2


def test_nothing_leaves_this_machine():
    pytest.importorskip("gradio")
    built = page.build(None, None)
    assert not built.analytics_enabled and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
