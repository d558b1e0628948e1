"""LoKr files of other trainers: read, and merged into a model."""

import numpy as np
import pytest
from conftest import relative_error
from lora_helpers import BLOCK, LAYERS, random_modules, save, split_names
from weights_helpers import SMALL

from dopsd_jax import convert
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.conversion.inspection import inspect, layers_for
from dopsd_jax.families.flux2_klein import family as klein
from dopsd_jax.families.lora import lora_layers
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights.lora_files import read_adapter, read_lora
from dopsd_jax.weights.lora_mix import read_changes
from dopsd_jax.weights.safetensors_io import TensorFiles

FACTOR = 4


def lokr(target, rng, first=0, second=0):
    """The tensors of a layer by their ends; `first`, `second`: ranks of the factors, 0: whole."""
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    shapes = (FACTOR, FACTOR), (sum(target.rows) // FACTOR, target.width // FACTOR)
    tensors = {}
    for name, (out, width), rank in zip(("w1", "w2"), shapes, (first, second), strict=True):
        if rank:
            tensors |= {f"lokr_{name}_a": draw(out, rank), f"lokr_{name}_b": draw(rank, width)}
        else:
            tensors[f"lokr_{name}"] = draw(out, width)
    return tensors


def change(tensors, scale):
    """What LyCORIS makes of them, in float64."""
    get = lambda name: tensors[name].astype(np.float64)
    product = lambda n: get(n) if n in tensors else get(f"{n}_a") @ get(f"{n}_b")
    return scale * np.kron(product("lokr_w1"), product("lokr_w2"))


def written(path, stems, layers, alpha=None, **ranks):
    """A file with these names; the tensors by name of a layer."""
    rng, made, tensors = np.random.default_rng(0), {}, {}
    for name, (stem, target) in stems.items():
        made[name] = lokr(target, rng, **ranks)
        tensors |= {f"{stem}.{end}": tensor for end, tensor in made[name].items()}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.array(alpha, np.float32)
    return save(path, tensors), made


@pytest.mark.parametrize(
    "prefix, ranks, alpha, scale",
    [
        ("diffusion_model.", {}, None, 1.0),
        ("lycoris_", {}, 10000, 1.0),  # of whole factors alpha says nothing
        ("lycoris_", {"second": 3}, 6, 2.0),
        ("lora_unet_", {"first": 2}, 1, 0.5),
        ("transformer.", {"first": 2, "second": 4}, 1, 0.25),  # the second factor's rank counts
        ("", {"second": 3}, None, 1.0),
    ],
)
def test_the_change_is_that_of_lycoris(tmp_path, prefix, ranks, alpha, scale):
    name = lambda path: path.replace(".", "_") if prefix.endswith("_") else path
    stems = {p: (prefix + name(p), LAYERS.split[p]) for p in BLOCK}
    path, made = written(tmp_path / "x.safetensors", stems, LAYERS, alpha, **ranks)
    file = read_adapter(path, LAYERS)
    assert file.modules.keys() == set(BLOCK)
    for layer, module in file.modules.items():
        expected = change(made[layer], scale)
        assert module.shape == expected.shape
        assert relative_error(module.delta(), expected) < 1e-6
        assert relative_error(module.delta(slice(5, 9)), expected[5:9]) < 1e-6


@pytest.mark.parametrize(
    "ranks, alpha, scale",
    [({}, 6, 6 / 12), ({"second": 3}, 6, 2.0), ({}, None, 1.0)],  # a second factor of 12 x 12
)
def test_the_change_is_that_of_musubi_tuner(tmp_path, ranks, alpha, scale):
    """Its files have a number more, and an alpha that counts also where the factor is whole."""
    path = next(p for p in BLOCK if p.endswith("attention.to_q"))
    stems = {path: ("lora_unet_" + path.replace(".", "_"), LAYERS.split[path])}
    file, made = written(tmp_path / "x.safetensors", stems, LAYERS, alpha, **ranks)
    files = TensorFiles.open(file)
    tensors = {name: files.read(name) for name in files.infos} | {"lokr_factor": np.array(4)}
    (module,) = read_adapter(save(file, tensors), LAYERS).modules.values()
    assert relative_error(module.delta(), change(made[path], scale)) < 1e-6


@pytest.mark.parametrize("of", ["zimage", "klein"])
def test_rows_of_a_fused_layer_go_to_its_parts(tmp_path, of):
    layers = LAYERS if of == "zimage" else lora_layers(klein, klein.random_size())
    end = "attention.qkv" if of == "zimage" else "img_attn.qkv"
    stem = next(name for name in layers.native if name.endswith(end))
    target = layers.native[stem]
    stems = {stem: (f"diffusion_model.{stem}", target)}
    path, made = written(tmp_path / "x.safetensors", stems, layers)
    modules = read_adapter(path, layers).modules
    assert tuple(modules) == target.paths
    whole = np.concatenate([module.delta() for module in modules.values()])
    assert relative_error(whole, change(made[stem], 1.0)) < 1e-6


def test_a_layer_whose_halves_are_exchanged_is_exchanged_back(tmp_path):
    layers = lora_layers(klein, klein.random_size())
    stem, target = next((n, t) for n, t in layers.native.items() if t.swapped)
    stems = {stem: (f"diffusion_model.{stem}", target)}
    path, made = written(tmp_path / "x.safetensors", stems, layers)
    (module,) = read_adapter(path, layers).modules.values()
    low, high = np.split(change(made[stem], 1.0), 2)
    assert relative_error(module.delta(), np.concatenate([high, low])) < 1e-6


def test_it_is_merged_beside_a_lora_and_refused_where_only_a_lora_will_do(tmp_path, capsys):
    model = write_random_model(tmp_path / "model", size=SMALL)
    layers, name = layers_for(model), "layers.0.attention.to_q"
    target = layers.split[name]
    stems = {name: (f"lycoris_{name.replace('.', '_')}", target)}
    path, made = written(tmp_path / "x.safetensors", stems, layers)
    with pytest.raises(UserError, match="is a LoKr, where only a LoRA will do") as caught:
        read_lora(path, layers)
    assert len(caught.value.problems) == 1
    lines = list(inspect(path, model))
    assert "LoKr, dialect Y, F32, 1 layers" in lines[0] and "first factor [4, 4] (1)" in lines[1]

    rng = np.random.default_rng(1)
    a = rng.standard_normal((2, target.width), np.float32)
    b = rng.standard_normal((target.rows[0], 2), np.float32)
    tensors = {f"transformer.{name}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
    plain = save(tmp_path / "y.safetensors", tensors)
    both = read_changes([LoraOption(path, 0.5), LoraOption(plain, 2.0)], layers)[name]
    expected = 0.5 * change(made[name], 1.0) + 2.0 * (b.astype(np.float64) @ a)
    assert relative_error(both.delta(), expected) < 1e-6

    out = tmp_path / "out"
    args = ["merge", str(model), f"{path}:0.5", f"{plain}:2", str(out), "--dtype", "float32"]
    convert.run(convert.parser("convert").parse_args(args))
    before, after = (
        TensorFiles.open(folder / "transformer").read(f"{name}.weight").astype(np.float64)
        for folder in (model, out)
    )
    assert relative_error(after - before, expected) < 1e-5


def _stem(**tensors):
    return {f"lycoris_layers_0_attention_to_q.lokr_{n}": t for n, t in tensors.items()}


ONES = lambda *shape: np.ones(shape, np.float32)


@pytest.mark.parametrize(
    "tensors, message",
    [
        (_stem(w1=ONES(4, 4)), "needs lokr_w2, or both"),
        (_stem(w1=ONES(4, 4), w2_a=ONES(12, 2)), "needs lokr_w2, or both"),
        (_stem(w1=ONES(4, 4), w1_a=ONES(4, 1), w1_b=ONES(1, 4), w2=ONES(12, 12)), "lokr_w1"),
        (_stem(w1=ONES(4, 4), w2=ONES(12, 13)), r"a change of \[48, 52\]; .* needs \[48, 48\]"),
        # A product of 4 TB.
        (
            _stem(w1=ONES(4, 4), w2_a=ONES(10**6, 1), w2_b=ONES(1, 10**6)),
            r"a change of \[4000000, 4000000\]; .* needs \[48, 48\]",
        ),
        (_stem(w1=ONES(4), w2=ONES(12, 12)), r"lokr_w1 \[4\], which make no matrix"),
        (_stem(w1=ONES(4, 4), w2_a=ONES(12, 2), w2_b=ONES(3, 12)), "which make no matrix"),
        (_stem(w1=ONES(4, 4), w2=np.inf * ONES(12, 12)), "not finite"),
        (
            _stem(w1=ONES(4, 4), w2=ONES(12, 12))
            | split_names(
                random_modules(["layers.0.attention.to_q"]), "lycoris_", underscores=True
            ),
            "of a LoRA and of a LoKr",
        ),
        (_stem(w1=ONES(4, 4), w2=ONES(12, 12), t2=ONES(1, 1)), "convolutional LoKr"),
    ],
)
def test_what_makes_no_change_is_named(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(save(tmp_path / "x.safetensors", tensors), LAYERS)
    assert len(caught.value.problems) == 1
