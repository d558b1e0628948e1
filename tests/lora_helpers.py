"""Adapters of a small transformer, and files of them in every dialect, written by hand."""

import numpy as np
import torch
from conftest import relative_error
from diffusers import ZImageTransformer2DModel
from safetensors.numpy import save_file

from dopsd_jax.families.zimage.networks import ZIMAGE
from dopsd_jax.models.zimage_config import ZImageConfig
from dopsd_jax.weights.lora_dialects import layers_of
from dopsd_jax.weights.lora_files import LoraModule

CONFIG = ZImageConfig(
    dim=48, layers=2, refiner_layers=1, heads=2, caption_dim=16, axes_dims=(8, 8, 8),
    axes_lens=(64, 16, 16),
)  # fmt: skip
LAYERS = layers_of(ZIMAGE["transformer"], CONFIG)
BLOCK = [p for p in LAYERS.split if ".attention.to_" in p or ".feed_forward." in p]


def random_modules(paths=None, rank=4, scale=2.0, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    targets = {path: LAYERS.split[path] for path in (BLOCK if paths is None else paths)}
    return {
        p: LoraModule(draw(rank, t.width), draw(t.rows[0], rank), scale) for p, t in targets.items()
    }


def deltas(modules):
    """The changes, in float64 from the factors."""
    return {
        p: m.scale * (m.b.astype(np.float64) @ m.a.astype(np.float64)) for p, m in modules.items()
    }


def same_change(actual, expected, bound=1e-6):
    actual, expected = deltas(actual), deltas(expected)
    assert actual.keys() == expected.keys()
    for path in expected:
        assert relative_error(actual[path], expected[path]) <= bound, path


def save(path, tensors, metadata=None):
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    save_file(arrays, path, metadata)
    return path


def split_names(
    modules, prefix, underscores=False, a="lora_A", b="lora_B", alpha=None, end="weight"
):
    """A file with diffusers paths, written out by hand."""
    tensors = {}
    for path, m in modules.items():
        stem = prefix + (path.replace(".", "_") if underscores else path)
        tensors[f"{stem}.{a}.{end}"], tensors[f"{stem}.{b}.{end}"] = m.a, m.b
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.array(alpha, np.float32)
    return tensors


NATIVE = {
    "attention.to_out.0": "attention.out",
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1": "final_layer",
}


def native_names(modules, prefix, underscores=False, a="lora_A", b="lora_B", alpha=None):
    """The same with the authors' paths, q, k and v on a block diagonal: by hand, as trainers do."""
    tensors = {}
    for path, m in modules.items():
        if path.endswith(("to_k", "to_v")):
            continue
        down, up, rank = m.a, m.b, len(m.a)
        if path.endswith("to_q"):
            three = [modules[path[:-1] + letter] for letter in "qkv"]
            down = np.concatenate([t.a for t in three])
            up = np.zeros((sum(len(t.b) for t in three), 3 * rank), np.float32)
            for i, t in enumerate(three):
                up[i * len(t.b) : (i + 1) * len(t.b), i * rank : (i + 1) * rank] = t.b
            path = path.replace("to_q", "qkv")
        for ours, theirs in NATIVE.items():
            path = path.replace(ours, theirs)
        stem = prefix + (path.replace(".", "_") if underscores else path)
        tensors[f"{stem}.{a}.weight"], tensors[f"{stem}.{b}.weight"] = down, up
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.array(alpha * len(down) / rank, np.float32)
    return tensors


# Every dialect of the table, written as its programs write it. Rank 4 and alpha 8 where it is told.
DOWN = {"a": "lora_down", "b": "lora_up"}
DIALECTS = {
    "D": (lambda m: split_names(m, "transformer."), 1),
    "D with alpha": (lambda m: split_names(m, "transformer.", alpha=8), 2),
    "T": (lambda m: split_names(m, "transformer.", alpha=8, **DOWN), 2),
    "T old": (lambda m: split_names(m, "transformer.", a="lora.down", b="lora.up"), 1),
    "Cs": (lambda m: split_names(m, "diffusion_model."), 1),
    "Cs with alpha": (lambda m: split_names(m, "diffusion_model.", alpha=8), 2),
    "Cd split": (lambda m: split_names(m, "diffusion_model.", alpha=8, **DOWN), 2),
    "Cn": (lambda m: native_names(m, "diffusion_model."), 1),
    "Cn with alpha": (lambda m: native_names(m, "diffusion_model.", alpha=8), 2),
    "Cd": (lambda m: native_names(m, "diffusion_model.", alpha=8, **DOWN), 2),
    "K": (lambda m: native_names(m, "lora_unet_", True, alpha=8, **DOWN), 2),
    "Ks": (lambda m: split_names(m, "lora_unet_", True, alpha=8, **DOWN), 2),
    "O": (lambda m: split_names(m, "lora_transformer_", True, alpha=8, **DOWN), 2),
    "Y": (lambda m: split_names(m, "lycoris_", True, alpha=8, **DOWN), 2),
    "S": (lambda m: split_names(m, "", a="lora_A.default", b="lora_B.default"), 1),
    "P": (lambda m: split_names(m, ""), 1),
}


def torch_transformer():
    torch.manual_seed(0)
    return ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=48, n_layers=2,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 8, 8],
        axes_lens=[64, 16, 16],
    )  # fmt: skip
