"""CLIP-S, DINO-D and LPIPS-D on small random weights, against other ways to the same numbers."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import problems_of
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from dopsd_jax.common.errors import UserError
from dopsd_jax.config.fields import defaults
from dopsd_jax.evaluation import appearance, checkpoint_scores, torch_scorers
from dopsd_jax.evaluation.scorer import Case, load_scorers
from dopsd_jax.training.ranking import Order

TEXTS = ["a red circle", "a large blue star on the left"]


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in TEXTS]


@pytest.fixture(scope="module")
def cases(pictures):
    """Sources of another size than the pictures'."""
    sources = [np.asarray(Image.fromarray(p[::-1]).resize((60, 40))) for p in pictures]
    return [Case("training", t, t, 32, 48, 0, s) for t, s in zip(TEXTS, sources, strict=True)]


@pytest.fixture(scope="module")
def clip_folder(random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    shutil.copytree(random_model / "tokenizer", folder, dirs_exist_ok=True)
    tokens = len(transformers.AutoTokenizer.from_pretrained(folder))
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**shared, "vocab_size": tokens, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**shared, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    normal = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    settings = {"size": {"shortest_edge": 16}, **normal}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_clip_is_the_models_own_logit_without_its_scale(clip_folder, pictures, cases):
    scorer = torch_scorers.ClipScore(str(clip_folder), "cpu")
    found = scorer(pictures, cases)
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    for picture, text, value in zip(pictures, TEXTS, found, strict=True):
        cut = (
            Image.fromarray(picture).resize((24, 16), Image.Resampling.BICUBIC).crop((4, 0, 20, 16))
        )
        pixels = (np.asarray(cut) / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
        pixels = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            out = model(pixel_values=pixels, **tokenizer([text], return_tensors="pt"))
        assert value == pytest.approx(
            float(out.logits_per_image / model.logit_scale.detach().exp()), abs=1e-5
        )
    assert found[0] != found[1]
    swapped = scorer(pictures, cases[::-1])
    assert swapped != pytest.approx(found, abs=1e-4), "the text changes nothing"


def lacking(path):
    """CLIP's projections and a text layer away, another tensor of a wrong shape."""
    tensors = load_file(path)
    kept = {
        k: v for k, v in tensors.items() if "projection" not in k and "text_model.encod" not in k
    }
    save_file({**kept, "logit_scale": torch.zeros(3)}, path)


def without_tokenizer(path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path.parent / name).unlink()


def rewritten(name, **changes):
    def damage(path):
        file = path.parent / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def of_another_model(path):
    config = json.loads((path.parent / "config.json").read_text())
    config["text_config"]["vocab_size"] += 1
    (path.parent / "config.json").write_text(json.dumps(config))
    tensors, name = load_file(path), "text_model.embeddings.token_embedding.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lacking, ("has no visual_projection.weight", "has no text_projection.weight",
                   "has no text_model.encoder.layers.0.mlp.fc1.bias",
                   "logit_scale has shape (3,)")),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), ("truncated",)),
        (lambda path: path.write_bytes(b""), ("is empty",)),
        (lambda path: path.write_text("<!doctype html><html>"), ("web page",)),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), ("LFS",)),
        (without_tokenizer, ("has no tokenizer, tokenizer.json or vocab.json and merges.txt",)),
        (lambda path: (path.parent / "tokenizer.json").write_text("{"), ("no tokenizer can be",)),
        (of_another_model, ("use the tokenizer of this very model",)),
        (rewritten("preprocessor_config.json", size=0, image_mean=[], image_std=[1, 0, 1]),
         ("size is 0", "image_mean is []", "image_std is [1, 0, 1]")),
        (rewritten("preprocessor_config.json", size=32), ("size is 32; config.json says 16",)),
        (rewritten("preprocessor_config.json", image_std="0.2"), ("image_std is '0.2'",)),
        (rewritten("config.json", text_config=3), ("cannot be loaded",)),
    ],
)  # fmt: skip
def test_a_clip_that_is_not_whole_is_refused(clip_folder, tmp_path, damage, told):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    damage(folder / "model.safetensors")
    problems = problems_of(torch_scorers.ClipScore, str(folder), "cpu")
    assert all(str(folder) in problem for problem in problems)
    assert all(any(word in problem for problem in problems) for word in told), problems


def test_faults_of_weights_and_tokenizer_are_told_together(clip_folder, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").unlink()
    (folder / "preprocessor_config.json").write_text("[]")
    problems = problems_of(torch_scorers.ClipScore, str(folder), "cpu")
    words = "preprocessor_config.json: is a list", "has no tokenizer", "is empty"
    assert all(any(word in problem for problem in problems) for word in words), problems


@pytest.mark.parametrize("device", ["foo", "cuda", "meta"])
def test_a_device_that_is_not_here_is_one_line(clip_folder, device):
    (problem,) = problems_of(torch_scorers.ClipScore, str(clip_folder), device)
    assert problem.startswith(f"--torch_device={device}: PyTorch cannot use it (")


def test_dino_needs_patches(clip_folder):
    (problem,) = problems_of(torch_scorers.DinoDistance, str(clip_folder), "cpu")
    assert "has no patch_size" in problem


def test_dino_compares_mean_patch_tokens_without_class_and_registers(
    tmp_path, pictures, cases, monkeypatch
):
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        patch_size=8, num_register_tokens=4, image_size=32,
    )  # fmt: skip
    model = transformers.DINOv3ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    scorer = torch_scorers.DinoDistance(str(tmp_path), "cpu")
    found = scorer(pictures, cases)

    def mean_token(image):
        normal = (image / 255 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
        pixels = torch.tensor(normal, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            tokens = model(pixels).last_hidden_state[0].numpy()
        assert len(tokens) == 1 + 4 + 4 * 6
        return tokens[5:].mean(0)

    for picture, case, value in zip(pictures, cases, found, strict=True):
        target = np.asarray(Image.fromarray(case.target).resize((48, 32), Image.Resampling.BICUBIC))
        a, b = mean_token(picture), mean_token(target)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert value == pytest.approx(1 - cosine, abs=1e-5)
    assert min(found) > 1e-4
    same = [Case("training", "", "", 32, 48, 0, picture) for picture in pictures]
    assert scorer(pictures, same) == pytest.approx([0, 0], abs=1e-6)


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """VGG-16's convolutions and LPIPS's lines with random weights; the folder and the file."""
    folder = tmp_path_factory.mktemp("vgg")
    torch.manual_seed(0)
    plan = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
    layers, width = [], 3
    for out in plan:
        if out == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
    vgg = nn.Sequential(*layers)
    state = {f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}
    save_file(state | {"head.fc.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    widths = (64, 128, 256, 512, 512)
    lines = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate(widths)}
    path = folder.parent / "lines.safetensors"
    save_file(lines, path)
    return vgg.eval(), folder, lines, path


def test_lpips_is_its_formula(lpips_files, pictures, cases):
    vgg, folder, lines, path = lpips_files
    scorer = torch_scorers.Lpips(str(folder), str(path), "cpu")
    found = scorer(pictures, cases)

    def features(image):
        x = torch.tensor(image / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor(
            [0.458, 0.448, 0.450]
        )[:, None, None]
        outputs = []
        with torch.no_grad():
            for i, layer in enumerate(vgg):
                x = layer(x)
                if i in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                    outputs.append(x[0].numpy().astype(np.float64))
        return [o / np.sqrt((o**2).sum(0)) for o in outputs]

    for picture, case, value in zip(pictures, cases, found, strict=True):
        target = np.asarray(Image.fromarray(case.target).resize((48, 32), Image.Resampling.BICUBIC))
        total = 0.0
        for i, (a, b) in enumerate(zip(features(picture), features(target), strict=True)):
            line = lines[f"lin{i}.model.1.weight"][0].numpy()
            total += (line * (a - b) ** 2).sum(0).mean()
        assert value == pytest.approx(total, rel=1e-4)
    same = [Case("training", "", "", 32, 48, 0, picture) for picture in pictures]
    assert scorer(pictures, same) == [0, 0]


def test_weights_that_are_not_theirs_are_refused(lpips_files, tmp_path):
    _, folder, lines, path = lpips_files
    save_file({**lines, "lin0.model.1.weight": torch.zeros(1, 8, 1, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"lin0\.model\.1\.weight has shape"):
        torch_scorers.Lpips(str(folder), str(tmp_path / "x.safetensors"), "cpu")
    with pytest.raises(UserError, match="has no features"):
        torch_scorers.Lpips(str(tmp_path), str(path), "cpu")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="has no safetensors file"):
        torch_scorers.DinoDistance(str(tmp_path / "pickled"), "cpu")


def test_without_pytorch_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(torch_scorers.importlib.util, "find_spec", lambda name: None)
    known = torch_scorers.scorers(lpips_weights="lines.safetensors")
    with pytest.raises(UserError) as error:
        load_scorers(["clip", "dino", "lpips"], known)
    assert len(error.value.problems) == 3
    assert all("pip install 'dopsd_jax[eval]'" in problem for problem in error.value.problems)


def test_weights_that_are_not_here_leave_the_other_scorers(tmp_path):
    known = torch_scorers.scorers(str(tmp_path / "clip"), str(tmp_path / "dino"))
    known |= appearance.scorers()
    names = ["clip", "dino", "crispness", "contrast", "composition"]
    problems = problems_of(load_scorers, names, known)
    assert len(problems) == 2
    for problem, name in zip(problems, names, strict=False):
        assert f"{name}': no such folder" in problem
        assert problem.endswith("; or leave it out: --scorers=crispness,contrast,composition")
    for problem in problems_of(load_scorers, ["clip", "nowhere:x"], known):
        assert "leave it out" not in problem


OWN = """
class Fails:
    def __init__(self):
        raise ZeroDivisionError("by nothing")


class Needs:
    name, better, identity, kinds, needs = "x", "higher", "x", (), 3

    def __call__(self, images, cases):
        return []
"""


def test_own_scorers_that_fail_are_one_line_each(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in {
        "own_scorer": OWN, "own_syntax": "def", "own_exit": "raise SystemExit(3)",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(text)
    told = {
        ".own:x": "cannot be imported (TypeError: ",
        "own_syntax:x": "cannot be imported (SyntaxError: ",
        "own_exit:x": "cannot be imported (SystemExit: 3)",
        "own_scorer:Fails": "cannot be made (ZeroDivisionError: by nothing)",
        "own_scorer:Needs": "`needs` is 3, not a list of names",
    }
    problems = problems_of(load_scorers, list(told), {})
    for problem, (name, words) in zip(problems, told.items(), strict=True):
        assert problem.startswith(f"--scorers={name}: {words}")


def test_a_run_has_them_by_its_configuration(clip_folder, monkeypatch):
    config = defaults()
    config.stop.scorers, config.stop.clip = "clip,contrast", str(clip_folder)
    config.stop.rank_by = "clip"
    found = checkpoint_scores.find_scorers(config)
    assert isinstance(found["clip"], torch_scorers.ClipScore) and len(found) == 2
    assert checkpoint_scores.order_of(config, found) == Order("CLIP-S", True)
    rows = [SimpleNamespace(where=f"{n}.txt", captions=[("text", n)]) for n in ("a dog", "a [V]")]
    dataset = SimpleNamespace(
        rows=rows, infos=[SimpleNamespace(digest=i) for i in "ab"], features=None,
        prompt_keys=["text"], caption=lambda row, keys: (row, 0),
    )  # fmt: skip
    held = {None: np.arange(2)}
    with pytest.raises(UserError, match=r"a \[V\].txt: .* set config.stop.class_word"):
        checkpoint_scores.check_held_out(config, dataset, held, found.values())
    config.stop.class_word = "dog"
    checkpoint_scores.check_held_out(config, dataset, held, found.values())
    monkeypatch.setattr(torch_scorers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="scorer clip: needs PyTorch"):
        checkpoint_scores.find_scorers(config)
