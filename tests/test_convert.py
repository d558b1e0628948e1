"""Weights from form to form: every round trip is exact."""

import json
import math
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from weights_helpers import SMALL, TRANSFORMER, run_python, same_modules, tensors_of

from dopsd_jax.conversion.export import export_diffusers, export_single
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.families.zimage.networks import VLM, ZIMAGE
from dopsd_jax.models.zimage_config import ZImageConfig, names
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights import device_stack
from dopsd_jax.weights.layouts import Found, in_layout
from dopsd_jax.weights.load import load_component
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.safetensors_write import file_order, header_bytes
from dopsd_jax.weights.stored import open_stored
from dopsd_jax.weights.tensors import TensorInfo
from dopsd_jax.weights.validation import sources

DATA = Path(__file__).parent / "data"
CODES = ("F32", "BF16", "F16")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("tiny") / "model", size=SMALL)


@pytest.fixture(scope="module", params=CODES)
def typed(request, tiny, tmp_path_factory):
    """The tiny model with its transformer stored in each type."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    shutil.copytree(tiny, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    dtype = TensorInfo(request.param, ()).numpy
    save_file({n: t.astype(dtype) for n, t in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def imported(typed, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "model"
    # Small parts: several for each layer of the transformer.
    import_model(typed, out, part_bytes=60_000)
    return out


# The published single file.


def _published():
    published = json.loads((DATA / "zimage_single_file.json").read_text())
    (layout,) = (x for x in TRANSFORMER.layouts(ZImageConfig()) if x.name == TRANSFORMER.single)
    return published, layout


def test_the_single_file_layout_is_the_published_one():
    published, layout = _published()
    ours = {e.name: [list(e.shape), [s.name for s in e.sources]] for e in layout.entries}
    theirs = {n: [shape, names or [n]] for n, (shape, names) in published["tensors"].items()}
    assert len(ours) == 453
    assert ours == theirs
    canonical = sources(names(ZImageConfig()))
    assert canonical.keys() == {name for _, parts in theirs.values() for name in parts}
    assert len(canonical) == 521
    assert sum(math.prod(shape) for shape in canonical.values()) == 6_154_908_736


def test_our_single_file_would_have_the_published_size():
    published, layout = _published()
    infos = {e.name: TensorInfo(published["dtype"], e.shape) for e in layout.entries}
    header = header_bytes(file_order(infos), infos, None)
    assert len(header) + sum(i.nbytes for i in infos.values()) == 12_309_866_400


# Round trips.


@pytest.mark.parametrize("component", [*ZIMAGE, "vlm"])
def test_folder_and_converted_make_the_same_module(typed, imported, component):
    network = {**ZIMAGE, "vlm": VLM}[component]
    same_modules(
        load_component(typed / component, network), load_component(imported / component, network)
    )


def test_folder_to_converted_to_folder_is_exact(typed, imported, tmp_path):
    export_diffusers(imported, tmp_path / "out", max_shard=200_000)
    for component in (*ZIMAGE, "vlm"):
        assert tensors_of(typed / component) == tensors_of(tmp_path / "out" / component)
    assert len(TensorFiles.open(tmp_path / "out" / "transformer").files) > 1
    for file in typed.rglob("*"):
        if file.is_file() and ".safetensors" not in file.name:
            copy = tmp_path / "out" / file.relative_to(typed)
            assert copy.read_bytes() == file.read_bytes(), file


def test_folder_to_single_to_folder_is_exact(typed, tmp_path):
    export_single(typed, tmp_path / "one.safetensors")
    names = TensorFiles.open(tmp_path / "one.safetensors").infos
    assert "layers.0.attention.qkv.weight" in names and "x_embedder.bias" in names
    import_model(typed, tmp_path / "model", files={"transformer": tmp_path / "one.safetensors"})
    export_diffusers(tmp_path / "model", tmp_path / "back")
    assert tensors_of(typed / "transformer") == tensors_of(tmp_path / "back" / "transformer")


@pytest.mark.parametrize(
    "prefix, extra",
    [("", False), ("", True), ("model.diffusion_model.", True), ("diffusion_model.", False)],
)
def test_single_to_converted_to_single_is_exact(tiny, tmp_path, prefix, extra):
    export_single(tiny, tmp_path / "a.safetensors")
    tensors = {prefix + n: t for n, t in load_file(tmp_path / "a.safetensors").items()}
    if extra:
        tensors[prefix + "norm_final.weight"] = np.arange(64, dtype=np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    import_model(tiny, tmp_path / "model", files={"transformer": tmp_path / "a.safetensors"})
    export_single(tmp_path / "model", tmp_path / "b.safetensors")
    assert tensors_of(tmp_path / "a.safetensors") == tensors_of(tmp_path / "b.safetensors")
    same_modules(
        load_component(tiny / "transformer", TRANSFORMER),
        load_component(tmp_path / "model" / "transformer", TRANSFORMER),
    )
    export_diffusers(tmp_path / "model", tmp_path / "folder")
    assert tensors_of(tmp_path / "folder" / "transformer") == tensors_of(tiny / "transformer")


def test_single_files_of_the_other_networks_are_read(tiny, tmp_path):
    stored = open_stored(tiny / "vae", ZIMAGE["vae"])
    (ldm,) = (x for x in ZIMAGE["vae"].layouts(stored.config) if x.name == "ldm")
    view = in_layout(stored.tensors, Found(ldm, ""))
    assert view.infos["encoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    save_file({n: view.read(n) for n in view.infos}, tmp_path / "ae.safetensors")
    (encoder,) = (tiny / "text_encoder").glob("*.safetensors")
    bare = {n.removeprefix("model."): t for n, t in load_file(encoder).items()}
    save_file(bare, tmp_path / "qwen.safetensors")
    files = {"vae": tmp_path / "ae.safetensors", "text_encoder": tmp_path / "qwen.safetensors"}
    import_model(tiny, tmp_path / "model", files=files)
    for component in ("vae", "text_encoder"):
        network = ZIMAGE[component]
        same_modules(
            load_component(tiny / component, network),
            load_component(tmp_path / "model" / component, network),
        )
    export_diffusers(tmp_path / "model", tmp_path / "back")
    assert tensors_of(tmp_path / "back" / "vae") == tensors_of(tiny / "vae")
    # The text encoder keeps the names it came with: transformers reads both.
    assert TensorFiles.open(tmp_path / "back" / "text_encoder").infos.keys() == bare.keys()


def test_diffusers_and_transformers_load_the_export(tiny, tmp_path):
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen3Model

    import_model(tiny, tmp_path / "model")
    export_diffusers(tmp_path / "model", tmp_path / "out", max_shard=200_000)
    for component, cls in (
        ("transformer", ZImageTransformer2DModel),
        ("vae", AutoencoderKL),
        ("text_encoder", Qwen3Model),
    ):
        folder = tmp_path / "out" / component
        model, info = cls.from_pretrained(folder, output_loading_info=True, torch_dtype="auto")
        assert not any(info.values()), info
        files = TensorFiles.open(folder)
        state = model.state_dict()
        assert len(state) == len(files.infos)
        for name in files.infos:
            loaded = state[name.removeprefix("model.")].float().numpy()
            assert np.array_equal(loaded, files.read(name).astype(np.float32)), name


def test_diffusers_loads_the_single_file(tiny, tmp_path):
    from diffusers import ZImageTransformer2DModel

    export_single(tiny, tmp_path / "one.safetensors")
    model = ZImageTransformer2DModel.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tiny), subfolder="transformer"
    )
    source = TensorFiles.open(tiny / "transformer")
    state = model.state_dict()
    assert state.keys() == source.infos.keys()
    assert all(np.array_equal(state[n].numpy(), source.read(n)) for n in state)


def test_a_type_can_be_chosen_once_and_rounds_to_nearest(tiny, tmp_path):
    import_model(tiny, tmp_path / "half", dtype="BF16")
    export_single(tmp_path / "half", tmp_path / "a.safetensors")
    export_single(tiny, tmp_path / "b.safetensors", dtype="BF16")
    assert tensors_of(tmp_path / "a.safetensors") == tensors_of(tmp_path / "b.safetensors")
    whole = load_component(tiny / "transformer", TRANSFORMER)
    half = load_component(tiny / "transformer", TRANSFORMER, dtype="bfloat16")
    same_modules(half, load_component(tmp_path / "half" / "transformer", TRANSFORMER))
    kernel = np.asarray(whole.layers.attention.qkv.kernel[...])
    rounded = np.asarray(half.layers.attention.qkv.kernel[...])
    assert np.array_equal(kernel.astype(ml_dtypes.bfloat16), rounded)


def test_each_parameter_may_have_its_own_type(tiny):
    by_path = lambda path: "bfloat16" if path.endswith("kernel") else "float32"
    model = load_component(tiny / "transformer", TRANSFORMER, dtype=by_path)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert variable[...].dtype == by_path(".".join(map(str, path)))


def test_stacks_of_the_same_layers_are_filled_by_one_program(tiny):
    """Of the two refiners and of the layers: of the network's size, not of its number of arrays."""
    device_stack._set_rows.cache_clear()
    model = load_component(tiny / "transformer", TRANSFORMER)
    assert model.layers.attention.qkv.kernel.ndim == 3
    programs = device_stack._set_rows.cache_info()
    assert (programs.currsize, programs.hits > 0) == (3, True)


def test_one_room_of_a_network_loads_alone(tiny, imported):
    from dopsd_jax.models.qwen3_vl_vision import Qwen3VLVision

    build = lambda config, rngs: Qwen3VLVision(config.vision, rngs=rngs)
    whole = load_component(tiny / "vlm", VLM)
    for folder in (tiny, imported):
        vision = load_component(folder / "vlm", VLM, build=build, room="vision")
        same_modules(whole.vision, vision)


def test_a_loaded_network_computes_what_diffusers_computes(tiny, tmp_path):
    """The arrangement is right, not only reversible."""
    import torch
    from conftest import relative_error
    from diffusers import ZImageTransformer2DModel

    reference = ZImageTransformer2DModel.from_pretrained(tiny / "transformer")
    rng = np.random.default_rng(0)
    x, caption = rng.standard_normal((16, 8, 8)), rng.standard_normal((32, 64))
    with torch.no_grad():
        expected = reference(
            [torch.tensor(x, dtype=torch.float32)[:, None]],
            torch.tensor([0.3]),
            [torch.tensor(caption, dtype=torch.float32)],
            return_dict=False,
        )[0][0][:, 0]
    import_model(tiny, tmp_path / "model")
    model = load_component(tmp_path / "model" / "transformer", TRANSFORMER)
    lengths = jax.numpy.array([32])
    refined = model.refine(jax.numpy.asarray(caption, "float32")[None], lengths)
    latent = jax.numpy.asarray(x.transpose(1, 2, 0), "float32")[None]
    actual = model(latent, jax.numpy.array([0.3]), refined, lengths)[0]
    assert relative_error(actual.transpose(2, 0, 1), expected) < 1e-5


# Meshes. In a process of its own, which has four devices.

SHARDED = """
import sys, hashlib
from pathlib import Path
import jax, numpy as np
from flax import nnx
from dopsd_jax.weights.load import load_component
from dopsd_jax.families.zimage.networks import ZIMAGE
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def place(path, shape):
    # The last two axes over the mesh, where they divide; the layer axis whole.
    axes = [None] * len(shape)
    for axis, name in ((-1, "tensor"), (-2, "fsdp")):
        if len(shape) >= -axis and shape[axis] % 2 == 0 and not (len(shape) == 2 and axis == -2):
            axes[axis] = name
    return jax.NamedSharding(mesh, jax.P(*axes))
for folder in sys.argv[1:]:
    plain = load_component(folder, ZIMAGE["transformer"])
    spread = load_component(folder, ZIMAGE["transformer"], sharding_for=place)
    count = 0
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (plain, spread))):
        assert b[...].sharding.is_equivalent_to(place(path, a.shape), a[...].ndim), path
        assert np.array_equal(np.asarray(a[...]), np.asarray(b[...])), path
        count += len({s.index.__repr__() for s in b[...].addressable_shards}) > 1
    assert count > 20, count
print("equal")
"""


def test_any_mesh_gets_the_same_numbers(tiny, tmp_path):
    import_model(tiny, tmp_path / "model")
    folders = tiny / "transformer", tmp_path / "model" / "transformer"
    flags = "--xla_force_host_platform_device_count=4"
    assert "equal" in run_python("-c", SHARDED, *folders, XLA_FLAGS=flags)
