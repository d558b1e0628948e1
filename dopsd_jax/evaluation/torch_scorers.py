"""Scorers for real pictures, on PyTorch, which is needed for nothing else (extra `eval`).

CLIP-S, DINO-D and LPIPS-D of upstream's small-set protocol, on open weights. Weights are read from
safetensors only, from a folder or a hub id (`owner/name[@revision]`); the commit is recorded with
the scores.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.json_files import read_json
from dopsd_jax.evaluation.prompts import ORDINARY, TEST, TRAINING
from dopsd_jax.evaluation.scorer import Case, Judge, Picture
from dopsd_jax.weights import hub
from dopsd_jax.weights.safetensors_io import TensorFiles

# Upstream's code names LAION-2B as its default weights, its paper's table was made with DFN-5B.
CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
DINO = "facebook/dinov3-vits16plus-pretrain-lvd1689m"
VGG = "timm/vgg16.tv_in1k"
_CLIP_FILES = ("config.json", "model*.safetensors*", "preprocessor_config.json", "tokenizer*")
_CLIP_FILES += ("vocab.json", "merges.txt", "special_tokens_map.json")
_MODEL_FILES = ("config.json", "model*.safetensors*")

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, deviation
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of [-1, 1]
# Convolutions of VGG-16 by their place in `features`; LPIPS looks behind the last of each group.
VGG_GROUPS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_INPUT = 3


def scorers(
    clip: str = CLIP,
    dino: str = DINO,
    vgg: str = VGG,
    lpips_weights: str = "",
    device: str = "cpu",
) -> dict[str, Callable[[], Judge]]:
    """Scorers by name; weights are loaded when one is made.

    lpips_weights: LPIPS's linear layers as safetensors; see docs/evaluation.md for how to get them.
    """
    return {
        "clip": lambda: ClipScore(clip, device),
        "dino": lambda: DinoDistance(dino, device),
        "lpips": lambda: Lpips(vgg, lpips_weights, device),
    }


def need_torch(name: str) -> Any:
    """PyTorch. Raises `UserError` where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"scorer {name}: needs PyTorch, which is not here; pip install 'dopsd_jax[eval]'"
        )
    import torch

    return torch


class ClipScore:
    """CLIP-S: cosine of the picture's and the text's embeddings (transformers' CLIPModel)."""

    name, better, kinds, needs = "CLIP-S", "higher", (TRAINING, TEST, ORDINARY), ("prompt",)

    def __init__(self, model: str, device: str):
        self.torch = need_torch("clip")
        import transformers

        folder, self.identity = _find(model, _CLIP_FILES)
        settings, _ = read_json(folder / "preprocessor_config.json")
        try:
            size = settings["size"]
            self.side = int(size["shortest_edge"] if isinstance(size, dict) else size)
            self.normal = tuple(settings["image_mean"]), tuple(settings["image_std"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{folder}/preprocessor_config.json: is not CLIP's") from None
        self.model = _load(transformers.CLIPModel, folder, device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.texts: dict[str, Any] = {}

    def __call__(self, images: Sequence[Picture], cases: Sequence[Case]) -> list[float]:
        pixels = _tensor(self.torch, [self._cut(i) for i in images], self.normal, self.model.device)
        with self.torch.inference_mode():
            texts = self.torch.cat([self._text(case.text) for case in cases])
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            found = _unit(self.model.visual_projection(pooled))
        return (found * texts).sum(-1).cpu().tolist()

    def _text(self, text: str):
        """The embedding of a text, alone and so without padding; what CLIP cannot read is cut."""
        if text not in self.texts:
            most = self.model.config.text_config.max_position_embeddings
            ids = self.tokenizer(text, truncation=True, max_length=most, return_tensors="pt")
            pooled = self.model.text_model(**ids.to(self.model.device)).pooler_output
            self.texts[text] = _unit(self.model.text_projection(pooled))
        return self.texts[text]

    def _cut(self, image: Picture) -> UInt8[np.ndarray, "s s 3"]:
        """The shorter side to the model's, bicubic, and the middle of it."""
        scale = self.side / min(image.shape[:2])
        height, width = (max(self.side, round(n * scale)) for n in image.shape[:2])
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))


class DinoDistance:
    """DINO-D: one less the cosine of the mean patch tokens of picture and target (DINOv3)."""

    name, better, kinds, needs = "DINO-D", "lower", (TRAINING,), ("target",)

    def __init__(self, model: str, device: str):
        self.torch = need_torch("dino")
        import transformers

        folder, self.identity = _find(model, _MODEL_FILES)
        self.model = _load(transformers.AutoModel, folder, device)
        config = self.model.config
        self.skip = 1 + getattr(config, "num_register_tokens", 0)  # class token, registers
        self.patch = config.patch_size

    def __call__(self, images: Sequence[Picture], cases: Sequence[Case]) -> list[float]:
        a, b = (self._embed(some) for some in (images, _sources(images, cases)))
        return (1 - (a * b).sum(-1)).cpu().tolist()

    def _embed(self, images: Sequence[Picture]):
        torch = self.torch
        cut = lambda n: n // self.patch * self.patch
        pixels = _tensor(torch, images, IMAGENET, self.model.device)
        pixels = pixels[..., : cut(pixels.shape[-2]), : cut(pixels.shape[-1])]
        with torch.inference_mode():
            tokens = self.model(pixel_values=pixels).last_hidden_state[:, self.skip :]
        return _unit(tokens.mean(1))


class Lpips:
    """LPIPS-D, version 0.1 on VGG-16: weighted squared differences of unit features, averaged."""

    name, better, kinds, needs = "LPIPS-D", "lower", (TRAINING,), ("target",)

    def __init__(self, vgg: str, weights: str, device: str):
        self.torch = need_torch("lpips")
        if not weights:
            raise UserError(
                "scorer lpips: needs --lpips_weights of evaluate, config.stop.lpips_weights of "
                "train; docs/evaluation.md says how to make the file from the package lpips, or "
                "leave lpips out"
            )
        folder, name = _find(vgg, _MODEL_FILES)
        layers = [i for group in VGG_GROUPS for i in group]
        shapes, width = {}, VGG_INPUT
        for group, out in zip(VGG_GROUPS, VGG_WIDTHS, strict=True):
            for i in group:
                shapes |= {f"features.{i}.weight": (out, width, 3, 3), f"features.{i}.bias": (out,)}
                width = out
        lines = {f"lin{i}.model.1.weight": (1, n, 1, 1) for i, n in enumerate(VGG_WIDTHS)}
        tensor = lambda array: self.torch.from_numpy(np.array(array, np.float32)).to(device)
        found = {k: tensor(v) for k, v in _tensors(folder, shapes).items()}
        self.layers = {
            i: (found[f"features.{i}.weight"], found[f"features.{i}.bias"]) for i in layers
        }
        path = Path(weights).expanduser()
        self.lines = [tensor(v) for v in _tensors(path, lines).values()]
        self.identity = f"{name} {_digest([path])}"

    def __call__(self, images: Sequence[Picture], cases: Sequence[Case]) -> list[float]:
        with self.torch.inference_mode():
            a, b = (self._features(some) for some in (images, _sources(images, cases)))
            each = [
                (line * (x - y).square()).sum(1).mean((1, 2))
                for line, x, y in zip(self.lines, a, b, strict=True)
            ]
        return sum(each).cpu().tolist()

    def _features(self, images: Sequence[Picture]) -> list:
        torch, functional = self.torch, self.torch.nn.functional
        x = _tensor(torch, images, ((0.5,) * 3, (0.5,) * 3), self.lines[0].device)
        shift, scale = (
            torch.tensor(v, device=x.device)[:, None, None] for v in (LPIPS_SHIFT, LPIPS_SCALE)
        )
        x, found = (x - shift) / scale, []
        for number, group in enumerate(VGG_GROUPS):
            x = functional.max_pool2d(x, 2) if number else x
            for i in group:
                x = functional.relu(functional.conv2d(x, *self.layers[i], padding=1))
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found


def _find(model: str, patterns: tuple[str, ...]) -> tuple[Path, str]:
    """The folder of weights, and what names them: the hub's commit, or a digest of the files."""
    found = hub.resolve(model, patterns=patterns)
    files = sorted(found.path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{found.path}: has no safetensors file; only these are read")
    return found.path, f"{model}@{found.revision or _digest(files)}"


def _digest(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _load(kind: Any, folder: Path, device: str) -> Any:
    try:
        model = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype="float32"
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder}: cannot be loaded ({reason})") from None
    return model.eval().to(device)


def _tensors(where: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The named tensors of safetensors files. Raises `UserError` for each missing or mis-shaped."""
    files = TensorFiles.open(where)
    faults = [
        f"{where}: has no {name}" if name not in files.infos
        else f"{where}: {name} has shape {tuple(files.infos[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if name not in files.infos or tuple(files.infos[name].shape) != shape
    ]  # fmt: skip
    raise_if(faults)
    return {name: files.read(name) for name in shapes}


def _tensor(torch, images: Sequence[Picture], normal, device):
    """Pictures as [n, 3, h, w], in [0, 1] less the mean over the deviation."""
    pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(v, device=device)[:, None, None] for v in normal)
    return (pixels - mean) / deviation


def _unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def _sources(images: Sequence[Picture], cases: Sequence[Case]) -> list[Picture]:
    """Each case's target at its picture's size, bicubic."""
    found = []
    for image, case in zip(images, cases, strict=True):
        target = Image.fromarray(case.target)
        size = image.shape[1], image.shape[0]
        if target.size != size:
            target = target.resize(size, Image.Resampling.BICUBIC)
        found.append(np.asarray(target))
    return found
