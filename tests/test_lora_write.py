"""Writing LoRA files: conversions are exact; the real diffusers applies what we write."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from lora_helpers import (
    BLOCK,
    CONFIG,
    DIALECTS,
    LAYERS,
    deltas,
    random_modules,
    same_change,
    save,
    torch_transformer,
)
from safetensors.numpy import load_file

from dopsd_jax.common.errors import UserError
from dopsd_jax.families.zimage.networks import ZIMAGE
from dopsd_jax.models.zimage_config import ZImageConfig
from dopsd_jax.weights.lora_dialects import WRITTEN, layers_of
from dopsd_jax.weights.lora_files import read_lora
from dopsd_jax.weights.lora_settings import HEADER
from dopsd_jax.weights.lora_write import baked, fuse, one_rank, write_lora
from dopsd_jax.weights.safetensors_io import read_header

# Conversions.


@pytest.mark.parametrize("dialect", WRITTEN)
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
def test_written_files_mean_the_same_change(tmp_path, dialect, scale):
    modules = random_modules(LAYERS.split, scale=scale)
    path = tmp_path / ("folder" if dialect == "Q" else "x.safetensors")
    write_lora(path, modules, LAYERS, dialect)
    lora = read_lora(path, LAYERS)
    assert lora.dialect == dialect
    same_change(lora.modules, modules, bound=0 if scale != 0.3 else 1e-6)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    write_lora(tmp_path / "peft", random_modules(), LAYERS, "Q")
    write_lora(tmp_path / "peft", random_modules(), LAYERS, "Q")  # its own files are replaced
    (tmp_path / "peft" / "model_index.json").touch()
    with pytest.raises(UserError, match=r"holds other files, such as model_index\.json"):
        write_lora(tmp_path / "peft", random_modules(), LAYERS, "Q")


@pytest.mark.parametrize("dialect", WRITTEN)
@pytest.mark.parametrize("case", DIALECTS)
def test_any_dialect_becomes_any_other(tmp_path, case, dialect):
    write, scale = DIALECTS[case]
    modules = random_modules(scale=scale)
    source = read_lora(save(tmp_path / "a.safetensors", write(modules)), LAYERS)
    write_lora(tmp_path / "b", source.modules, LAYERS, dialect)
    same_change(read_lora(tmp_path / "b", LAYERS).modules, modules, bound=0)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_file_of_our_own_comes_back_bit_for_bit(tmp_path, dtype):
    numpy = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}[dtype]
    write_lora(tmp_path / "a.safetensors", random_modules(), LAYERS, dtype=dtype)
    lora = read_lora(tmp_path / "a.safetensors", LAYERS)
    assert lora.dtype == dtype
    write_lora(
        tmp_path / "b.safetensors", lora.modules, LAYERS, dtype=dtype, metadata=lora.metadata
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    stored = load_file(tmp_path / "a.safetensors")
    name = f"transformer.{BLOCK[0]}.lora_B.weight"
    assert np.array_equal(stored[name], (random_modules()[BLOCK[0]].b * 2).astype(numpy))


def test_an_adapter_of_the_fused_layer_stays_one(tmp_path):
    """A full B over q, k and v: split, each part has the whole A; fused again, the rank is kept."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 48), "f4"), rng.standard_normal((144, 5), "f4")
    name = "diffusion_model.layers.0.attention.qkv.lora_"
    tensors = {f"{name}A.weight": a, f"{name}B.weight": b}
    modules = read_lora(save(tmp_path / "a.safetensors", tensors), LAYERS).modules
    for i, letter in enumerate("qkv"):
        module = modules[f"layers.0.attention.to_{letter}"]
        assert np.array_equal(module.a, a) and np.array_equal(module.b, b[48 * i : 48 * (i + 1)])
    write_lora(tmp_path / "b.safetensors", modules, LAYERS, "Cn")
    back = load_file(tmp_path / "b.safetensors")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[n], tensors[n]) for n in tensors)


def test_a_block_diagonal_is_cut_back_to_the_small_rank(tmp_path):
    modules = random_modules(rank=4, scale=1.0)
    write_lora(tmp_path / "a.safetensors", modules, LAYERS, "K")
    tensors = load_file(tmp_path / "a.safetensors")
    qkv = "lora_unet_layers_0_attention_qkv"
    assert tensors[f"{qkv}.lora_down.weight"].shape == (12, 48)
    assert tensors[f"{qkv}.alpha"] == 12  # three times: the scale stays
    back = read_lora(tmp_path / "a.safetensors", LAYERS).modules
    for path, module in modules.items():
        assert np.array_equal(back[path].a, module.a) and np.array_equal(back[path].b, module.b)


def test_fusing_some_of_q_k_v_changes_only_these():
    modules = random_modules(["layers.0.attention.to_q"], scale=0.5)
    modules |= random_modules(["layers.0.attention.to_v"], rank=3, seed=1)
    ((path, module),) = fuse(modules, LAYERS).items()
    assert path == "layers.0.attention.qkv" and module.rank == 7
    delta = module.delta()
    deltas = {p: m.delta() for p, m in modules.items()}
    assert relative_error(delta[:48], deltas["layers.0.attention.to_q"]) < 1e-6
    assert not delta[48:96].any()
    assert relative_error(delta[96:], deltas["layers.0.attention.to_v"]) < 1e-6


def test_filling_up_to_one_rank_is_exact():
    modules = random_modules(BLOCK[:1], 2) | random_modules(BLOCK[1:2], 7)
    filled = one_rank({n: baked(m) for n, m in modules.items()})
    assert {m.rank for m in filled.values()} == {7}
    same_change(filled, modules, bound=0)


def test_what_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="no adapter to write"):
        write_lora(path, {}, LAYERS)
    with pytest.raises(UserError, match="'T' cannot be written"):
        write_lora(path, random_modules(), LAYERS, "T")
    with pytest.raises(UserError, match="'nowhere' is of no linear layer"):
        write_lora(path, {"nowhere": random_modules()[BLOCK[0]]}, LAYERS)
    with pytest.raises(UserError, match="does not fit F16"):
        write_lora(path, random_modules(scale=1e6), LAYERS, dtype="F16")
    assert not any(tmp_path.iterdir())


def _pipeline(transformer):
    scheduler = FlowMatchEulerDiscreteScheduler()
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return ZImagePipeline(scheduler=scheduler, transformer=transformer, **parts)


# The real diffusers.


@pytest.mark.parametrize("dialect", ["D", "Cs", "K"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_diffusers_applies_the_change_we_wrote(tmp_path, dialect, mixed):
    modules = random_modules(scale=1.5)
    if mixed:  # ranks that differ from layer to layer
        modules |= random_modules(BLOCK[::3], rank=7, scale=0.25)
    write_lora(tmp_path / "x.safetensors", modules, LAYERS, dialect)
    transformer = torch_transformer()
    before = {n: p.detach().clone() for n, p in transformer.named_parameters()}
    pipeline = _pipeline(transformer)
    pipeline.load_lora_weights(str(tmp_path / "x.safetensors"))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = dict(transformer.named_parameters())
    assert after.keys() == before.keys()
    for name, old in before.items():
        change = (after[name].detach() - old).double().numpy()
        module = modules.get(name.removesuffix(".weight"))
        if module is None:
            assert not change.any(), name
        else:
            expected = deltas({name: module})[name]
            assert relative_error(change, expected) < 1e-5, name


@pytest.mark.filterwarnings("ignore")
def test_what_diffusers_saves_is_read_at_its_strength(tmp_path):
    """diffusers writes unbaked factors and alpha in the header."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    transformer = torch_transformer()
    transformer.add_adapter(
        LoraConfig(r=3, lora_alpha=12, target_modules=["to_q", "w2"], init_lora_weights=False)
    )
    ZImagePipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors", LAYERS)
    assert lora.dialect == "D" and {m.scale for m in lora.modules.values()} == {4.0}
    for name, module in transformer.named_modules():
        if name in lora.modules:
            with torch.no_grad():
                expected = module.get_delta_weight("default").numpy()
            assert relative_error(lora.modules[name].delta(), expected) < 1e-6
    assert len(lora.modules) == 2 * 4


@pytest.mark.parametrize(
    "dialect, sizes", [("D", ("4", "4")), ("Cs", ("4", "4")), ("Cn", None), ("K", ("4", "6"))]
)
def test_the_header_has_the_rank_and_alpha_that_browsers_show(tmp_path, dialect, sizes):
    """Cn: a fused layer has three times the rank of others, and there is one field for a file."""
    path = tmp_path / "x.safetensors"
    write_lora(path, random_modules(scale=1.5), LAYERS, dialect)
    metadata = read_header(path).metadata
    found = metadata.get("ss_network_dim"), metadata.get("ss_network_alpha")
    assert found == (sizes or (None, None))
    assert metadata["ss_network_module"] == "networks.lora"


def test_the_licence_of_the_base_is_told_where_one_is_published(tmp_path):
    modules = random_modules(BLOCK[:1])
    for licence, told in (("Apache-2.0", "of the base model: Apache-2.0"), ("", None)):
        layers = dataclasses.replace(LAYERS, licence=licence)
        write_lora(tmp_path / "x.safetensors", modules, layers)
        metadata = read_header(tmp_path / "x.safetensors").metadata
        assert metadata.get("modelspec.license") == told
    for config, licence in ((ZImageConfig(), "Apache-2.0"), (CONFIG, "")):
        assert layers_of(ZIMAGE["transformer"], config).licence == licence


def test_the_default_file_says_what_loaders_look_for(tmp_path):
    write_lora(tmp_path / "style.safetensors", random_modules(), LAYERS, metadata={"ss_tag": "x"})
    metadata = read_header(tmp_path / "style.safetensors").metadata
    assert metadata["format"] == "pt" and metadata["ss_tag"] == "x"
    assert metadata["modelspec.architecture"] == "Z-Image/lora"
    assert metadata["modelspec.title"] == "style"
    settings = json.loads(metadata[HEADER])
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == 4
    assert settings["transformer.rank_pattern"] == settings["transformer.alpha_pattern"] == {}
    names = read_header(tmp_path / "style.safetensors").tensors
    assert not any(name.endswith(".alpha") for name in names)
    assert all(name.startswith("transformer.") for name in names)


# The command line.


def _tool(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, args)])
    tool = Path(__file__).parents[1] / "tools" / "convert_weights.py"
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(tool), run_name="__main__")
    out = capsys.readouterr()
    return caught.value.code, out.out, out.err


def test_the_tool_converts_and_describes(tmp_path, monkeypatch, capsys):
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "model" / "transformer" / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    modules = random_modules()
    told = {
        "modelspec.trigger_phrase": "[V] dog",
        "dopsd_jax.base_model": "owner/name",
        "modelspec.hash_sha256": "of the source",
    }
    write_lora(tmp_path / "a.safetensors", modules, LAYERS, dtype="BF16", metadata=told)
    tool = lambda *args: _tool(monkeypatch, capsys, *args, "--model", tmp_path / "model")
    code, out, _ = tool("lora", tmp_path / "a.safetensors", tmp_path / "k.safetensors", "--to", "K")
    assert code == 0 and "28 layers, dialect D -> K" in out
    code, out, _ = tool("inspect", tmp_path / "k.safetensors")
    assert code == 0 and "LoRA, dialect K, BF16, 28 layers adapted" in out
    assert "modelspec.trigger_phrase: [V] dog" in out and "base_model: owner/name" in out
    assert "hash_sha256" not in out
    args = tmp_path / "k.safetensors", tmp_path / "b.safetensors", "--dtype", "float32"
    assert tool("lora", *args)[0] == 0
    a, b = (load_file(tmp_path / f"{n}.safetensors") for n in "ab")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[n].astype(np.float32), b[n]) for n in a)
    code, _, err = tool("lora", tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert code == 2 and "is the source" in err
    (tmp_path / "bad.safetensors").write_bytes(b"")
    code, _, err = tool("lora", tmp_path / "bad.safetensors", tmp_path / "c.safetensors")
    assert code == 2 and "0 bytes" in err
