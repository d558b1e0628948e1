"""FLUX.2's files as their authors and ComfyUI have them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weights_helpers import tensors_of

from dopsd_jax.common.errors import UserError
from dopsd_jax.conversion.export import export_diffusers, export_single
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.families.flux2_klein import family, layouts
from dopsd_jax.families.flux2_klein.networks import NETWORKS
from dopsd_jax.models.autoencoder_config import DOWN_BLOCK, UP_BLOCK
from dopsd_jax.models.flux2_autoencoder import Flux2AutoencoderConfig
from dopsd_jax.models.flux2_config import Flux2Config
from dopsd_jax.weights.load import load_component
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.safetensors_write import file_order, header_bytes
from dopsd_jax.weights.tensors import TensorInfo

DATA = Path(__file__).parent / "data"
VAE = {
    "_class_name": "AutoencoderKLFlux2", "act_fn": "silu", "batch_norm_eps": 0.0001,
    "block_out_channels": [128, 256, 512, 512], "down_block_types": [DOWN_BLOCK] * 4,
    "in_channels": 3, "latent_channels": 32, "layers_per_block": 2, "norm_num_groups": 32,
    "out_channels": 3, "patch_size": [2, 2], "up_block_types": [UP_BLOCK] * 4,
}  # fmt: skip


def published(name):
    return json.loads((DATA / f"{name}.json").read_text())["tensors"]


def test_the_transformers_layout_is_the_published_one():
    theirs = published("flux2_klein_4b_single_file")
    (layout,) = (
        found
        for found in NETWORKS["transformer"].layouts(Flux2Config())
        if found.name == NETWORKS["transformer"].single
    )
    assert len(layout.entries) == len(theirs) == 149
    assert {
        e.name: (list(e.shape), [s.name for s in e.sources], e.swapped) for e in layout.entries
    } == {n: (shape, parts, op == "swap_halves") for n, (shape, _, op, parts) in theirs.items()}
    infos = {e.name: TensorInfo("BF16", e.shape) for e in layout.entries}
    header = header_bytes(file_order(infos), infos, None)
    assert len(header) + sum(info.nbytes for info in infos.values()) == 7_751_105_712


def test_the_autoencoders_layout_is_the_published_one():
    config = Flux2AutoencoderConfig.from_dict(VAE, "config.json")
    _, layout = NETWORKS["vae"].layouts(config)
    theirs = published("flux2_ae")
    entries = (*layout.entries, *layout.extras)
    assert len(entries) == len(theirs) == 251
    assert {e.name: (list(e.shape), e.sources[0].name) for e in entries} == {
        name: (shape, parts[0]) for name, (shape, _, _, parts) in theirs.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return family.write_random_model(tmp_path_factory.mktemp("klein") / "model")


def test_a_variance_below_zero_is_refused(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (file,) = (model / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["bn.running_var"][3] = -0.25
    save_file(tensors, file)
    for read in (
        lambda: load_component(model / "vae", NETWORKS["vae"]),
        lambda: import_model(model, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"'bn\.running_var' holds -0\.25; no number of it"):
            read()


def test_a_model_goes_to_a_single_file_and_back(folder, tmp_path):
    file = tmp_path / "klein.safetensors"
    export_single(folder, file)
    single, parts = TensorFiles.open(file), TensorFiles.open(folder / "transformer")
    canonical = parts.read(layouts.SWAPPED)
    half = len(canonical) // 2
    swapped = single.read("final_layer.adaLN_modulation.1.weight")
    np.testing.assert_array_equal(swapped, np.concatenate([canonical[half:], canonical[:half]]))
    import_model(folder, tmp_path / "model", files={"transformer": file})
    export_diffusers(tmp_path / "model", tmp_path / "back")
    assert tensors_of(tmp_path / "back" / "transformer") == tensors_of(folder / "transformer")
