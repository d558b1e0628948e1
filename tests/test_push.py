"""A LoRA file on the hub: the card says what the file says, and nothing in it breaks the page."""

import ast
import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import problems_of, run_program
from diffusers import Flux2KleinPipeline, ZImagePipeline
from safetensors.numpy import save_file

from dopsd_jax import push
from dopsd_jax.reporting import model_card, parameters
from dopsd_jax.reporting.model_card import Shown
from dopsd_jax.reporting.parameters import Lora, Parameters
from dopsd_jax.reporting.pictures import save_picture
from dopsd_jax.weights.lora_settings import EDITS
from dopsd_jax.weights.safetensors_io import read_header

ZIMAGE = {"modelspec.architecture": "Z-Image/lora"}
HEADER = {
    "modelspec.title": "dog",
    "modelspec.license": "of the base model: Apache-2.0",
    "modelspec.trigger_phrase": "[V] dog",
    "dopsd_jax.base_model": "Tongyi-MAI/Z-Image-Turbo@abc",
    "dopsd_jax.sampling_steps": "8",
    "ss_network_dim": "16",
}


def front(text):
    """What the hub reads of a card."""
    return yaml.safe_load(text.split("---\n")[1])


def of(header, **changed):
    given = {
        "shown": (),
        "base": model_card.base_model(header),
        "terms": model_card.licence(header),
    }
    return model_card.card(header, "dog.safetensors", **(given | {"repo": ""} | changed))


def test_the_card_says_what_the_file_says():
    text = of(HEADER | ZIMAGE, shown=[Shown("pictures/0.png", "a [V] dog")])
    assert front(text) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "diffusers", "text-to-image", "d-opsd", "dopsd_jax"],
        "base_model": "Tongyi-MAI/Z-Image-Turbo",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "instance_prompt": "[V] dog",
        "widget": [{"text": "a [V] dog", "output": {"url": "pictures/0.png"}}],
    }
    assert "num_inference_steps=8" in text and "| rank | 16 |" in text
    assert "before 0.39: `num_inference_steps=9`" in text
    assert "0.39" not in of(HEADER)


def test_the_card_of_an_editor_gives_the_pipeline_a_picture():
    header = {k: v for k, v in HEADER.items() if k != "modelspec.trigger_phrase"}
    text = of(header | {EDITS: "True"})
    assert front(text)["pipeline_tag"] == "image-to-image" in front(text)["tags"]
    code = re.search("```python\n(.*?)```", text, re.DOTALL)[1]
    (call,) = (one for one in ast.walk(ast.parse(code)) if "image" in _given(one))
    assert _given(call) <= inspect.signature(Flux2KleinPipeline.__call__).parameters.keys()
    assert "image=" not in of(header) and 'pipe("what to draw"' in of(header)


def _given(node):
    return {own.arg for own in node.keywords} if isinstance(node, ast.Call) else set()


@pytest.mark.parametrize("pipeline", [ZImagePipeline, Flux2KleinPipeline])
@pytest.mark.parametrize("distilled", [False, True])
def test_the_cards_command_draws_without_guidance(pipeline, distilled):
    scale = float(re.search(r"guidance_scale=([\d.]+)", of(HEADER))[1])
    config = SimpleNamespace(is_distilled=distilled)
    drawing = SimpleNamespace(_guidance_scale=scale, config=config)
    assert not pipeline.do_classifier_free_guidance.fget(drawing)


@pytest.mark.parametrize(
    ("told", "kind"),
    [('{"algo": "lokr"}', "LoKr"), ('{"algo": "lora"}', "LoRA"), ("[1]", "LoRA"), ("{", "LoRA")],
)
def test_the_card_calls_the_adapter_by_its_kind(told, kind):
    assert f"A {kind} for a few-step image model" in of(HEADER | {"ss_network_args": told})
    assert "A LoRA for" in of(HEADER)


def test_another_licence_has_its_name_and_a_folder_is_no_base():
    found = front(
        of(HEADER | {"modelspec.license": "of the base model: FLUX Non-Commercial License"})
    )
    assert found["license"] == "other" and found["license_name"] == "FLUX Non-Commercial License"
    assert found["license_link"] == "https://huggingface.co/Tongyi-MAI/Z-Image-Turbo"
    assert front(of(HEADER, terms="MIT"))["license"] == "mit"
    found = front(of(HEADER | {"dopsd_jax.base_model": "model"}))
    assert "base_model" not in found


@pytest.mark.parametrize(
    "text", ['"\n---\nevil: 1', "a: b # c", "| x |\n`<script>`", "{[", "é\u2028"]
)
def test_no_text_of_a_header_breaks_the_page(text):
    header = HEADER | {"modelspec.trigger_phrase": text, "modelspec.title": text}
    card = of(header, shown=[Shown("0.png", text)])
    found = front(card)
    assert found["instance_prompt"] == text and found["widget"][0]["text"] == text
    assert "evil" not in found and "<script>" not in card.split("---\n")[2].partition("```")[0]


def test_the_folder_is_what_is_uploaded(tmp_path, lora_file, monkeypatch):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    own = Lora("toy", 1.0, parameters.digest(lora_file))
    made = parameters.chunks(Parameters("a toy", 8, 0, 8, 8, loras=(own,)))
    save_picture(pictures / "0.png", np.zeros((8, 8, 3), np.uint8), made)
    done = run_program("push", f"--lora={lora_file}", f"--pictures={pictures}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert names == sorted(["README.md", lora_file.name, "pictures/0.png"])
    assert (out / lora_file.name).read_bytes() == lora_file.read_bytes()
    assert front((out / "README.md").read_text())["widget"][0]["text"] == "a toy"
    again = run_program("push", f"--lora={lora_file}", f"--out={out}")
    assert again.returncode != 0 and "already there; give another name" in again.stderr


def test_faults_are_named(tmp_path, lora_file):
    model = tmp_path / "model.safetensors"
    save_file({"layers.0.weight": np.zeros((2, 2), np.float32)}, model)
    wrong = run_program("push", f"--lora={model}", f"--out={tmp_path}/o")
    assert wrong.returncode == 2 and "holds no LoRA; name a file lora/step_N" in wrong.stderr
    wrong = run_program("push", f"--lora={lora_file}", f"--out={tmp_path}/o", "--repo=dog")
    assert wrong.returncode != 0 and "--repo dog: is no name of the hub" in wrong.stderr
    (tmp_path / "0.png").write_text("no picture")
    wrong = {"lora": "", parameters.CHUNK: "a dog"}
    save_picture(tmp_path / "1.png", np.zeros((8, 8, 3), np.uint8), wrong)
    problems = problems_of(push.gallery, tmp_path, "")
    assert "0.png: is no picture" in problems[0] and "1.png: its parameters have" in problems[1]
    (tmp_path / "empty").mkdir()
    (problem,) = problems_of(push.gallery, tmp_path / "empty", "")
    assert "no picture there is a PNG file" in problem
    (problem,) = problems_of(push.gallery, tmp_path / "nowhere", "")
    assert "nowhere: no such folder; name the --out of `sample`" in problem


def test_the_gallery_has_no_pictures_that_were_drawn_without_the_file(tmp_path):
    def draw(name, *loras):
        made = Parameters("a dog", 8, 0, 8, 8, loras=loras)
        save_picture(tmp_path / name, np.zeros((8, 8, 3), np.uint8), parameters.chunks(made))

    draw("other.png", Lora("dog", 1.0, "b" * 12))
    draw("base.png")
    workflow = {"prompt": '{"3": {"class_type": "KSampler"}}', "workflow": "{}"}
    save_picture(tmp_path / "comfy.png", np.zeros((8, 8, 3), np.uint8), workflow)
    (problem,) = problems_of(push.gallery, tmp_path, "a" * 12)
    assert "no picture there was drawn with this file" in problem
    draw("own.png", Lora("style", 0.5, "b" * 12), Lora("dog", 0.8, "a" * 12))
    draw("own_strength0.png", Lora("dog", 0.0, "a" * 12))
    shown, others = push.gallery(tmp_path, "a" * 12)
    assert shown == [(tmp_path / "own.png", "a dog")]
    names = [path.name for path in others]
    assert names == ["base.png", "comfy.png", "other.png", "own_strength0.png"]


def test_an_upload_that_fails_says_why(tmp_path, monkeypatch):
    class Api:
        def create_repo(self, name, private, exist_ok):
            assert private and exist_ok

        def upload_folder(self, repo_id, folder_path):
            raise OSError("no network")

    monkeypatch.setattr(push, "HfApi", Api)
    (problem,) = problems_of(push.upload, tmp_path)
    assert "was not uploaded (no network); log in" in problem


def test_a_header_that_is_read_is_the_one_that_was_written(tmp_path):
    path = tmp_path / "dog.safetensors"
    save_file({"x": np.zeros(2, np.float32)}, path, HEADER)
    assert "8, without guidance" in of(read_header(path).metadata)
