"""LoRA files: every dialect means the same change; the real diffusers applies what we write."""

import json
import math
import runpy
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from safetensors.numpy import load_file, save_file

from dopsd_jax.errors import UserError
from dopsd_jax.models.zimage import ZImageConfig
from dopsd_jax.weights.lora_dialects import STYLES, WRITTEN, layers_of, stems
from dopsd_jax.weights.lora_files import HEADER, LoraModule, read_lora
from dopsd_jax.weights.lora_write import baked, fuse, one_rank, write_lora
from dopsd_jax.weights.networks import ZIMAGE
from dopsd_jax.weights.safetensors_io import read_header

CONFIG = ZImageConfig(
    dim=48, layers=2, refiner_layers=1, heads=2, caption_dim=16, axes_dims=(8, 8, 8),
    axes_lens=(64, 16, 16),
)  # fmt: skip
LAYERS = layers_of(ZIMAGE["transformer"], CONFIG)
BLOCK = [p for p in LAYERS.split if ".attention.to_" in p or ".feed_forward." in p]


def _modules(paths=None, rank=4, scale=2.0, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    targets = {path: LAYERS.split[path] for path in (BLOCK if paths is None else paths)}
    return {
        p: LoraModule(draw(rank, t.width), draw(t.rows[0], rank), scale) for p, t in targets.items()
    }


def _deltas(modules):
    """The changes, in float64 from the factors."""
    return {
        p: m.scale * (m.b.astype(np.float64) @ m.a.astype(np.float64)) for p, m in modules.items()
    }


def _same_change(actual, expected, bound=1e-6):
    actual, expected = _deltas(actual), _deltas(expected)
    assert actual.keys() == expected.keys()
    for path in expected:
        assert relative_error(actual[path], expected[path]) <= bound, path


def _save(path, tensors, metadata=None):
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    save_file(arrays, path, metadata)
    return path


def _split(modules, prefix, underscores=False, a="lora_A", b="lora_B", alpha=None, end="weight"):
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


def _native(modules, prefix, underscores=False, a="lora_A", b="lora_B", alpha=None):
    """The same with the authors' paths, q, k and v on a block diagonal: by hand, as trainers do."""
    tensors, scale = {}, {}
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
        scale[stem] = 1
    return tensors


# Every dialect of the table, written as its programs write it. Rank 4 and alpha 8 where it is told.
DOWN = {"a": "lora_down", "b": "lora_up"}
DIALECTS = {
    "D": (lambda m: _split(m, "transformer."), 1),
    "D with alpha": (lambda m: _split(m, "transformer.", alpha=8), 2),
    "T": (lambda m: _split(m, "transformer.", alpha=8, **DOWN), 2),
    "T old": (lambda m: _split(m, "transformer.", a="lora.down", b="lora.up"), 1),
    "Cs": (lambda m: _split(m, "diffusion_model."), 1),
    "Cs with alpha": (lambda m: _split(m, "diffusion_model.", alpha=8), 2),
    "Cd split": (lambda m: _split(m, "diffusion_model.", alpha=8, **DOWN), 2),
    "Cn": (lambda m: _native(m, "diffusion_model."), 1),
    "Cn with alpha": (lambda m: _native(m, "diffusion_model.", alpha=8), 2),
    "Cd": (lambda m: _native(m, "diffusion_model.", alpha=8, **DOWN), 2),
    "K": (lambda m: _native(m, "lora_unet_", True, alpha=8, **DOWN), 2),
    "Ks": (lambda m: _split(m, "lora_unet_", True, alpha=8, **DOWN), 2),
    "O": (lambda m: _split(m, "lora_transformer_", True, alpha=8, **DOWN), 2),
    "Y": (lambda m: _split(m, "lycoris_", True, alpha=8, **DOWN), 2),
    "S": (lambda m: _split(m, "", a="lora_A.default", b="lora_B.default"), 1),
    "P": (lambda m: _split(m, ""), 1),
}


@pytest.mark.parametrize("case", DIALECTS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_every_dialect_means_the_same_change(tmp_path, case, everywhere):
    write, scale = DIALECTS[case]
    modules = _modules(LAYERS.split if everywhere else BLOCK, scale=scale)
    path = _save(tmp_path / "x.safetensors", write(modules))
    lora = read_lora(path, LAYERS)
    assert lora.dialect == case.split()[0]
    assert lora.dtype == "F32"
    _same_change(lora.modules, modules, bound=0)


def _peft_folder(folder, modules, **settings):
    folder.mkdir()
    _save(folder / "adapter_model.safetensors", _split(modules, "base_model.model."))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {}} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_peft_folder_takes_its_scale_from_its_json(tmp_path):
    modules = _modules(scale=2.0)
    folder = _peft_folder(tmp_path / "student", modules)
    for path in (folder, folder / "adapter_model.safetensors"):
        lora = read_lora(path, LAYERS)
        assert lora.dialect == "Q"
        _same_change(lora.modules, modules, bound=0)
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
    model = get_peft_model(_transformer(), config, adapter_name="student")
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
    modules = _modules()
    tensors = _split(modules, "transformer.")
    patterns = {"layers.1.attention.to_q": 2, "feed_forward.w1": 12}
    path = _save(tmp_path / "x.safetensors", tensors, _header(alpha_pattern=patterns))
    lora = read_lora(path, LAYERS).modules
    assert lora["layers.1.attention.to_q"].scale == 0.5
    assert lora["layers.0.feed_forward.w1"].scale == 3
    assert lora["layers.0.attention.to_q"].scale == 2


@pytest.mark.parametrize("alpha, applied", [(8, 2.0), (4, 2.0), (2, None)])
def test_alpha_in_two_places_is_applied_once(tmp_path, alpha, applied):
    tensors = _split(_modules(), "diffusion_model.", alpha=8)
    path = _save(tmp_path / "x.safetensors", tensors, _header(lora_alpha=alpha))
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
    ],
)
def test_bad_settings_are_named(tmp_path, metadata, message):
    path = _save(tmp_path / "x.safetensors", _split(_modules(), "transformer."), metadata)
    with pytest.raises(UserError) as caught:
        read_lora(path, LAYERS)
    assert message in str(caught.value)


# Bad files.


def _bad(change):
    tensors = _split(_modules(), "transformer.")
    change(tensors)
    return tensors


Q = "transformer.layers.0.attention.to_q"
NAN = np.full((4, 48), np.nan, np.float32)
BAD = {
    "another model": (lambda t: t.update({"transformer.blocks.0.lora_A.weight": NAN}), "no linear"),
    "text encoder": (lambda t: t.update({"lora_te_layers_0.lora_down.weight": NAN}), "no linear"),
    "a norm": (lambda t: t.update({f"{Q[:-4]}norm_q.lora_A.weight": NAN}), "no linear layer"),
    "past the end": (
        lambda t: t.update({Q.replace("0", "9") + ".lora_A.weight": NAN}),
        "layers.9.attention.to_q.lora_A.weight' names no linear layer",
    ),
    "no factor": (lambda t: t.update({f"{Q}.weight": NAN}), "is not a factor"),
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
    "two dialects": (lambda t: t.update(_split(_modules([BLOCK[0]]), "diffusion_model.")), "mixes"),
    "nothing": (lambda t: t.clear(), "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(tmp_path, case):
    change, message = BAD[case]
    path = _save(tmp_path / "x.safetensors", _bad(change))
    with pytest.raises(UserError) as caught:
        read_lora(path, LAYERS)
    assert message in str(caught.value)
    assert all(str(path) in problem for problem in caught.value.problems)


def test_all_faults_are_listed(tmp_path):
    tensors = _split(_modules(), "transformer.")
    for path in BLOCK[:5]:
        del tensors[f"transformer.{path}.lora_B.weight"]
    with pytest.raises(UserError) as caught:
        read_lora(_save(tmp_path / "x.safetensors", tensors), LAYERS)
    assert len(caught.value.problems) == 5


def test_a_layer_adapted_fused_and_split_is_refused(tmp_path):
    modules = _modules()
    tensors = _native(modules, "diffusion_model.")
    tensors |= _split({p: modules[p] for p in BLOCK if p.endswith("to_k")}, "diffusion_model.")
    with pytest.raises(UserError, match="another name in the file adapts too"):
        read_lora(_save(tmp_path / "x.safetensors", tensors), LAYERS)


def test_names_with_underscores_are_unambiguous():
    """Also for the published sizes: no two layers of a dialect share a name."""
    layers = layers_of(ZIMAGE["transformer"], ZImageConfig())
    assert len(layers.split) == 276 and len(layers.native) == 276 - 2 * 34
    for style in STYLES:
        count = len(layers.native if style.native else layers.split)
        assert len(stems(layers, [style])) == count
    assert stems(layers, list(STYLES))


# Conversions.


@pytest.mark.parametrize("dialect", WRITTEN)
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
def test_written_files_mean_the_same_change(tmp_path, dialect, scale):
    modules = _modules(LAYERS.split, scale=scale)
    path = tmp_path / ("folder" if dialect == "Q" else "x.safetensors")
    write_lora(path, modules, LAYERS, dialect)
    lora = read_lora(path, LAYERS)
    assert lora.dialect == dialect
    _same_change(lora.modules, modules, bound=0 if scale != 0.3 else 1e-6)


@pytest.mark.parametrize("dialect", WRITTEN)
@pytest.mark.parametrize("case", DIALECTS)
def test_any_dialect_becomes_any_other(tmp_path, case, dialect):
    write, scale = DIALECTS[case]
    modules = _modules(scale=scale)
    source = read_lora(_save(tmp_path / "a.safetensors", write(modules)), LAYERS)
    write_lora(tmp_path / "b", source.modules, LAYERS, dialect)
    _same_change(read_lora(tmp_path / "b", LAYERS).modules, modules, bound=0)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_file_of_our_own_comes_back_bit_for_bit(tmp_path, dtype):
    numpy = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}[dtype]
    write_lora(tmp_path / "a.safetensors", _modules(), LAYERS, dtype=dtype)
    lora = read_lora(tmp_path / "a.safetensors", LAYERS)
    assert lora.dtype == dtype
    write_lora(
        tmp_path / "b.safetensors", lora.modules, LAYERS, dtype=dtype, metadata=lora.metadata
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    stored = load_file(tmp_path / "a.safetensors")
    name = f"transformer.{BLOCK[0]}.lora_B.weight"
    assert np.array_equal(stored[name], (_modules()[BLOCK[0]].b * 2).astype(numpy))


def test_an_adapter_of_the_fused_layer_stays_one(tmp_path):
    """A full B over q, k and v: split, each part has the whole A; fused again, the rank is kept."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 48), "f4"), rng.standard_normal((144, 5), "f4")
    name = "diffusion_model.layers.0.attention.qkv.lora_"
    tensors = {f"{name}A.weight": a, f"{name}B.weight": b}
    modules = read_lora(_save(tmp_path / "a.safetensors", tensors), LAYERS).modules
    for i, letter in enumerate("qkv"):
        module = modules[f"layers.0.attention.to_{letter}"]
        assert np.array_equal(module.a, a) and np.array_equal(module.b, b[48 * i : 48 * (i + 1)])
    write_lora(tmp_path / "b.safetensors", modules, LAYERS, "Cn")
    back = load_file(tmp_path / "b.safetensors")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[n], tensors[n]) for n in tensors)


def test_a_block_diagonal_is_cut_back_to_the_small_rank(tmp_path):
    modules = _modules(rank=4, scale=1.0)
    write_lora(tmp_path / "a.safetensors", modules, LAYERS, "K")
    tensors = load_file(tmp_path / "a.safetensors")
    qkv = "lora_unet_layers_0_attention_qkv"
    assert tensors[f"{qkv}.lora_down.weight"].shape == (12, 48)
    assert tensors[f"{qkv}.alpha"] == 12  # three times: the scale stays
    back = read_lora(tmp_path / "a.safetensors", LAYERS).modules
    for path, module in modules.items():
        assert np.array_equal(back[path].a, module.a) and np.array_equal(back[path].b, module.b)


def test_fusing_some_of_q_k_v_changes_only_these():
    modules = _modules(["layers.0.attention.to_q"], scale=0.5)
    modules |= _modules(["layers.0.attention.to_v"], rank=3, seed=1)
    ((path, module),) = fuse(modules, LAYERS).items()
    assert path == "layers.0.attention.qkv" and module.rank == 7
    delta = module.delta()
    deltas = {p: m.delta() for p, m in modules.items()}
    assert relative_error(delta[:48], deltas["layers.0.attention.to_q"]) < 1e-6
    assert not delta[48:96].any()
    assert relative_error(delta[96:], deltas["layers.0.attention.to_v"]) < 1e-6


def test_filling_up_to_one_rank_is_exact():
    modules = _modules(BLOCK[:1], 2) | _modules(BLOCK[1:2], 7)
    filled = one_rank({n: baked(m) for n, m in modules.items()})
    assert {m.rank for m in filled.values()} == {7}
    _same_change(filled, modules, bound=0)


def test_what_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="no adapter to write"):
        write_lora(path, {}, LAYERS)
    with pytest.raises(UserError, match="'T' cannot be written"):
        write_lora(path, _modules(), LAYERS, "T")
    with pytest.raises(UserError, match="'nowhere' is of no linear layer"):
        write_lora(path, {"nowhere": _modules()[BLOCK[0]]}, LAYERS)
    with pytest.raises(UserError, match="does not fit F16"):
        write_lora(path, _modules(scale=1e6), LAYERS, dtype="F16")
    assert not any(tmp_path.iterdir())


# The real diffusers.


def _transformer():
    torch.manual_seed(0)
    return ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=48, n_layers=2,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 8, 8],
        axes_lens=[64, 16, 16],
    )  # fmt: skip


def _pipeline(transformer):
    scheduler = FlowMatchEulerDiscreteScheduler()
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return ZImagePipeline(scheduler=scheduler, transformer=transformer, **parts)


@pytest.mark.parametrize("dialect", ["D", "Cs", "K"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_diffusers_applies_the_change_we_wrote(tmp_path, dialect, mixed):
    modules = _modules(scale=1.5)
    if mixed:  # ranks that differ from layer to layer
        modules |= _modules(BLOCK[::3], rank=7, scale=0.25)
    write_lora(tmp_path / "x.safetensors", modules, LAYERS, dialect)
    transformer = _transformer()
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
            expected = _deltas({name: module})[name]
            assert relative_error(change, expected) < 1e-5, name


@pytest.mark.filterwarnings("ignore")
def test_what_diffusers_saves_is_read_at_its_strength(tmp_path):
    """diffusers writes unbaked factors and alpha in the header."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    transformer = _transformer()
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


def test_the_default_file_says_what_loaders_look_for(tmp_path):
    write_lora(tmp_path / "style.safetensors", _modules(), LAYERS, metadata={"ss_tag": "x"})
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
    modules = _modules()
    write_lora(tmp_path / "a.safetensors", modules, LAYERS, dtype="BF16")
    tool = lambda *args: _tool(monkeypatch, capsys, *args, "--model", tmp_path / "model")
    code, out, _ = tool("lora", tmp_path / "a.safetensors", tmp_path / "k.safetensors", "--to", "K")
    assert code == 0 and "28 layers, dialect D -> K" in out
    code, out, _ = tool("inspect", tmp_path / "k.safetensors")
    assert code == 0 and "LoRA, dialect K, BF16, 28 layers adapted" in out
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
