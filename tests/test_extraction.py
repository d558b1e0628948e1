"""A LoRA from the difference of two models."""

import json
import shutil

import numpy as np
import pytest
from conftest import relative_error
from safetensors.numpy import load_file, save_file
from weights_helpers import SMALL

from dopsd_jax import convert
from dopsd_jax.common.errors import UserError
from dopsd_jax.conversion.export import export_diffusers, export_single
from dopsd_jax.conversion.extraction import extract
from dopsd_jax.conversion.inspection import layers_for
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights.lora_files import LoraModule, read_lora
from dopsd_jax.weights.low_rank import EXACT, low_rank

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("shape", [(EXACT + 60, EXACT + 40), (90, 300)])
@pytest.mark.parametrize("decay", [0.97, 0.6])
def test_no_other_matrix_of_that_rank_is_closer(shape, decay):
    """Eckart and Young: the smallest error is that of the singular values left out."""
    rng = np.random.default_rng(0)
    side = min(shape)
    basis = lambda n: np.linalg.qr(rng.standard_normal((n, side))).Q
    values = decay ** np.arange(side)
    matrix = ((basis(shape[0]) * values) @ basis(shape[1]).T).astype(np.float32)
    found = low_rank(matrix, 12)
    best = np.linalg.norm(values[12:]) / np.linalg.norm(values)
    change = matrix - found.b.astype(np.float64) @ found.a
    assert np.linalg.norm(change) / np.linalg.norm(matrix) <= 1.001 * best
    assert found.error == pytest.approx(best, rel=1e-3)
    again = low_rank(matrix, 12)
    assert np.array_equal(again.a, found.a) and np.array_equal(again.b, found.b)


def test_a_share_of_the_energy_takes_the_rank_that_it_needs():
    matrix = np.diag([3.0, 2.0, 1.0, 1.0]).astype(np.float32)  # squares: 9, 4, 1, 1
    for energy, rank in ((0.5, 1), (0.6, 1), (0.61, 2), (13 / 15, 2), (0.9, 3), (1.0, 4)):
        assert len(low_rank(matrix, 4, energy).a) == rank
    assert len(low_rank(matrix, 2, 1.0).a) == 2
    assert low_rank(matrix, 2).error == pytest.approx((2 / 15) ** 0.5)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, a LoRA of two ranks, and the model with it merged."""
    home = tmp_path_factory.mktemp("extraction")
    base = write_random_model(home / "base", size=SMALL)
    layers, rng = layers_for(base), np.random.default_rng(0)
    draw = lambda *shape: 0.1 * rng.standard_normal(shape, dtype=np.float32)
    lora = {}
    for name, rank in (("layers.0.attention.to_q", 3), ("layers.1.feed_forward.w2", 2)):
        target = layers.split[name]
        lora[name] = LoraModule(draw(rank, target.width), draw(target.rows[0], rank), 1.0)
    export_diffusers(base, home / "float32", dtype="F32")
    export_diffusers(home / "float32", home / "tuned", lora=lora)
    return home / "float32", home / "tuned", lora


def test_the_lora_that_was_merged_comes_back(models, tmp_path):
    base, tuned, lora = models
    export_single(tuned, tmp_path / "single.safetensors")
    for after in (tuned, tmp_path / "single.safetensors"):
        found = extract(base, after, rank=8, energy=1 - 1e-6)
        assert found.modules.keys() == lora.keys()
        for name, module in lora.items():
            assert found.modules[name].rank == module.rank
            assert relative_error(found.modules[name].delta(), module.delta()) < 1e-4
    assert "2 of" in found.summary[0] and "rank 2 to 3" in found.summary[0]


def test_the_tool_writes_a_file_and_says_what_is_lost(models, tmp_path, capsys):
    base, tuned, lora = models
    out = tmp_path / "x.safetensors"
    args = ["extract", str(base), str(tuned), str(out), "--rank", "1"]
    convert.run(convert.parser("convert").parse_args(args))
    said = capsys.readouterr().out
    assert "relative error of the change: 0." in said and "layers.0.attention.to_q" in said
    read = read_lora(out, layers_for(None, out)).modules
    assert {m.rank for m in read.values()} == {1}
    for name, module in lora.items():
        u, values, vt = np.linalg.svd(module.delta())
        best = values[0] * np.outer(u[:, 0], vt[0])
        assert relative_error(read[name].delta(), best) < 1e-3


def test_what_no_lora_can_hold_is_named(models, tmp_path):
    base, tuned, _ = models
    changed = tmp_path / "changed"
    shutil.copytree(tuned, changed)
    tensors = load_file(changed / WEIGHTS)
    name = next(name for name in tensors if name.endswith("norm_q.weight"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, changed / WEIGHTS, {"format": "pt"})
    assert f"  {name}" in extract(base, changed, rank=2).summary
    assert any("1 tensors that no LoRA" in line for line in extract(base, changed, 2).summary)


@pytest.mark.parametrize("arguments", [["--rank", "0"], ["--energy", "1.5"], ["--energy", "nan"]])
def test_a_wrong_number_is_one_line(arguments, tmp_path):
    args = convert.parser("convert").parse_args(["extract", "a", "b", "c", *arguments])
    with pytest.raises(UserError, match=rf"{arguments[0]} .*must be") as caught:
        args.run(args)
    assert len(caught.value.problems) == 1


def test_models_that_do_not_fit_are_named(models, tmp_path):
    base, tuned, _ = models
    with pytest.raises(UserError, match="no linear layer differs"):
        extract(base, base, 4)
    other = tmp_path / "other"
    shutil.copytree(tuned, other)
    config = json.loads((other / "transformer/config.json").read_text())
    config["rope_theta"] = 128.0
    (other / "transformer/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has other sizes"):
        extract(base, other, 4)
