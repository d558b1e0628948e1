"""LoRA files for FLUX.2-klein: names, sizes and numbers as other programs have them."""

import re

import numpy as np
import pytest
from diffusers import Flux2KleinPipeline
from safetensors.numpy import load_file, save_file
from scipy.linalg import block_diag

from dopsd_jax import families
from dopsd_jax.adapters import attach
from dopsd_jax.common.errors import UserError
from dopsd_jax.conversion.inspection import layers_for
from dopsd_jax.families.flux2_klein import family
from dopsd_jax.families.lora import lora_layers
from dopsd_jax.models.flux2_config import Flux2Config
from dopsd_jax.weights.lora_dialects import WRITTEN
from dopsd_jax.weights.lora_files import LoraModule, read_lora
from dopsd_jax.weights.lora_write import write_lora
from dopsd_jax.weights.safetensors_io import read_header

SIZES = {
    "4b": Flux2Config(),
    "9b": Flux2Config(heads=32, double_layers=8, single_layers=24, text_dim=12288),
    "small": family.random_size(),
}
NORM_OUT = "norm_out.linear"

# ComfyUI's documented map of FLUX.2's block layers: diffusers' names, and the authors'.
QKV = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
DOUBLE = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
}  # fmt: skip
SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}


def known_names(size):
    """(diffusers' names, the authors' names) of all block layers, as ComfyUI knows them."""
    double = [f"transformer_blocks.{n}.{end}" for n in range(size.double_layers)
              for end in (*QKV[0], *QKV[1], *DOUBLE)]  # fmt: skip
    single = [f"single_transformer_blocks.{n}.{end}" for n in range(size.single_layers)
              for end in SINGLE]  # fmt: skip
    native = [f"double_blocks.{n}.{end}" for n in range(size.double_layers)
              for end in ("img_attn.qkv", "txt_attn.qkv", *DOUBLE.values())]  # fmt: skip
    native += [f"single_blocks.{n}.{end}" for n in range(size.single_layers)
               for end in SINGLE.values()]  # fmt: skip
    return {*double, *single}, {*native}


def adapters(name, rank=1, scale=1.0, of=family, size=None):
    """Adapters of all block layers of a size, and its layers."""
    size, rng = size or SIZES[name], np.random.default_rng(0)
    slots = attach.slots(of.NETWORKS["transformer"].names(size))
    chosen = attach.select(slots, "blocks", of.LORA_PRESETS)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    modules = {
        path: LoraModule(draw(rank, slot.din), draw(slot.dout, rank), scale)
        for path, slot in chosen.items()
    }
    return modules, lora_layers(of, size)


@pytest.mark.parametrize(("size", "count"), [("4b", 100), ("9b", 144)])
def test_every_name_is_in_comfyuis_map_and_the_header_names_the_size(tmp_path, size, count):
    modules, layers = adapters(size)
    assert len(modules) == count
    diffusers, native = known_names(SIZES[size])
    underscored = {name.replace(".", "_") for name in native}
    for dialect, prefix, names, ends in (
        ("D", "transformer.", diffusers, ("lora_A.weight", "lora_B.weight")),
        ("Cn", "diffusion_model.", native, ("lora_A.weight", "lora_B.weight")),
        ("K", "lora_unet_", underscored, ("alpha", "lora_down.weight", "lora_up.weight")),
    ):
        file = tmp_path / f"{dialect}.safetensors"
        write_lora(file, modules, layers, dialect, "BF16")
        header = read_header(file)
        assert set(header.tensors) == {f"{prefix}{name}.{end}" for name in names for end in ends}
        assert header.metadata["modelspec.architecture"] == f"Flux.2-klein-{size}/lora"
    assert layers_for(None, file) == layers  # `convert lora` needs no model for a file of ours


def by_hand(modules, prefix, native, underscores=False, ends=("lora_A.weight", "lora_B.weight")):
    """A file as other programs write it; `native`: the authors' paths, q, k and v fused."""
    tensors = {}
    for path, module in modules.items():
        block, end = re.match(r"(.*?_blocks\.\d+\.|)(.*)", path).groups()
        down, up, alpha = module.a, module.b, module.scale * module.rank
        if native:
            three = next((names for names in QKV if end in names), None)
            if three and end != three[0]:
                continue
            if three:
                parts = [modules[block + name] for name in three]
                down = np.concatenate([part.a for part in parts])
                up, alpha = block_diag(*(part.b for part in parts)), 3 * alpha
            stream = {QKV[0]: "img_attn.qkv", QKV[1]: "txt_attn.qkv"}.get(three)
            end = stream or (DOUBLE | SINGLE)[end]
            block = block.replace("single_transformer_", "single_")
            block = block.replace("transformer_blocks", "double_blocks")
        name = block + end
        stem = prefix + (name.replace(".", "_") if underscores else name)
        tensors |= {f"{stem}.{ends[0]}": down, f"{stem}.{ends[1]}": up}
        if "down" in ends[0]:
            tensors[f"{stem}.alpha"] = np.array(alpha, np.float32)
    return tensors


DOWN = ("lora_down.weight", "lora_up.weight")
WITH_ALPHA = ("T", "Cd", "K", "Ks", "O", "Y")
DIALECTS = {
    "D": lambda m: by_hand(m, "transformer.", False),
    "T": lambda m: by_hand(m, "transformer.", False, ends=DOWN),
    "Cs": lambda m: by_hand(m, "diffusion_model.", False),
    "Cn": lambda m: by_hand(m, "diffusion_model.", True),
    "Cd": lambda m: by_hand(m, "diffusion_model.", True, ends=DOWN),
    "K": lambda m: by_hand(m, "lora_unet_", True, True, DOWN),
    "Ks": lambda m: by_hand(m, "lora_unet_", False, True, DOWN),
    "O": lambda m: by_hand(m, "lora_transformer_", False, True, DOWN),
    "Y": lambda m: by_hand(m, "lycoris_", False, True, DOWN),
    "S": lambda m: by_hand(m, "", False, ends=("lora_A.default.weight", "lora_B.default.weight")),
    "P": lambda m: by_hand(m, "", False),
}


@pytest.mark.parametrize("case", DIALECTS)
def test_every_dialect_is_read_and_becomes_any_that_is_written(tmp_path, case):
    modules, layers = adapters("small", rank=2, scale=2.0 if case in WITH_ALPHA else 1.0)
    save_file(DIALECTS[case](modules), tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", layers)
    assert lora.dialect == case and lora.modules.keys() == modules.keys()
    for dialect in WRITTEN:
        write_lora(tmp_path / dialect, lora.modules, layers, dialect)
        back = read_lora(tmp_path / dialect, layers)
        assert back.dialect == dialect and back.modules.keys() == modules.keys()
        for path, module in modules.items():
            np.testing.assert_array_equal(back.modules[path].delta(), module.delta())


@pytest.mark.parametrize("dialect", ["D", "Cn", "K"])
def test_diffusers_reads_the_same_change(tmp_path, dialect):
    modules, layers = adapters("small", rank=3, scale=0.5)
    write_lora(tmp_path / "x.safetensors", modules, layers, dialect)
    state = Flux2KleinPipeline.lora_state_dict(
        str(tmp_path), weight_name="x.safetensors", local_files_only=True
    )
    assert len(state) == 2 * len(modules)
    for path, module in modules.items():
        a, b = (state[f"transformer.{path}.lora_{part}.weight"].numpy() for part in "AB")
        np.testing.assert_allclose(b @ a, module.delta(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", ["Cn", "K"])
def test_the_last_modulations_rows_are_exchanged_under_the_authors_names(tmp_path, dialect):
    """The authors' file has (shift, scale), diffusers' (scale, shift)."""
    _, layers = adapters("small")
    d, draw = SIZES["small"].dim, np.random.default_rng(1).standard_normal
    modules = {NORM_OUT: LoraModule(draw((2, d), np.float32), draw((2 * d, 2), np.float32), 1.0)}
    file = tmp_path / "x.safetensors"
    write_lora(file, modules, layers, dialect)
    (written,) = (
        t for name, t in load_file(file).items() if name.endswith(("B.weight", "up.weight"))
    )
    b = modules[NORM_OUT].b
    np.testing.assert_array_equal(written, np.concatenate([b[d:], b[:d]]))
    back = read_lora(file, layers).modules
    assert back.keys() == modules.keys()
    np.testing.assert_array_equal(back[NORM_OUT].delta(), modules[NORM_OUT].delta())


def test_a_lora_of_another_family_or_size_is_one_line(tmp_path):
    zimage = families.load("zimage")
    foreign = {
        "zimage": adapters("", of=zimage, size=zimage.random_size()),
        **{size: adapters(size) for size in SIZES},
    }
    for made, dialect, model, message in (
        ("zimage", "D", "4b", r"another model \(Z-Image/lora, its header says\): none of its"),
        ("small", "D", "zimage", r"another model \(Flux\.2-klein/lora, .* none of its"),
        (
            "9b",
            "D",
            "4b",
            r"\(Flux\.2-klein-9b/lora, .* with \[4096, 16384\], here \[3072, 12288\]",
        ),
        ("4b", "K", "9b", r"\(Flux\.2-klein-4b/lora, .* all its layers have other sizes"),
    ):
        file = tmp_path / f"{made}_{dialect}.safetensors"
        write_lora(file, *foreign[made], dialect, "BF16")
        with pytest.raises(UserError, match=message) as caught:
            read_lora(file, foreign[model][1])
        assert len(caught.value.problems) == 1
    save_file({n: t for n, t in load_file(file).items()}, file)  # without a header
    with pytest.raises(UserError, match="is for another model: all its layers"):
        read_lora(file, foreign["9b"][1])
