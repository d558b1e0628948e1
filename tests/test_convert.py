"""Weights from form to form: every round trip is exact, every tensor is accounted for."""

import errno
import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dopsd_jax.errors import UserError
from dopsd_jax.models.zimage import ZImageConfig, names
from dopsd_jax.tiny import Size, make_tiny
from dopsd_jax.weights import converted, importing
from dopsd_jax.weights.account import sources
from dopsd_jax.weights.digest import digest
from dopsd_jax.weights.export import export_diffusers, export_single
from dopsd_jax.weights.importing import import_model
from dopsd_jax.weights.layouts import Found, in_layout
from dopsd_jax.weights.load import load_component
from dopsd_jax.weights.lora_files import LoraModule
from dopsd_jax.weights.networks import VLM, ZIMAGE
from dopsd_jax.weights.progress import Progress
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.safetensors_write import _header, file_order
from dopsd_jax.weights.stored import open_stored, source_digest
from dopsd_jax.weights.tensors import TensorInfo

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[1]
TRANSFORMER = ZIMAGE["transformer"]
CODES = ("F32", "BF16", "F16")
SMALL = Size(layers=2, refiner_layers=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model", size=SMALL)


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


def _tensors(path):
    files = TensorFiles.open(path)
    return {n: (i.dtype, i.shape, files.read(n).tobytes()) for n, i in files.infos.items()}


def _same_modules(a, b):
    a, b = (dict(nnx.to_flat_state(nnx.state(m))) for m in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        x, y = np.asarray(a[path][...]), np.asarray(b[path][...])
        assert x.dtype == y.dtype and x.shape == y.shape, path
        assert x.tobytes() == y.tobytes(), path


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


def test_our_single_file_would_have_the_published_size():
    published, layout = _published()
    infos = {e.name: TensorInfo(published["dtype"], e.shape) for e in layout.entries}
    header = _header(file_order(infos), infos, None)
    assert len(header) + sum(i.nbytes for i in infos.values()) == 12_309_866_400


# Round trips.


@pytest.mark.parametrize("component", [*ZIMAGE, "vlm"])
def test_folder_and_converted_make_the_same_module(typed, imported, component):
    network = {**ZIMAGE, "vlm": VLM}[component]
    _same_modules(
        load_component(typed / component, network), load_component(imported / component, network)
    )


def test_folder_to_converted_to_folder_is_exact(typed, imported, tmp_path):
    export_diffusers(imported, tmp_path / "out", max_shard=200_000)
    for component in (*ZIMAGE, "vlm"):
        assert _tensors(typed / component) == _tensors(tmp_path / "out" / component)
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
    assert _tensors(typed / "transformer") == _tensors(tmp_path / "back" / "transformer")


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
    assert _tensors(tmp_path / "a.safetensors") == _tensors(tmp_path / "b.safetensors")
    _same_modules(
        load_component(tiny / "transformer", TRANSFORMER),
        load_component(tmp_path / "model" / "transformer", TRANSFORMER),
    )
    export_diffusers(tmp_path / "model", tmp_path / "folder")
    assert _tensors(tmp_path / "folder" / "transformer") == _tensors(tiny / "transformer")


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
        _same_modules(
            load_component(tiny / component, network),
            load_component(tmp_path / "model" / component, network),
        )
    export_diffusers(tmp_path / "model", tmp_path / "back")
    assert _tensors(tmp_path / "back" / "vae") == _tensors(tiny / "vae")
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
    assert _tensors(tmp_path / "a.safetensors") == _tensors(tmp_path / "b.safetensors")
    whole = load_component(tiny / "transformer", TRANSFORMER)
    half = load_component(tiny / "transformer", TRANSFORMER, dtype="bfloat16")
    _same_modules(half, load_component(tmp_path / "half" / "transformer", TRANSFORMER))
    kernel = np.asarray(whole.layers.attention.qkv.kernel[...])
    rounded = np.asarray(half.layers.attention.qkv.kernel[...])
    assert np.array_equal(kernel.astype(ml_dtypes.bfloat16), rounded)


def test_each_parameter_may_have_its_own_type(tiny):
    by_path = lambda path: "bfloat16" if path.endswith("kernel") else "float32"
    model = load_component(tiny / "transformer", TRANSFORMER, dtype=by_path)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert variable[...].dtype == by_path(".".join(map(str, path)))


def test_one_room_of_a_network_loads_alone(tiny, imported):
    from dopsd_jax.models.qwen3_vl_vision import Qwen3VLVision

    build = lambda config, rngs: Qwen3VLVision(config.vision, rngs=rngs)
    whole = load_component(tiny / "vlm", VLM)
    for folder in (tiny, imported):
        vision = load_component(folder / "vlm", VLM, build=build, room="vision")
        _same_modules(whole.vision, vision)


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
from dopsd_jax.weights.networks import ZIMAGE
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


def _python(*args, **env):
    import os

    full = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, env=full, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_any_mesh_gets_the_same_numbers(tiny, tmp_path):
    import_model(tiny, tmp_path / "model")
    folders = tiny / "transformer", tmp_path / "model" / "transformer"
    flags = "--xla_force_host_platform_device_count=4"
    assert "equal" in _python("-c", SHARDED, *folders, XLA_FLAGS=flags)


# Merging.


def _adapters(seed=0, rank=3, scale=0.5):
    rng = np.random.default_rng(seed)
    config = ZImageConfig(dim=64, layers=2, heads=4, caption_dim=64, axes_dims=(4, 6, 6))
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    return {
        n.removesuffix(".weight"): LoraModule(draw(rank, s[1]), draw(s[0], rank), scale)
        for n, s in sources(names(config)).items()
        if len(s) == 2 and ("attention.to_" in n or "feed_forward" in n) and "layers" in n
    }


def test_merging_adds_the_change_and_rounds_once(typed, imported, tmp_path):
    lora = _adapters()
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
    assert _tensors(tmp_path / "a.safetensors") == _tensors(tmp_path / "b.safetensors")


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


# Accounting.


def test_every_fault_of_every_network_is_listed(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["layers.0.attention.to_q.weight"]
    tensors["siglip_embedder.0.weight"] = np.zeros(3, np.float32)
    tensors["x_pad_token"] = np.zeros((1, 63), np.float32)
    tensors["cap_pad_token"] = np.zeros((1, 64), np.int8)
    save_file(tensors, file)
    (file,) = (model / "vae").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        import_model(model, tmp_path / "out")
    text = caught.value.problems
    assert len(text) == 5
    for said in (
        "'layers.0.attention.to_q.weight' [64, 64] is missing",
        "'siglip_embedder.0.weight' [3] is unexpected",
        "'x_pad_token' has shape [1, 63], config.json makes it [1, 64]",
        "'cap_pad_token' is stored as I8",
        "'decoder.conv_in.bias' [32] is missing",
    ):
        assert any(said in problem for problem in text), said
    assert not (tmp_path / "out").exists()


def test_a_config_that_disagrees_is_noticed(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    path = model / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"n_layers": 3}))
    with pytest.raises(UserError) as caught:
        load_component(model / "transformer", TRANSFORMER)
    assert len(caught.value.problems) == 15  # the tensors of a layer
    assert all("layers.2" in p and "missing" in p for p in caught.value.problems)


def test_another_networks_file_is_recognised_as_such(tiny):
    (file,) = (tiny / "vae").glob("*.safetensors")
    with pytest.raises(UserError, match="no tensor of this network"):
        open_stored(tiny / "transformer", TRANSFORMER, file)


def test_parts_of_one_parameter_in_two_types_are_refused(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["layers.0.attention.to_k.weight"] = tensors["layers.0.attention.to_k.weight"].astype(
        np.float16
    )
    save_file(tensors, file)
    with pytest.raises(UserError, match="different types"):
        load_component(model / "transformer", TRANSFORMER)
    with pytest.raises(UserError, match="different types"):
        export_single(model, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="different types"):
        import_model(model, tmp_path / "out")
    import_model(model, tmp_path / "out2", dtype="F32")


# Interruption and damage.


class Interrupt(Progress):
    """Stops an import after some parts, as a signal would; counts what was done."""

    def __init__(self, after):
        self.left = after
        self.total = self.done = 0

    def start(self, total):
        self.total = total

    def advance(self, name, nbytes):
        self.done += nbytes
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_import_goes_on(tiny, tmp_path, monkeypatch):
    import_model(tiny, tmp_path / "whole", part_bytes=60_000)
    for after in (1, 5, 20):
        with pytest.raises(KeyboardInterrupt):
            import_model(tiny, tmp_path / "cut", part_bytes=60_000, progress=Interrupt(after))
        with pytest.raises(UserError, match=r"interrupted|no such folder|neither"):
            export_diffusers(tmp_path / "cut", tmp_path / "out")
    read, count = converted._read_part, []
    monkeypatch.setattr(converted, "_read_part", lambda *a: count.append(1) or read(*a))
    last = Interrupt(-1)
    import_model(tiny, tmp_path / "cut", part_bytes=60_000, progress=last)
    parts = sum(1 for _ in (tmp_path / "cut").glob("*/parts/*"))
    assert len(count) == parts - 20
    assert last.done == last.total
    for component in ZIMAGE:
        manifests = [tmp_path / m / component / "manifest.json" for m in ("whole", "cut")]
        a, b = (json.loads(m.read_text()) for m in manifests)
        assert a == b
        assert not (tmp_path / "cut" / component / "incomplete.json").exists()
    export_diffusers(tmp_path / "cut", tmp_path / "out")
    assert _tensors(tmp_path / "out" / "transformer") == _tensors(tiny / "transformer")


def test_an_import_goes_on_only_with_its_own_source(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        import_model(tiny, tmp_path / "cut", progress=Interrupt(3))
    with pytest.raises(UserError, match="another source"):
        import_model(tiny, tmp_path / "cut", dtype="BF16")
    other = make_tiny(tmp_path / "other", seed=1, size=SMALL)
    with pytest.raises(UserError, match="another source"):
        import_model(other, tmp_path / "cut")
    with pytest.raises(UserError, match="interrupted"):
        load_component(tmp_path / "cut" / "transformer", TRANSFORMER)
    import_model(tiny, tmp_path / "cut")


def test_a_full_disk_is_reported_and_the_import_goes_on(tiny, tmp_path, monkeypatch):
    save, left = converted.ocp.save, [4]

    def full(path, arrays):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, arrays)

    monkeypatch.setattr(converted.ocp, "save", full)
    with pytest.raises(UserError, match="disk is full"):
        import_model(tiny, tmp_path / "out", part_bytes=60_000)
    import_model(tiny, tmp_path / "out", part_bytes=60_000)
    monkeypatch.undo()
    _same_modules(
        load_component(tiny / "transformer", TRANSFORMER),
        load_component(tmp_path / "out" / "transformer", TRANSFORMER),
    )


def _damage_part(folder):
    shutil.rmtree(next((folder / "parts").glob("layers.0001.*")))


def _damage_data(folder):
    for file in (folder / "parts").glob("layers.0001.*/state/**/d/*"):
        file.write_bytes(file.read_bytes()[:-7])


def _damage_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"n_heads": 4', '"n_heads": 2'))


def _damage_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-20])


def _damage_format(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def _damage_entries(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    next(iter(manifest["parts"].values())).pop()
    path.write_text(json.dumps(manifest))


def _damage_shape(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    next(iter(manifest["parts"].values()))[0]["shape"] = [1, 2]
    path.write_text(json.dumps(manifest))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's threads
@pytest.mark.parametrize(
    "damage, message",
    [
        (_damage_part, "is missing"),
        (_damage_data, "is damaged"),
        (_damage_config, "changed after the conversion"),
        (_damage_manifest, "not valid JSON"),
        (_damage_format, "format 99"),
        (_damage_entries, "is missing"),
        (_damage_shape, "not of this network"),
    ],
)
def test_a_damaged_converted_checkpoint_is_noticed(tiny, tmp_path, damage, message):
    import_model(tiny, tmp_path / "out")
    damage(tmp_path / "out" / "transformer")
    with pytest.raises(UserError, match=message):
        load_component(tmp_path / "out" / "transformer", TRANSFORMER)
    with pytest.raises(UserError, match=message):
        export_single(tmp_path / "out", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_nothing_is_overwritten(tiny, tmp_path):
    import_model(tiny, tmp_path / "out")
    with pytest.raises(UserError, match="already"):
        import_model(tiny, tmp_path / "out")
    with pytest.raises(UserError, match="already"):
        export_diffusers(tiny, tmp_path / "out")
    with pytest.raises(UserError, match="converted model already"):
        import_model(tmp_path / "out", tmp_path / "again")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.txt").write_text("mine")
    for write in (import_model, export_diffusers):
        with pytest.raises(UserError, match=r"not empty|already there"):
            write(tiny, tmp_path / "busy")
    assert (tmp_path / "busy" / "thesis.txt").read_text() == "mine"


# Digests.


def test_the_digest_is_of_the_content_alone(tiny, tmp_path, monkeypatch):
    import_model(tiny, tmp_path / "model")
    export_diffusers(tmp_path / "model", tmp_path / "shards", max_shard=100_000)
    export_single(tiny, tmp_path / "one.safetensors")
    memo = tmp_path / "memo" / "digests.json"
    digests = set()
    for folder in (tiny, tmp_path / "model", tmp_path / "shards"):
        stored = open_stored(folder / "transformer", TRANSFORMER)
        digests.add(source_digest(stored, folder / "transformer", memo))
        digests.add(digest(stored.tensors))
    stored = open_stored(tiny / "transformer", TRANSFORMER, tmp_path / "one.safetensors")
    digests.add(source_digest(stored, tiny / "transformer", memo))
    assert len(digests) == 1
    memo_calls = []
    monkeypatch.setattr(
        "dopsd_jax.weights.digest.digest", lambda tensors: memo_calls.append(1) or "new"
    )
    stored = open_stored(tiny / "transformer", TRANSFORMER)
    assert source_digest(stored, tiny / "transformer", memo) in digests
    assert not memo_calls
    (file,) = (tmp_path / "shards" / "transformer").glob("*-00001-*")
    file.touch()
    stored = open_stored(tmp_path / "shards" / "transformer", TRANSFORMER)
    assert source_digest(stored, tmp_path / "shards" / "transformer", memo) == "new"
    memo.write_text("{")  # a broken memo is only a memo
    assert source_digest(stored, tmp_path / "shards" / "transformer", memo) == "new"


def test_one_number_changes_the_digest(tiny, tmp_path):
    before = digest(open_stored(tiny / "transformer", TRANSFORMER).tensors)
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    value = tensors["t_embedder.mlp.2.weight"][5]
    value[3] = np.nextafter(value[3], np.float32(9))
    save_file(tensors, file)
    assert digest(open_stored(model / "transformer", TRANSFORMER).tensors) != before


# Memory.

MEMORY = """
import json, resource, sys
from pathlib import Path
from dopsd_jax.weights.importing import import_model
from dopsd_jax.weights.export import export_diffusers
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
warm, model, out, part = sys.argv[1:]
run = lambda source, name: (
    import_model(Path(source), Path(out) / name, part_bytes=int(part)),
    export_diffusers(Path(out) / name, Path(out) / f"{name}-back"),
)
run(warm, "warm")  # loads the libraries' code and threads
before = peak()
run(model, "model")
print(json.dumps(peak() - before))
"""


def test_memory_stays_in_proportion(tmp_path):
    """4 GiB of 24.6 GB, in proportion: here 400 MB, whose largest layer has the true one's share.

    The libraries' own fixed cost is not counted: a first small conversion pays it.
    """
    config = ZImageConfig(
        dim=480,
        layers=30,
        heads=10,
        caption_dim=320,
        axes_dims=(16, 16, 16),
        axes_lens=(64, 64, 64),
    )
    warm, model = (make_tiny(tmp_path / "in" / m, size=SMALL) for m in ("warm", "model"))
    folder = model / "transformer"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shapes = sources(names(config))
    save_file(
        {n: np.zeros(s, np.float32) for n, s in shapes.items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
    size = 4 * sum(math.prod(s) for s in shapes.values())
    assert size > 380e6
    share = size / 24.62e9
    growth = int(_python("-c", MEMORY, warm, model, tmp_path, int(converted.PART_BYTES * share)))
    assert growth < 4 * 2**30 * share


# The command line.


def _tool(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools" / "convert_weights.py"), run_name="__main__")
    out = capsys.readouterr()
    return caught.value.code, out.out, out.err


def test_the_tool_goes_all_the_way_round(tiny, tmp_path, monkeypatch, capsys):
    tool = lambda *args: _tool(monkeypatch, capsys, *args)
    count = len(TensorFiles.open(tiny / "transformer").infos)
    assert tool("import", tiny, tmp_path / "c")[0] == 0
    code, out, _ = tool("inspect", tmp_path / "c")
    assert code == 0 and "converted model, family zimage" in out
    assert f"transformer: {count} tensors" in out and "vlm:" in out
    assert tool("export", tmp_path / "c", tmp_path / "x.safetensors", "--format", "comfyui")[0] == 0
    code, out, _ = tool("inspect", tmp_path / "x.safetensors", "--model", tiny)
    assert code == 0 and "transformer in comfyui names: complete" in out
    args = ("import", tmp_path / "x.safetensors", tmp_path / "d", "--base", tiny)
    assert tool(*args)[0] == 0
    assert tool("export", tmp_path / "d", tmp_path / "e")[0] == 0
    assert _tensors(tmp_path / "e" / "transformer") == _tensors(tiny / "transformer")
    code, _, err = tool("inspect", tmp_path / "e")
    assert code == 0 and not err


@pytest.mark.parametrize(
    "args, message",
    [
        (["import", "nowhere/at/all", "out"], "no such folder, and not a hub id"),
        (["import", "{tiny}/model_index.json", "out"], "--base"),
        (["import", "{tiny}", "out", "--base", "{tiny}"], "--base goes with a single file"),
        (["export", "{tiny}/vae", "out"], "neither model_index.json nor dopsd_jax.json"),
        (["export", "{tiny}", "out", "--lora", "no.safetensors"], "no such file"),
        (["inspect", "nowhere"], "no such file"),
    ],
)
def test_the_tools_errors_are_clear_lines(tiny, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = _tool(monkeypatch, capsys, *(a.format(tiny=tiny) for a in args))
    assert code == 2
    assert err.startswith("error: ") and message in err
    assert "Traceback" not in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[], ["import"], ["export"], ["merge"], ["lora"], ["inspect"]])
def test_the_tool_explains_itself(monkeypatch, capsys, command):
    code, out, _ = _tool(monkeypatch, capsys, *command, "--help")
    assert code == 0 and "usage" in out


def test_the_import_counts_every_byte(tiny, tmp_path):
    progress = Interrupt(-1)
    import_model(tiny, tmp_path / "out", progress=progress)
    stored = importing.open_all(tiny, vlm=tiny / "vlm")
    expected = sum(i.nbytes for _, _, s in stored.values() for i in s.tensors.infos.values())
    assert progress.done == progress.total == expected
