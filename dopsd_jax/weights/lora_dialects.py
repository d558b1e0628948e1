"""How LoRA files name the layers they adapt: the dialects of the common trainers and programs.

P is a layer's path in diffusers, N its path in the authors' files. A name in a file is a prefix, P
or N (in some dialects with underscores for dots), and a suffix. Names with underscores are
ambiguous, so they are never taken apart: the names of all known layers are made, and looked up.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dopsd_jax.weights.found_files import COMPILED
from dopsd_jax.weights.networks import Network


@dataclasses.dataclass(frozen=True)
class Target:
    """A linear layer as a file may adapt it: one layer of ours, or several fused along the output.

    Attributes:
      paths: diffusers paths, in the order of their rows.
      rows: output size of each.
      width: input size.
      swapped: the file has the second half of a layer's rows first.
    """

    paths: tuple[str, ...]
    rows: tuple[int, ...]
    width: int
    swapped: bool = False

    def in_order(self, b: np.ndarray) -> np.ndarray:
        """B [out, rank] of a file with our rows, and the other way round."""
        return np.roll(b, len(b) // 2, axis=0) if self.swapped else b


@dataclasses.dataclass(frozen=True)
class Layers:
    """All linear layers of a network by diffusers path, and by the authors' path.

    `config` is the network's config.json: a LoRA file of our own says what it was made for.
    `architecture`: what the header of a LoRA file calls the network (`modelspec.architecture`).
    `licence`: of the published weights; "" where there are none of this size.
    """

    split: Mapping[str, Target]
    native: Mapping[str, Target]
    config: Mapping[str, Any] | None = None
    architecture: str = ""
    licence: str = ""


@dataclasses.dataclass(frozen=True)
class Style:
    """One way of naming: `native` paths or diffusers', dots or underscores."""

    prefix: str
    native: bool
    underscores: bool = False


# What stands behind a layer's name: PEFT puts the adapter's own name before `weight`.
_SUFFIX = re.compile(
    r"\.(?:lora_(?P<peft>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|lora[_.](?P<kohya>down|up)\.weight|lokr_(?P<lokr>w[12](?:_[ab])?)|(?P<alpha>alpha))$"
)
_PARTS = {"A": "a", "B": "b", "down": "a", "up": "b"}

UNSUPPORTED = {
    ".dora_scale": "is a DoRA magnitude",
    ".lora_magnitude_vector": "is a DoRA magnitude",
    ".lora_magnitude_vector.weight": "is a DoRA magnitude",
    ".lora_A.bias": "is a bias of an adapter",
    ".lora_B.bias": "is a bias of an adapter",
    ".lora_mid.weight": "is a convolution's middle factor",
    ".diff": "is a full difference, not a low-rank one",
    ".diff_b": "is a difference of a bias",
}
UNSUPPORTED_PARTS = {
    ".lokr_t2": "convolutional LoKr",
    ".hada_": "LoHa",
    ".oft_": "OFT",
    ".boft_": "BOFT",
}

# A number in musubi-tuner's LoKr files. They have a rank, and so an alpha, also where the second
# matrix is whole: its longer side.
MUSUBI_LOKR = "lokr_factor"

# Dialect of each way of naming, by the suffix it comes with: PEFT's A and B, or down and up.
STYLES: dict[Style, dict[str, str]] = {
    Style("transformer.", False): {"ab": "D", "down": "T"},
    Style("diffusion_model.", False): {"ab": "Cs", "down": "Cd"},
    Style("diffusion_model.", True): {"ab": "Cn", "down": "Cd"},
    Style("lora_unet_", False, True): {"ab": "Ks", "down": "Ks"},
    Style("lora_unet_", True, True): {"ab": "K", "down": "K"},
    Style("lora_transformer_", False, True): {"ab": "O", "down": "O"},
    Style("lycoris_", False, True): {"ab": "Y", "down": "Y"},
    Style("base_model.model.", False): {"ab": "Q", "down": "Q"},
    Style("", False): {"ab": "P", "down": "P", "default": "S"},
    # The same dialects behind a wrapper's name, or with the authors' paths.
    Style("pipe.dit.", False): {"ab": "P", "down": "P", "default": "S"},
    Style("transformer.base_model.model.", False): {"ab": "D", "down": "T"},
    Style("base_model.model.transformer.", False): {"ab": "Q", "down": "Q"},
    Style("model.diffusion_model.", True): {"ab": "Cn", "down": "Cd"},
    Style("model.diffusion_model.", False): {"ab": "Cs", "down": "Cd"},
    Style("base_model.model.diffusion_model.", True): {"ab": "Cn", "down": "Cd"},
    Style("base_model.model.", True): {"ab": "Cn", "down": "Cd"},
    Style("transformer.", True): {"ab": "Cn", "down": "Cd"},
    Style("", True): {"ab": "Cn", "down": "Cd"},
}
# Beginnings of names that adapt a text encoder.
TEXT_ENCODERS = ("lora_te", "text_encoder", "te_", "te.", "base_model.model.text_encoder", "clip_")
WRITTEN = {
    "D": Style("transformer.", False),
    "Cs": Style("diffusion_model.", False),
    "Cn": Style("diffusion_model.", True),
    "K": Style("lora_unet_", True, True),
    "Q": Style("base_model.model.", False),
    "Y": Style("lycoris_", False, True),
}


def layers_of(network: Network, config: Any) -> Layers:
    """The layers that files for this network may name."""
    leaves = network.names(config)
    split = {
        source.name.removesuffix(".weight"): source.shape
        for leaf in leaves
        if leaf.kind == "linear"
        for source in leaf.sources
    }
    native = {}
    for layout in network.layouts(config):
        if layout.name != network.single:
            continue
        for entry in layout.entries:
            paths = tuple(s.name.removesuffix(".weight") for s in entry.sources)
            if all(path in split for path in paths):
                rows, width = tuple(split[p][0] for p in paths), split[paths[0]][1]
                native[entry.name.removesuffix(".weight")] = Target(
                    paths, rows, width, entry.swapped
                )
    own = {path: Target((path,), (shape[0],), shape[1]) for path, shape in split.items()}
    return Layers(own, native, config.to_dict(), network.lora(config), network.licence(config))


# Who does not read a dialect that is written, by how the architecture begins. All read D.
UNREAD = {
    "Z-Image": {
        "Cn": "diffusers reads a part of its layers, without a word",
        "Y": "diffusers does not read it",
        "Q": "it is for PEFT: diffusers and ComfyUI find no layer in it",
    },
    "Flux.2": {
        "Cs": "ComfyUI finds no layer in it",
        "Y": "diffusers finds no layer in it, and says nothing",
        "Q": "ComfyUI finds no layer in it, and diffusers loses its scale",
    },
}


def unread(layers: Layers, dialect: str) -> str:
    """Who does not read a file of this dialect for this model; '' if all do."""
    for beginning, table in UNREAD.items():
        if layers.architecture.startswith(beginning):
            return table.get(dialect, "")
    return ""


def split_name(name: str) -> tuple[str, str | None, str, str]:
    """A tensor's stem, its part, kind, and adapter name.

    The part is `a`, `b`, one of `lokr.PARTS`, or `alpha`; None: it is of no adapter that is read.

    The kind is `ab`, `default` (with an adapter name) or `down`: it tells dialects apart.

    Examples:
      >>> split_name("transformer.layers.0.attention.to_q.lora_A.weight")
      ('transformer.layers.0.attention.to_q', 'a', 'ab', '')
      >>> split_name("lora_unet_layers_0_attention_to_q.lora_up.weight")
      ('lora_unet_layers_0_attention_to_q', 'b', 'down', '')
    """
    name = name.replace(COMPILED, "")
    found = _SUFFIX.search(name)
    if found is None:
        return name, None, "", ""
    adapter = found["adapter"] or ""
    kind = "down" if found["kohya"] else "default" if adapter else "ab"
    letter = found["peft"] or found["kohya"]
    part = found["lokr"] or (_PARTS[letter] if letter else "alpha")
    return name[: found.start()], part, kind, adapter


def stem(style: Style, path: str) -> str:
    """What stands in a file before the suffix."""
    return style.prefix + (path.replace(".", "_") if style.underscores else path)


def stems(layers: Layers, styles: Sequence[Style]) -> dict[str, tuple[Style, Target]]:
    """Every name that a file of these styles may use. The first style wins where two agree."""
    table: dict[str, tuple[Style, Target]] = {}
    for style in styles:
        for path, target in (layers.native if style.native else layers.split).items():
            known = table.setdefault(stem(style, path), (style, target))
            if known[1] != target:
                raise ValueError(f"{stem(style, path)}: names {known[1].paths} and {target.paths}")
    return table
