"""Adapters merged into full weights."""

import dataclasses

import numpy as np
import pytest
from weights_helpers import SMALL, tensors_of

from dopsd_jax.common.errors import UserError
from dopsd_jax.conversion.export import export_diffusers, export_single
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.models.zimage_config import ZImageConfig, names
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights.lora_files import LoraModule
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.validation import sources


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("tiny") / "model", size=SMALL)


def _adapters(seed=0, rank=3, scale=0.5):
    rng = np.random.default_rng(seed)
    config = ZImageConfig(dim=64, layers=2, heads=4, caption_dim=64, axes_dims=(4, 6, 6))
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    return {
        n.removesuffix(".weight"): LoraModule(draw(rank, s[1]), draw(s[0], rank), scale)
        for n, s in sources(names(config)).items()
        if len(s) == 2 and ("attention.to_" in n or "feed_forward" in n) and "layers" in n
    }


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_merging_adds_the_change_and_rounds_once(tiny, tmp_path, dtype):
    lora = _adapters()
    typed, imported = tmp_path / "typed", tmp_path / "imported"
    export_diffusers(tiny, typed, dtype=dtype)
    import_model(typed, imported)
    assert len(lora) == 14
    source = TensorFiles.open(typed / "transformer")
    for name, model in (("a", typed), ("b", imported)):
        export_diffusers(model, tmp_path / name, lora=lora)
        merged = TensorFiles.open(tmp_path / name / "transformer")
        assert merged.infos.keys() == source.infos.keys()
        for tensor, info in source.infos.items():
            before = source.read(tensor)
            module = lora.get(tensor.removesuffix(".weight"))
            after = merged.read(tensor)
            assert after.dtype == before.dtype
            if module is None:
                assert np.array_equal(before, after), tensor
                continue
            exact = before.astype(np.float64)
            exact += module.scale * (module.b.astype(np.float64) @ module.a.astype(np.float64))
            # Half a unit in the last place, and the float32 sum's own error.
            unit = np.spacing(np.abs(exact).astype(info.numpy)).astype(np.float64)
            bound = 0.5 * unit + 1e-6 * np.abs(exact).max()
            assert (np.abs(after.astype(np.float64) - exact) <= bound).all(), tensor


def test_a_merged_single_file_is_the_merged_folder(tiny, tmp_path):
    lora = _adapters()
    export_diffusers(tiny, tmp_path / "folder", lora=lora, dtype="BF16")
    export_single(tmp_path / "folder", tmp_path / "a.safetensors")
    export_single(tiny, tmp_path / "b.safetensors", lora=lora, dtype="BF16")
    assert tensors_of(tmp_path / "a.safetensors") == tensors_of(tmp_path / "b.safetensors")


def test_a_fault_names_the_folder_that_was_asked_for(tiny, tmp_path):
    """Not the hidden one in which it is written."""
    lora = {name: dataclasses.replace(m, b=m.b * 1e30) for name, m in _adapters().items()}
    with pytest.raises(UserError, match="beyond F16") as caught:
        export_diffusers(tiny, tmp_path / "out", lora=lora, dtype="F16")
    assert f"{tmp_path}/out/" in str(caught.value) and "partial" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_adapters_that_do_not_fit_are_all_listed(tiny, tmp_path):
    lora = _adapters()
    module = lora.pop("layers.0.attention.to_q")
    lora["layers.9.attention.to_q"] = module
    lora["layers.0.feed_forward.w1"] = module
    with pytest.raises(UserError) as caught:
        export_diffusers(tiny, tmp_path / "out", lora=lora)
    assert len(caught.value.problems) == 2
    assert "layers.9" in str(caught.value) and "feed_forward.w1" in str(caught.value)
    assert not (tmp_path / "out").exists()
