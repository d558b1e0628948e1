"""Weight files as people have them: quantised, compiled, several networks in one, none at all."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from weights_helpers import SMALL, TRANSFORMER, same_modules, tensors_of

from dopsd_jax import convert
from dopsd_jax.common.errors import UserError
from dopsd_jax.conversion.export import export_single
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.conversion.inspection import inspect
from dopsd_jax.families.zimage.networks import ZIMAGE
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights import hub
from dopsd_jax.weights.found_files import Dequantised
from dopsd_jax.weights.load import load_component
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.safetensors_write import write_safetensors
from dopsd_jax.weights.stored import open_stored
from dopsd_jax.weights.tensors import ArrayTensors

F8 = ml_dtypes.float8_e4m3fn


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("found") / "model", size=SMALL)


@pytest.fixture(scope="module")
def native(model, tmp_path_factory):
    """The transformer as a ComfyUI file has it."""
    path = tmp_path_factory.mktemp("native") / "x.safetensors"
    export_single(model, path, dtype="BF16")
    return load_file(path)


def _save(path, arrays):
    tensors = ArrayTensors({name: np.asarray(array) for name, array in arrays.items()})
    write_safetensors(path, tensors.infos, tensors.read)
    return path


def _large(name, array):
    return array.ndim == 2 and (".attention." in name or ".feed_forward." in name)


def _plain(native):
    return {n: a.astype(F8) if _large(n, a) else a for n, a in native.items()}, {}


def _scaled(native):
    arrays, extra = {}, {"scaled_fp8": np.zeros(2, F8)}
    for name, array in native.items():
        arrays[name] = array
        if _large(name, array):
            scale = np.abs(array.astype(np.float32)).max() / np.float32(448)
            arrays[name] = (array.astype(np.float32) / scale).astype(F8)
            extra[name.replace(".weight", ".scale_weight")] = scale.reshape(1)
            extra[name.replace(".weight", ".scale_input")] = np.ones(1, np.float32)
    return arrays, extra


def _comfy(native, kind="float8_e4m3fn"):
    arrays, extra = _scaled(native)
    about = np.frombuffer(json.dumps({"format": kind}).encode(), np.uint8)
    extra = {
        n.replace(".scale_weight", ".weight_scale"): a.reshape(())
        for n, a in extra.items()
        if n.endswith(".scale_weight")
    }
    extra |= {n.replace(".weight_scale", ".comfy_quant"): about for n in list(extra)}
    return arrays, extra


@pytest.mark.parametrize("quantise", [_plain, _scaled, _comfy])
def test_eight_bit_files_are_dequantised(model, native, tmp_path, quantise):
    arrays, extra = quantise(native)
    path = _save(tmp_path / "x.safetensors", arrays | extra)
    args = ["import", str(path), str(tmp_path / "out"), "--base", str(model)]
    parsed = convert.parser("convert").parse_args(args)
    parsed.run(parsed)
    expected = {}
    for name, array in arrays.items():
        scale = extra.get(name.replace(".weight", ".scale_weight"))
        scale = extra.get(name.replace(".weight", ".weight_scale"), 1) if scale is None else scale
        wide = array.astype(np.float32) * np.asarray(scale, np.float32)
        expected[name] = wide.astype(ml_dtypes.bfloat16)
    export_single(tmp_path / "out", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == expected.keys()
    assert all(np.array_equal(back[name], expected[name]) for name in back)


def test_other_quantisations_are_named(model, native, tmp_path):
    arrays, extra = _comfy(native, "nvfp4")
    path = _save(tmp_path / "x.safetensors", arrays | extra)
    with pytest.raises(UserError, match="quantised as nvfp4"):
        open_stored(model / "transformer", TRANSFORMER, path)
    arrays, extra = _scaled(native)
    extra = {n: np.zeros((3, 5), np.float32) if "scale_w" in n else a for n, a in extra.items()}
    path = _save(tmp_path / "y.safetensors", arrays | extra)
    with pytest.raises(UserError, match="is not a scale of"):
        open_stored(model / "transformer", TRANSFORMER, path)


def test_numbers_alone_may_have_a_scale(tmp_path):
    scales = {"a": np.ones((), np.float32), "b": np.full(1, 2, np.float32), "c": np.ones((1, 1))}
    arrays = {f"{name}.weight": np.full((), 1.5, F8) for name in "abd"}
    arrays["c.weight"] = np.full(1, 1.5, F8)
    arrays |= {f"{n}.scale_weight": scale.astype(np.float32) for n, scale in scales.items()}
    found = Dequantised(TensorFiles.open(_save(tmp_path / "x.safetensors", arrays)))
    read = {name: found.read(f"{name}.weight") for name in "abcd"}
    assert [x.item() for x in read.values()] == [1.5, 3, 1.5, 1.5]
    assert all(x.shape == found.infos[f"{name}.weight"].shape for name, x in read.items())


def test_all_networks_are_found_in_one_file(model, native, tmp_path, capsys):
    arrays = {f"model.diffusion_model.{n}": a for n, a in native.items()}
    encoder = load_file(model / "text_encoder" / "model.safetensors")
    arrays |= {f"text_encoders.qwen3_4b.transformer.{n}": a for n, a in encoder.items()}
    (file,) = (model / "vae").glob("*.safetensors")
    arrays |= {f"vae.{n}": a for n, a in load_file(file).items()}
    arrays["text_encoders.qwen3_4b.logit_scale"] = np.ones((), np.float32)  # ComfyUI saves it
    arrays |= {"clip_vision.x": np.ones(2, np.float32), "scaled_fp8": np.ones(2, np.float32)}
    path = _save(tmp_path / "all.safetensors", arrays)
    base = tmp_path / "base"  # its own weights must not be needed
    shutil.copytree(model, base)
    for component in ("transformer", "text_encoder", "vae"):
        for file in (base / component).glob("*.safetensors"):
            file.unlink()
    args = ["import", str(path), str(tmp_path / "out"), "--base", str(base)]
    parsed = convert.parser("convert").parse_args(args)
    parsed.run(parsed)
    assert "1 tensors belong to none of its networks" in (said := capsys.readouterr().out)
    assert "'clip_vision.x'" in said
    for component in ("text_encoder", "vae"):
        theirs = open_stored(model / component, _network(component)).tensors
        ours = open_stored(tmp_path / "out" / component, _network(component)).tensors
        assert all(np.array_equal(ours.read(n), theirs.read(n)) for n in theirs.infos)
    lines = list(inspect(path, model))
    assert any("several networks: text_encoder, transformer, vae" in line for line in lines)
    assert sum("complete" in line for line in lines) == 3


def _network(component):
    from dopsd_jax.families.zimage.networks import NETWORKS

    return NETWORKS[component]


def _changed(model, tmp_path, change):
    copy = tmp_path / "changed"
    shutil.copytree(model, copy)
    (file,) = (copy / "transformer").glob("*.safetensors")
    _save(file, change(load_file(file)))
    return copy


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {f"_orig_mod.{n}": a for n, a in t.items()},
        lambda t: {n.replace("layers.0.", "layers.0._orig_mod."): a for n, a in t.items()},
        lambda t: {n: a.reshape(-1) if "pad_token" in n else a for n, a in t.items()},
    ],
)
def test_names_of_compiled_models_and_flat_pad_tokens_are_read(model, tmp_path, change):
    copy = _changed(model, tmp_path, change)
    same_modules(
        load_component(model / "transformer", TRANSFORMER),
        load_component(copy / "transformer", TRANSFORMER),
    )


def test_mixed_half_types_are_read_exactly(model, tmp_path):
    def change(tensors):
        kinds = np.float16, ml_dtypes.bfloat16
        return {n: a.astype(kinds[i % 2]) for i, (n, a) in enumerate(sorted(tensors.items()))}

    copy = _changed(model, tmp_path, change)
    (file,) = (copy / "transformer").glob("*.safetensors")
    stored = open_stored(copy / "transformer", TRANSFORMER)
    files = TensorFiles.open(file)
    for name, info in stored.tensors.infos.items():
        assert info.dtype == "F32"
        exact = files.read(name).astype(np.float32)
        assert np.array_equal(stored.tensors.read(name), exact)
    load_component(copy / "transformer", TRANSFORMER)
    import_model(copy, tmp_path / "out")
    assert tensors_of(copy / "vae") == tensors_of(model / "vae")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "saved web page"),
        (b"GGUF\3\0\0\0" + bytes(100), "GGUF file"),
        (b"PK\3\4" + bytes(100), "pickle"),
        (b"\x80\2}q\0" + bytes(100), "pickle"),
    ],
)
def test_what_is_no_safetensors_file_is_called_by_its_name(model, tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        TensorFiles.open(path)
    with pytest.raises(UserError, match=message):
        list(inspect(path))


def test_a_byte_order_mark_in_a_config_is_read(model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    path = copy / "transformer" / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert open_stored(copy / "transformer", TRANSFORMER).config.dim


def test_a_single_file_as_a_model_names_the_import(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"convert import .* --base"):
        hub.resolve(tmp_path / "x.safetensors")
    with pytest.raises(UserError):
        hub.resolve("a" * 5000)


def _variant(folder):
    (file,) = (folder / "transformer").glob("*.safetensors")
    file.rename(file.with_suffix(".bf16.safetensors"))


def _tied_head(folder):
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    _save(file, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})


def _bare_names(folder):
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    _save(file, {n.removeprefix("model."): a for n, a in load_file(file).items()})


def _new_field(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_field": None}))


@pytest.mark.parametrize("change", [_variant, _tied_head, _bare_names, _new_field])
def test_what_savers_add_or_leave_out_changes_nothing(model, tmp_path, change):
    folder = shutil.copytree(model, tmp_path / "model")
    change(folder)
    for name in ("transformer", "text_encoder"):
        ours, expected = (open_stored(f / name, ZIMAGE[name]) for f in (folder, model))
        assert ours.config == expected.config
        same_modules(load_component(folder / name, ZIMAGE[name]),
                     load_component(model / name, ZIMAGE[name]))  # fmt: skip
