"""Reading LoRA files: every dialect means the same change; what is wrong is told."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import relative_error
from lora_helpers import (
    BLOCK,
    DIALECTS,
    LAYERS,
    native_names,
    random_modules,
    same_change,
    save,
    split_names,
    torch_transformer,
)

from dopsd_jax.common.errors import UserError
from dopsd_jax.families.zimage.networks import ZIMAGE
from dopsd_jax.models.zimage_config import ZImageConfig
from dopsd_jax.weights.lora_dialects import STYLES, layers_of, stems
from dopsd_jax.weights.lora_files import read_lora
from dopsd_jax.weights.lora_settings import HEADER


@pytest.mark.parametrize("case", DIALECTS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_every_dialect_means_the_same_change(tmp_path, case, everywhere):
    write, scale = DIALECTS[case]
    modules = random_modules(LAYERS.split if everywhere else BLOCK, scale=scale)
    path = save(tmp_path / "x.safetensors", write(modules))
    lora = read_lora(path, LAYERS)
    assert lora.dialect == case.split()[0]
    assert lora.dtype == "F32"
    same_change(lora.modules, modules, bound=0)


def _peft_folder(folder, modules, **settings):
    folder.mkdir()
    save(folder / "adapter_model.safetensors", split_names(modules, "base_model.model."))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {}} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_peft_folder_takes_its_scale_from_its_json(tmp_path):
    modules = random_modules(scale=2.0)
    folder = _peft_folder(tmp_path / "student", modules)
    for path in (folder, folder / "adapter_model.safetensors"):
        lora = read_lora(path, LAYERS)
        assert lora.dialect == "Q"
        same_change(lora.modules, modules, bound=0)
    root = _peft_folder(tmp_path / "root", modules, use_rslora=True)
    assert read_lora(root, LAYERS).modules[BLOCK[0]].scale == 8 / math.sqrt(4)
    with pytest.raises(UserError, match="several adapters \\(root, student\\)"):
        read_lora(tmp_path, LAYERS)


def test_what_real_peft_saves_is_what_it_applies(tmp_path):
    """Rank and alpha by pattern: the change PEFT computes is the change we read."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["attention.to_q", "feed_forward.w1", "to_out.0"],
        rank_pattern={"layers.1.attention.to_q": 2, "feed_forward.w1": 6},
        alpha_pattern={"layers.0.feed_forward.w1": 3}, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(torch_transformer(), config, adapter_name="student")
    model.save_pretrained(tmp_path)
    expected = {
        name.removeprefix("base_model.model."): module.get_delta_weight("student").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A")
    }
    lora = read_lora(tmp_path / "student", LAYERS)
    assert {m.rank for m in lora.modules.values()} == {2, 4, 6}
    assert lora.modules.keys() == expected.keys()
    for path, delta in expected.items():
        assert relative_error(lora.modules[path].delta(), delta) < 1e-6, path


# The header, and alpha in two places.


def _header(**settings):
    table = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}} | settings
    return {HEADER: json.dumps({f"transformer.{k}": v for k, v in table.items()})}


def test_the_header_gives_the_scale(tmp_path):
    modules = random_modules()
    tensors = split_names(modules, "transformer.")
    patterns = {"layers.1.attention.to_q": 2, "feed_forward.w1": 12}
    path = save(tmp_path / "x.safetensors", tensors, _header(alpha_pattern=patterns))
    lora = read_lora(path, LAYERS).modules
    assert lora["layers.1.attention.to_q"].scale == 0.5
    assert lora["layers.0.feed_forward.w1"].scale == 3
    assert lora["layers.0.attention.to_q"].scale == 2


def test_a_pattern_may_name_a_layer_as_the_file_does(tmp_path):
    modules = random_modules()
    ranks = dict.fromkeys(("attention.out", "w1", "w2", "w3"), 4)
    alphas = {"layers.0.attention.qkv": 36, "out": 4, "w1": 4}
    header = _header(r=12, lora_alpha=12, rank_pattern=ranks, alpha_pattern=alphas)
    path = save(tmp_path / "x.safetensors", native_names(modules, "transformer."), header)
    found = read_lora(path, LAYERS).modules
    assert found["layers.0.attention.to_k"].scale == 3
    assert found["layers.1.attention.to_k"].scale == 1
    assert found["layers.0.attention.to_out.0"].scale == 1


@pytest.mark.parametrize("alpha, applied", [(8, 2.0), (4, 2.0), (2, None)])
def test_alpha_in_two_places_is_applied_once(tmp_path, alpha, applied):
    tensors = split_names(random_modules(), "diffusion_model.", alpha=8)
    path = save(tmp_path / "x.safetensors", tensors, _header(lora_alpha=alpha))
    if applied is None:  # neither the same nor nothing: who is right?
        with pytest.raises(UserError, match="has scale 2 by its alpha"):
            read_lora(path, LAYERS)
        return
    assert {m.scale for m in read_lora(path, LAYERS).modules.values()} == {applied}


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({HEADER: "{"}, "not valid JSON"),
        ({HEADER: "[]"}, "not a JSON object"),
        (_header(r=0), "r 0 is not a positive"),
        (_header(lora_alpha="8"), "lora_alpha '8'"),
        (_header(r=8), "has rank 4, but"),
        (_header(use_dora=True), "use_dora"),
        (_header(lora_bias=True), "lora_bias"),
        (_header(peft_type="LOKR"), "LOKR"),
        (_header(rank_pattern={"(": 3}), "is not a pattern"),
        (_header(alpha_pattern=[1]), "alpha_pattern is not a table"),
        (_header(init_lora_weights="pissa_niter_4"), "changes the base model"),
        (_header(init_lora_weights="lora_ga"), "changes the base model"),
    ],
)
def test_bad_settings_are_named(tmp_path, metadata, message):
    path = save(tmp_path / "x.safetensors", split_names(random_modules(), "transformer."), metadata)
    with pytest.raises(UserError) as caught:
        read_lora(path, LAYERS)
    assert message in str(caught.value)


# Bad files.


def _bad(change):
    tensors = split_names(random_modules(), "transformer.")
    change(tensors)
    return tensors


Q = "transformer.layers.0.attention.to_q"
NAN = np.full((4, 48), np.nan, np.float32)
ONE = random_modules(BLOCK[:1])


def _only(tensors, others):
    tensors.clear()
    tensors.update(others)


BAD = {
    "another model": (lambda t: t.update({"transformer.blocks.0.lora_A.weight": NAN}), "no linear"),
    "text encoder": (lambda t: t.update({"lora_te_layers_0.lora_down.weight": NAN}), "no linear"),
    "a norm": (lambda t: t.update({f"{Q[:-4]}norm_q.lora_A.weight": NAN}), "no linear layer"),
    "past the end": (
        lambda t: t.update({Q.replace("0", "9") + ".lora_A.weight": NAN}),
        "layers.9.attention.to_q.lora_A.weight' names no linear layer",
    ),
    "no factor": (lambda t: t.update({f"{Q}.weight": NAN}), "is not a factor"),
    "lokr alone": (lambda t: _only(t, {f"{Q}.lokr_w1": np.ones((6, 6), "f4")}), "needs lokr_w2"),
    "dora": (lambda t: t.update({f"{Q}.dora_scale": NAN}), "DoRA"),
    "lokr": (lambda t: t.update({f"{Q}.lokr_w1": NAN}), "LoKr"),
    "bias": (lambda t: t.update({f"{Q}.lora_B.bias": NAN}), "bias of an adapter"),
    "difference": (lambda t: t.update({f"{Q}.diff": NAN}), "full difference"),
    "no B": (lambda t: t.pop(f"{Q}.lora_B.weight"), "lacks lora_B (up)"),
    "no A": (lambda t: t.pop(f"{Q}.lora_A.weight"), "lacks lora_A (down)"),
    "wide": (lambda t: t.update({f"{Q}.lora_A.weight": np.zeros((4, 47), "f4")}), "[rank, 48]"),
    "tall": (lambda t: t.update({f"{Q}.lora_B.weight": np.zeros((47, 4), "f4")}), "[48, rank]"),
    "two ranks": (lambda t: t.update({f"{Q}.lora_B.weight": np.zeros((48, 3), "f4")}), "[48, 3]"),
    "rank 0": (
        lambda t: t.update(
            {f"{Q}.lora_{x}.weight": np.zeros(s, "f4") for x, s in (("A", (0, 48)), ("B", (48, 0)))}
        ),
        "[0, 48]",
    ),
    "4-d": (lambda t: t.update({f"{Q}.lora_A.weight": np.zeros((4, 48, 1), "f4")}), "[4, 48, 1]"),
    "not finite": (lambda t: t.update({f"{Q}.lora_A.weight": NAN}), "not finite"),
    "integers": (lambda t: t.update({f"{Q}.lora_A.weight": np.zeros((4, 48), "i4")}), "is I32"),
    "alpha of two": (lambda t: t.update({f"{Q}.alpha": np.ones(2, "f4")}), "not one number"),
    "two spellings": (lambda t: t.update({f"{Q}.lora_down.weight": NAN}), "are the same factor"),
    "two dialects": (lambda t: t.update(split_names(ONE, "diffusion_model.")), "mixes"),
    "nothing": (lambda t: t.clear(), "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(tmp_path, case):
    change, message = BAD[case]
    path = save(tmp_path / "x.safetensors", _bad(change))
    with pytest.raises(UserError) as caught:
        read_lora(path, LAYERS)
    assert message in str(caught.value)
    assert all(str(path) in problem for problem in caught.value.problems)


def test_all_faults_are_listed(tmp_path):
    tensors = split_names(random_modules(), "transformer.")
    for path in BLOCK[:5]:
        del tensors[f"transformer.{path}.lora_B.weight"]
    with pytest.raises(UserError) as caught:
        read_lora(save(tmp_path / "x.safetensors", tensors), LAYERS)
    assert len(caught.value.problems) == 5


def test_a_layer_adapted_fused_and_split_is_refused(tmp_path):
    modules = random_modules()
    tensors = native_names(modules, "diffusion_model.")
    tensors |= split_names({p: modules[p] for p in BLOCK if p.endswith("to_k")}, "diffusion_model.")
    with pytest.raises(UserError, match="another name in the file adapts too"):
        read_lora(save(tmp_path / "x.safetensors", tensors), LAYERS)


def test_names_with_underscores_are_unambiguous():
    """Also for the published sizes: no two layers of a dialect share a name."""
    layers = layers_of(ZIMAGE["transformer"], ZImageConfig())
    assert len(layers.split) == 276 and len(layers.native) == 276 - 2 * 34
    for style in STYLES:
        count = len(layers.native if style.native else layers.split)
        assert len(stems(layers, [style])) == count
    assert stems(layers, list(STYLES))
