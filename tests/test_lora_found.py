"""LoRA files as people have them: scales in headers, other trainers' names, types, leftovers."""

import json
import math
import re
import time

import ml_dtypes
import numpy as np
import pytest
from lora_helpers import (
    BLOCK,
    CONFIG,
    DOWN,
    LAYERS,
    native_names,
    random_modules,
    same_change,
    save,
    split_names,
)

from dopsd_jax import convert
from dopsd_jax.common.errors import UserError, few
from dopsd_jax.conversion.inspection import inspect
from dopsd_jax.weights.lora_files import LoraModule, read_lora
from dopsd_jax.weights.lora_settings import HEADER, Pattern
from dopsd_jax.weights.lora_write import write_lora
from dopsd_jax.weights.safetensors_io import TensorFiles, read_header
from dopsd_jax.weights.safetensors_write import write_safetensors
from dopsd_jax.weights.tensors import ArrayTensors

ONE = "layers.0.attention.to_q"


def _names(modules, prefix, **kinds):
    return split_names(modules, prefix, **kinds)


@pytest.mark.parametrize(
    "metadata, scale",
    [
        ({"format": "pt", "alpha": "8", "rank": "4"}, 2.0),
        ({"lora_alpha": "2.0"}, 0.5),
        ({"network_alpha": "2", "network_dim": "4"}, 0.5),
        ({"network_alpha": "None", "network_dim": "4"}, 1.0),
        ({"rank": "4"}, 1.0),
    ],
)
def test_a_scale_that_stands_only_in_the_header_is_applied(tmp_path, metadata, scale):
    modules = random_modules(scale=scale)
    path = save(tmp_path / "x.safetensors", _names(modules, "diffusion_model."), metadata)
    same_change(read_lora(path, LAYERS).modules, modules, bound=0)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"alpha": "8", "lora_alpha": "4"}, r"disagree \(alpha 8, lora_alpha 4\)"),
        ({"alpha": "nan"}, "alpha is 'nan', not a number"),
        ({"alpha": "high"}, "alpha is 'high', not a number"),
        ({"alpha": "-1"}, "alpha is '-1'"),
        ({"alpha": "8", "rank": "16"}, "has rank 4, but .*header string alpha says 16"),
    ],
)
def test_a_scale_in_the_header_that_cannot_be_is_named(tmp_path, metadata, message):
    path = save(tmp_path / "x.safetensors", _names(random_modules(), "diffusion_model."), metadata)
    with pytest.raises(UserError, match=message):
        read_lora(path, LAYERS)


@pytest.mark.parametrize("alpha, rank", [("1", "4"), ("8.0", "32"), ("0", "4"), ("Dynamic",) * 2])
def test_what_kohya_says_of_the_training_is_no_scale(tmp_path, alpha, rank):
    """musubi-tuner's converter multiplies alpha in and keeps these strings; a resized file has the
    alpha tensors and the word Dynamic."""
    modules, metadata = (
        random_modules(scale=1.0),
        {"ss_network_alpha": alpha, "ss_network_dim": rank},
    )
    path = save(tmp_path / "x.safetensors", _names(modules, "diffusion_model."), metadata)
    same_change(read_lora(path, LAYERS).modules, modules, bound=0)
    modules = random_modules(scale=0.5)
    tensors = _names(modules, "lora_unet_", underscores=True, alpha=2, **DOWN)
    path = save(tmp_path / "y.safetensors", tensors, metadata)
    same_change(read_lora(path, LAYERS).modules, modules, bound=0)


def test_alpha_tensors_go_before_single_header_strings(tmp_path):
    """Converted to fused layers, only the tensors are right."""
    modules = random_modules(scale=2.0)
    metadata = {"alpha": "8", "rank": "4"}
    tensors = native_names(modules, "lora_unet_", True, alpha=8, **DOWN)
    same_change(
        read_lora(save(tmp_path / "x.safetensors", tensors, metadata), LAYERS).modules,
        modules,
        bound=0,
    )


@pytest.mark.parametrize("dialect", ["D", "Cs", "Cn", "K"])
def test_what_we_write_keeps_no_stale_scale(tmp_path, dialect):
    modules = random_modules(scale=0.5)
    metadata = {"ss_network_alpha": "2", "ss_network_dim": "4", "ss_output_name": "mug"}
    tensors = _names(modules, "lora_unet_", underscores=True, alpha=2, **DOWN)
    source = read_lora(save(tmp_path / "a.safetensors", tensors, metadata), LAYERS)
    out = tmp_path / "b.safetensors"
    write_lora(out, source.modules, LAYERS, dialect, metadata=source.metadata)
    written = read_header(out).metadata
    assert written["ss_output_name"] == "mug"
    assert written.get("ss_network_alpha") == {"D": "4", "Cs": "4", "K": "2"}.get(dialect)
    same_change(read_lora(out, LAYERS).modules, modules, bound=0)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float64, ml_dtypes.bfloat16])
def test_alpha_may_be_any_number(tmp_path, dtype):
    modules = random_modules(scale=0.5)
    tensors = _names(modules, "lora_unet_", underscores=True, alpha=2, **DOWN)
    tensors |= {n: t.astype(dtype) for n, t in tensors.items() if n.endswith(".alpha")}
    path = save(tmp_path / "x.safetensors", tensors)
    same_change(read_lora(path, LAYERS).modules, modules, bound=0)


@pytest.mark.parametrize(
    "tensors",
    [
        lambda m: _names(m, "transformer.", a="lora_A.default_0", b="lora_B.default_0"),
        lambda m: _names(m, "pipe.dit.", a="lora_A.default", b="lora_B.default"),
        lambda m: _names(m, "transformer.base_model.model.", a="lora.down", b="lora.up"),
        lambda m: _names(m, "base_model.model.", a="lora_A.student", b="lora_B.student"),
        lambda m: _names(m, "transformer._orig_mod."),
        lambda m: _names(m, "_orig_mod."),
        lambda m: native_names(m, "model.diffusion_model."),
        lambda m: native_names(m, "transformer."),
        lambda m: native_names(m, "base_model.model."),
        lambda m: native_names(m, ""),
    ],
)
def test_other_trainers_names_mean_the_same_change(tmp_path, tensors):
    modules = random_modules(scale=1.0)
    path = save(tmp_path / "x.safetensors", tensors(modules))
    same_change(read_lora(path, LAYERS).modules, modules, bound=0)


def test_two_adapters_in_one_file_are_not_mixed(tmp_path):
    tensors = _names(random_modules(BLOCK[:3]), "", a="lora_A.student", b="lora_B.student")
    tensors |= _names(random_modules(BLOCK[3:]), "", a="lora_A.teacher", b="lora_B.teacher")
    with pytest.raises(UserError, match="several adapters \\('student', 'teacher'\\)"):
        read_lora(save(tmp_path / "x.safetensors", tensors), LAYERS)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_eight_bit_factors_are_widened_exactly(tmp_path, dtype):
    rounded = {
        p: LoraModule(*(f.astype(dtype).astype(np.float32) for f in (m.a, m.b)), 1.0)
        for p, m in random_modules().items()
    }
    tensors = {n: t.astype(dtype) for n, t in _names(rounded, "transformer.").items()}
    path = tmp_path / "x.safetensors"
    arrays = ArrayTensors(tensors)
    write_safetensors(path, arrays.infos, arrays.read)
    lora = read_lora(path, LAYERS)
    assert lora.dtype == "BF16"
    same_change(lora.modules, rounded, bound=0)


def test_a_text_encoders_layers_are_named_and_can_be_left_out(tmp_path):
    modules = random_modules(scale=1.0)
    tensors = _names(modules, "transformer.")
    for i in range(30):
        tensors[f"lora_te_layers_{i}_q_proj.lora_down.weight"] = np.zeros((4, 8), np.float32)
    path = save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UserError, match=r"is of a text encoder.*--transformer-only") as caught:
        read_lora(path, LAYERS)
    assert len(few(caught.value.problems)) == 4
    same_change(read_lora(path, LAYERS, transformer_only=True).modules, modules, bound=0)


def _peft_header(**settings):
    table = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}} | settings
    return {HEADER: json.dumps({f"transformer.{k}": v for k, v in table.items()})}


def test_a_pattern_from_a_file_cannot_hang(tmp_path):
    tensors = _names(random_modules(), "transformer.")
    hostile = {"([a-z0-9_.]+)+X": 8}
    path = save(tmp_path / "x.safetensors", tensors, _peft_header(alpha_pattern=hostile))
    began = time.monotonic()
    with pytest.raises(UserError, match="is not a pattern that is read here"):
        read_lora(path, LAYERS)
    slow = {".*" * 60 + "X": 8}
    path = save(tmp_path / "y.safetensors", tensors, _peft_header(alpha_pattern=slow))
    assert read_lora(path, LAYERS).modules[ONE].scale == 2
    many = {f"{i}.*": 8 for i in range(1000)}
    path = save(tmp_path / "z.safetensors", tensors, _peft_header(alpha_pattern=many))
    with pytest.raises(UserError, match="1000 patterns, too many"):
        read_lora(path, LAYERS)
    assert time.monotonic() - began < 5
    brackets = {"(a)" * 80_000: 8}
    path = save(tmp_path / "w.safetensors", tensors, _peft_header(alpha_pattern=brackets))
    began = time.process_time()
    with pytest.raises(UserError, match="is too long"):
        read_lora(path, LAYERS)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "pattern, matches",
    [
        (r"layers\.\d+\.attention\.to_q", True),
        (r"^layers\.0\.attention\.(to_q|to_k)$", True),
        (".*to_q", True),
        ("attention.to_q", True),
        (r"[0-9]+\.attention\.\w+", True),
        ("to_k|to_q", True),
        ("o_q", False),
        (r"layers\.1\..*", False),
        ("layers.0", False),
    ],
)
def test_patterns_match_as_pefts_do(pattern, matches):
    assert bool(re.match(rf"(.*\.)?({pattern})$", ONE)) == matches  # PEFT's own rule
    assert Pattern(pattern).matches(ONE) == matches


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_a_scale_that_is_not_finite_is_named(tmp_path, value):
    tensors = _names(random_modules(), "transformer.")
    path = save(tmp_path / "x.safetensors", tensors, _peft_header(lora_alpha=value))
    with pytest.raises(UserError, match=r"lora_alpha .* is not a positive number"):
        read_lora(path, LAYERS)


def test_a_file_of_our_own_says_what_it_was_made_for(tmp_path):
    told = {"ss_note": "\x1b[31mred\x07"}
    write_lora(tmp_path / "x.safetensors", random_modules(), LAYERS, metadata=told)
    lines = list(inspect(tmp_path / "x.safetensors"))
    assert all(line.isprintable() for line in lines)
    assert f"{len(BLOCK)} layers adapted" in lines[0]
    source, out = tmp_path / "x.safetensors", tmp_path / "k.safetensors"
    args = convert.parser("convert").parse_args(["lora", str(source), str(out), "--to", "K"])
    args.run(args)
    assert next(iter(inspect(out))).startswith(f"{out}: LoRA, dialect K")
    assert json.loads(TensorFiles.open(out).metadata["dopsd_jax.base"])["dim"] == CONFIG.dim
