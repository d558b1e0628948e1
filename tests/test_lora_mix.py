"""Several LoRAs with strengths: what options say, and that their changes add up."""

import numpy as np
import pytest
from conftest import relative_error
from flax import nnx
from lora_helpers import (
    BLOCK,
    CONFIG,
    DOWN,
    LAYERS,
    deltas,
    native_names,
    random_modules,
    save,
    split_names,
)
from weights_helpers import SMALL

from dopsd_jax import convert
from dopsd_jax.adapters import attach
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.lora_options import LoraOption, lora_option, lora_options
from dopsd_jax.families.lora import attach_files
from dopsd_jax.families.zimage import family
from dopsd_jax.models import zimage, zimage_config
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights.lora_mix import read_mix
from dopsd_jax.weights.safetensors_io import TensorFiles


@pytest.mark.parametrize(
    "text, path, strength",
    [
        ("dog.safetensors", "dog.safetensors", 1.0),
        ("dog.safetensors:0.8", "dog.safetensors", 0.8),
        ("a:b/dog.safetensors:-1", "a:b/dog.safetensors", -1.0),
        ("a:b/dog.safetensors", "a:b/dog.safetensors", 1.0),
        ("one,two.safetensors:1e-1", "one,two.safetensors", 0.1),
    ],
)
def test_an_option_names_a_file_and_its_strength(text, path, strength):
    option = lora_option(text)
    assert (str(option.path), option.strength) == (path, strength)


def test_a_file_whose_name_ends_like_a_strength_is_taken_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog:2").touch()
    assert lora_option("dog:2") == (tmp_path.relative_to(tmp_path) / "dog:2", 1.0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("dog:nan", "has the strength nan; give a finite number"),
        ("dog:inf", "a finite number"),
        (":0.5", "names no file"),
        ("", "names no file"),
        ("https://example.org/x", "is an address"),
    ],
)
def test_an_option_that_cannot_be_is_named(text, message):
    with pytest.raises(UserError, match=message):
        lora_options([text])


@pytest.fixture
def files(tmp_path):
    """Two files of different dialect, rank and layers, as options; and the sum of their changes."""
    first = random_modules(BLOCK[:20], rank=3, scale=1.0, seed=1)
    second = random_modules(rank=4, scale=2.0, seed=2)
    given = (
        LoraOption(save(tmp_path / "a.safetensors", split_names(first, "transformer.")), 0.8),
        LoraOption(
            save(
                tmp_path / "b.safetensors",
                native_names(second, "lora_unet_", True, alpha=8, **DOWN),
            ),
            -0.5,
        ),
    )
    first, second = deltas(first), deltas(second)
    return given, {p: 0.8 * first.get(p, 0) - 0.5 * change for p, change in second.items()}


def test_changes_add_up_with_their_strengths(files):
    given, expected = files
    modules = read_mix(given, LAYERS)
    assert {m.rank for m in modules.values()} == {4, 7}
    network = zimage.ZImage(CONFIG, rngs=nnx.Rngs(0))
    attach_files(network, family, CONFIG, given)
    slots = attach.slots(zimage_config.names(CONFIG))
    trained = nnx.state(network, nnx.LoRAParam)
    attached = attach.export(trained, {p: slots[p] for p in modules}, 1.0)
    for found in (deltas(modules), deltas(attached)):
        assert found.keys() == expected.keys()
        for path, change in expected.items():
            assert relative_error(found[path], change) < 1e-6, path


def test_one_file_at_full_strength_stays_as_it_is(files):
    (_, (path, _)), _ = files
    for module in read_mix([LoraOption(path)], LAYERS).values():
        assert (module.rank, module.scale) == (4, 2.0)


def test_the_faults_of_all_files_are_told(files, tmp_path):
    (good, _), _ = files
    bad = [LoraOption(tmp_path / f"{name}.safetensors") for name in ("no", "nowhere")]
    with pytest.raises(UserError) as caught:
        read_mix([bad[0], good, bad[1]], LAYERS)
    assert len(caught.value.problems) == 2


def test_the_tool_merges_several(tmp_path):
    """Into a model of one size; the same file with strengths that cancel leaves it as it was."""
    model = write_random_model(tmp_path / "model", size=SMALL)
    name = "layers.0.attention.to_q"
    shape = TensorFiles.open(model / "transformer").infos[f"{name}.weight"].shape
    a, b = np.full((1, shape[1]), 0.5, np.float32), np.full((shape[0], 1), 0.25, np.float32)
    tensors = {f"transformer.{name}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
    file = save(tmp_path / "x.safetensors", tensors)

    def merged(*strengths):
        out = tmp_path / f"out{strengths}"
        args = ["merge", str(model), *(f"{file}:{s}" for s in strengths), str(out)]
        convert.run(convert.parser("convert").parse_args(args))
        return TensorFiles.open(out / "transformer").read(f"{name}.weight").astype(np.float64)

    before = TensorFiles.open(model / "transformer").read(f"{name}.weight").astype(np.float64)
    np.testing.assert_array_equal(merged(1, -1), before)
    np.testing.assert_allclose(merged(2, 1.5) - before, 3.5 * 0.125, atol=0.01)
