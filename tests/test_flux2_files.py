"""FLUX.2's files as their authors and ComfyUI have them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weights_helpers import tensors_of

from dopsd_jax.common.errors import UserError
from dopsd_jax.conversion.export import export_diffusers, export_single
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.conversion.inspection import inspect
from dopsd_jax.families.flux2_klein import family, layouts
from dopsd_jax.families.flux2_klein.networks import NETWORKS
from dopsd_jax.models.autoencoder_config import DOWN_BLOCK, UP_BLOCK
from dopsd_jax.models.flux2_autoencoder import Flux2AutoencoderConfig
from dopsd_jax.models.flux2_config import Flux2Config
from dopsd_jax.weights.converted import Origin, convert
from dopsd_jax.weights.layouts import Found, in_layout
from dopsd_jax.weights.load import load_component
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.safetensors_write import file_order, header_bytes
from dopsd_jax.weights.stored import open_stored
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
    vae, network = tmp_path / "vae", NETWORKS["vae"]
    shutil.copytree(folder / "vae", vae)
    (file,) = vae.glob("*.safetensors")
    tensors = load_file(file)
    tensors["bn.running_var"][3] = -0.25
    save_file(tensors, file)
    stored = open_stored(vae, network)
    origin = Origin("vae", "", stored.found)
    for read in (
        lambda: load_component(vae, network),
        lambda: convert(stored.tensors, stored.leaves, "{}", tmp_path / "out", "vae", origin),
    ):
        with pytest.raises(UserError, match=r"'bn\.running_var' holds -0\.25; no number of it"):
            read()


def in_names(folder, component, name):
    """A network's tensors under the names of a layout."""
    network = NETWORKS[component]
    stored = open_stored(folder / component, network)
    (layout,) = (one for one in network.layouts(stored.config) if one.name == name)
    view = in_layout(stored.tensors, Found(layout, ""))
    return {name: view.read(name) for name in view.infos}


def test_a_model_goes_to_single_files_and_back(folder, tmp_path):
    """The transformer behind ComfyUI's prefix, the autoencoder under the authors' names."""
    file, vae = tmp_path / "klein.safetensors", tmp_path / "flux2-vae.safetensors"
    export_single(folder, file)
    tensors, parts = load_file(file), TensorFiles.open(folder / "transformer")
    canonical = parts.read(layouts.SWAPPED)
    half = len(canonical) // 2
    swapped = tensors["final_layer.adaLN_modulation.1.weight"]
    np.testing.assert_array_equal(swapped, np.concatenate([canonical[half:], canonical[:half]]))
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, file)
    save_file(in_names(folder, "vae", "ldm"), vae)
    assert "encoder.quant_conv.weight" in load_file(vae)
    import_model(folder, tmp_path / "model", files={"transformer": file, "vae": vae})
    export_diffusers(tmp_path / "model", tmp_path / "back")
    for component in ("transformer", "vae"):
        assert tensors_of(tmp_path / "back" / component) == tensors_of(folder / component)
    assert tensors_of(tmp_path / "back" / "vae")["bn.num_batches_tracked"][:2] == ("I64", ())
    export_single(tmp_path / "model", tmp_path / "again.safetensors")
    assert tensors_of(tmp_path / "again.safetensors") == tensors_of(file)


def test_diffusers_names_in_one_file_are_known(folder, tmp_path):
    """The other circulating file of the autoencoder, and what ComfyUI saves behind its prefix."""
    for component, prefix in (("vae", ""), ("transformer", "diffusion_model.")):
        (own,) = (folder / component).glob("*.safetensors")
        file = tmp_path / f"{component}.safetensors"
        save_file({prefix + name: tensor for name, tensor in load_file(own).items()}, file)
        stored = open_stored(folder / component, NETWORKS[component], file)
        assert all(np.array_equal(stored.tensors.read(n), t) for n, t in load_file(own).items())


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    """The 9B's single file without its numbers: a header, and a hole of the published size."""
    network = NETWORKS["transformer"]
    layouts = network.layouts(family.PUBLISHED["9B"])
    (layout,) = (one for one in layouts if one.name == network.single)
    infos = {e.name: TensorInfo("BF16", e.shape) for e in layout.entries}
    return sparse(tmp_path_factory.mktemp("nine") / "klein.safetensors", infos), infos


def sparse(path, infos):
    header = header_bytes(file_order(infos), infos, None)
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(info.nbytes for info in infos.values()))
    return path


def test_the_9bs_single_file_would_have_the_published_size(nine):
    assert nine[0].stat().st_size == 18_157_185_168


def test_a_lone_file_is_compared_with_the_size_that_it_is_of(nine, tmp_path):
    """Not with the first that has its names; one that is not whole likewise."""
    file, infos = nine
    name = "transformer (flux2_klein 9B) in comfyui names"
    assert list(inspect(file))[1:] == [f"  {name}: complete"]
    gone = "double_blocks.7.img_mlp.0.weight"
    left = {other: info for other, info in infos.items() if other != gone}
    about, fault = list(inspect(sparse(tmp_path / "part.safetensors", left)))[1:]
    assert about == f"  {name}: 1 faults" and f"tensor {gone!r}" in fault and "missing" in fault
