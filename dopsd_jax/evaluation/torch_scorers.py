"""Scorers for real pictures, on PyTorch, which is needed for nothing else (extra `eval`).

CLIP-S, DINO-D and LPIPS-D of upstream's small-set protocol, on open weights. Weights are read from
safetensors only, from a folder or a hub id (`owner/name[@revision]`); the commit is recorded with
the scores.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dopsd_jax.common.errors import Attempts, UserError, raise_if
from dopsd_jax.common.files import expand, open_regular
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.common.json_files import read_json
from dopsd_jax.evaluation.prompts import ORDINARY, TEST, TRAINING
from dopsd_jax.evaluation.scorer import Case, Judge, Picture
from dopsd_jax.weights import hub
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.tokenizers import RULES

# Upstream's code names LAION-2B as its default weights, its paper's table was made with DFN-5B.
CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
DINO = "facebook/dinov3-vits16plus-pretrain-lvd1689m"
VGG = "timm/vgg16.tv_in1k"
PICTURES = "preprocessor_config.json"
PAIRS = "vocab.json", "merges.txt"  # an older tokenizer, in the place of `RULES`
_CLIP_FILES = ("config.json", "model*.safetensors*", PICTURES, "tokenizer*")
_CLIP_FILES += (*PAIRS, "special_tokens_map.json")
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
        need_device(self.torch, device)
        attempt = Attempts()
        self.side, self.normal = attempt(lambda: read_pictures(folder)) or (0, ())
        self.tokenizer = attempt(lambda: _tokenizer(folder))
        self.model = attempt(lambda: _load(transformers.CLIPModel, folder, device))
        attempt.end()
        self._check(folder)
        self.texts: dict[str, Any] = {}

    def _check(self, folder: Path) -> None:
        """Raises `UserError` unless tokenizer and pictures are those of the model."""
        faults, config = [], self.model.config
        count, last = len(self.tokenizer), max(self.tokenizer.get_vocab().values(), default=0)
        known, side = config.text_config.vocab_size, config.vision_config.image_size
        if count != known or last >= known:
            faults.append(
                f"{folder}: its tokenizer has {count} tokens with ids up to {last}; config.json "
                f"says {known}: use the tokenizer of this very model"
            )
        if self.side != side:
            faults.append(
                f"{folder / PICTURES}: size is {self.side}; config.json says {side}: use the file "
                "of this very model"
            )
        raise_if(faults)

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
        need_device(self.torch, device)
        self.model = _load(transformers.AutoModel, folder, device)
        config = self.model.config
        self.skip = 1 + getattr(config, "num_register_tokens", 0)  # class token, registers
        self.patch = getattr(config, "patch_size", None)
        if not isinstance(self.patch, int):
            raise UserError(
                f"{folder}: is no vision transformer (config.json has no patch_size); name a "
                "DINOv3 of patches"
            )

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
        need_device(self.torch, device)
        layers = [i for group in VGG_GROUPS for i in group]
        shapes, width = {}, VGG_INPUT
        for group, out in zip(VGG_GROUPS, VGG_WIDTHS, strict=True):
            for i in group:
                shapes |= {f"features.{i}.weight": (out, width, 3, 3), f"features.{i}.bias": (out,)}
                width = out
        lines = {f"lin{i}.model.1.weight": (1, n, 1, 1) for i, n in enumerate(VGG_WIDTHS)}
        tensor = lambda array: self.torch.from_numpy(np.array(array, np.float32)).to(device)
        path, attempt = expand(weights), Attempts()
        vgg_arrays = attempt(lambda: _tensors(folder, shapes))
        line_arrays = attempt(lambda: _tensors(path, lines))
        attempt.end()
        found = {k: tensor(v) for k, v in vgg_arrays.items()}
        self.layers = {
            i: (found[f"features.{i}.weight"], found[f"features.{i}.bias"]) for i in layers
        }
        self.lines = [tensor(v) for v in line_arrays.values()]
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
        with open_regular(path) as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def need_device(torch: Any, device: str) -> None:
    """Raises `UserError` for a device that this PyTorch cannot use."""
    try:
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # AssertionError where it is built without CUDA
        raise UserError(
            f"--torch_device={device}: PyTorch cannot use it ({_reason(error)}); give cpu, or "
            "install the PyTorch for this device"
        ) from None


def read_pictures(folder: Path) -> tuple[int, tuple[tuple[float, ...], tuple[float, ...]]]:
    """The side of CLIP's pictures, and mean and deviation of their channels. Raises `UserError`."""
    content, _ = read_json(folder / PICTURES)
    fields = Fields(content, str(folder / PICTURES))
    nested = isinstance(fields.json.get("size"), Mapping)
    side = fields.part("size").count("shortest_edge") if nested else fields.count("size")
    normal = fields.numbers("image_mean", 3), fields.numbers("image_std", 3, positive=True)
    fields.finish()
    return side, normal


def _tokenizer(folder: Path) -> Any:
    """Raises `UserError`. Without its files transformers would make one of two tokens."""
    import transformers

    if not any(all(os.path.isfile(folder / name) for name in some) for some in ((RULES,), PAIRS)):
        raise UserError(
            f"{folder}: has no tokenizer, {RULES} or {' and '.join(PAIRS)}; download it too"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever its parsers, which are not Python, may raise
        raise UserError(f"{folder}: no tokenizer can be read there ({_reason(error)})") from None


def _load(kind: Any, folder: Path, device: str) -> Any:
    """The model with all its weights. Raises `UserError`."""
    from transformers import logging

    TensorFiles.open(folder)  # says what is wrong with a file that is not whole
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table of what is missing, told below
    try:
        model, found = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype="float32",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        model = model.eval().to(device)
    except Exception as error:  # what config.json says goes into code that checks little of it
        raise UserError(f"{folder}: cannot be loaded ({_reason(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
    # What is missing got random numbers. A pooler is behind the tokens that are compared.
    faults = [
        f"{folder}: has no {name}"
        for name in sorted(found["missing_keys"])
        if not name.startswith("pooler.")
    ]
    faults += [
        f"{folder}: {name} has shape {tuple(is_)}, not {tuple(wanted)}"
        for name, is_, wanted in sorted(found["mismatched_keys"])
    ]
    raise_if(faults)
    return model


def _reason(error: Exception) -> str:
    """The first line of what a library says; the kind of the error if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


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
