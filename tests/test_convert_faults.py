"""Wrong, damaged and interrupted conversions, and the digest of what was converted."""

import errno
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weights_helpers import (
    SMALL,
    TRANSFORMER,
    Interrupt,
    same_modules,
    tensors_of,
)

from dopsd_jax.common.errors import UserError
from dopsd_jax.conversion.export import export_diffusers, export_single
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.conversion.inspection import inspect
from dopsd_jax.families.zimage.networks import ZIMAGE
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights import converted
from dopsd_jax.weights.digest import digest
from dopsd_jax.weights.load import load_component
from dopsd_jax.weights.stored import open_stored, source_digest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("tiny") / "model", size=SMALL)


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
    assert tensors_of(tmp_path / "out" / "transformer") == tensors_of(tiny / "transformer")


def test_an_import_goes_on_only_with_its_own_source(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        import_model(tiny, tmp_path / "cut", progress=Interrupt(3))
    with pytest.raises(UserError, match="another source"):
        import_model(tiny, tmp_path / "cut", dtype="BF16")
    other = write_random_model(tmp_path / "other", seed=1, size=SMALL)
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
    same_modules(
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
        digests.add(source_digest(stored, memo))
        digests.add(digest(stored.tensors))
    stored = open_stored(tiny / "transformer", TRANSFORMER, tmp_path / "one.safetensors")
    digests.add(source_digest(stored, memo))
    assert len(digests) == 1
    memo_calls = []
    monkeypatch.setattr(
        "dopsd_jax.weights.digest.digest", lambda tensors: memo_calls.append(1) or "new"
    )
    stored = open_stored(tiny / "transformer", TRANSFORMER)
    assert source_digest(stored, memo) in digests
    assert not memo_calls
    (file,) = (tmp_path / "shards" / "transformer").glob("*-00001-*")
    file.touch()
    stored = open_stored(tmp_path / "shards" / "transformer", TRANSFORMER)
    assert source_digest(stored, memo) == "new"
    memo.write_text("{")  # a broken memo is only a memo
    assert source_digest(stored, memo) == "new"


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


# What was converted is compared with its digests as it is read.


def _flip(folder):
    """One bit of the numbers of a layer."""
    for file in (folder / "parts").glob("layers.0001.*/state/**/d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def _exchange(folder):
    one, two = ((folder / "parts" / f"layers.000{i}.0") for i in (0, 1))
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's threads
@pytest.mark.parametrize("damage", [_flip, _exchange])
def test_changed_numbers_are_noticed_and_their_part_is_named(tiny, tmp_path, damage):
    import_model(tiny, tmp_path / "out")
    assert not any("faults" in line for line in inspect(tmp_path / "out", verify=True))
    damage(tmp_path / "out" / "transformer")
    for read in (
        lambda: load_component(tmp_path / "out" / "transformer", TRANSFORMER),
        lambda: export_single(tmp_path / "out", tmp_path / "x.safetensors"),
    ):
        with pytest.raises(UserError, match=r"parts/layers\.000\d\.0: is damaged"):
            read()
    lines = list(inspect(tmp_path / "out", verify=True))
    assert any("parts/layers.0001.0: is damaged" in line for line in lines)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_model_with_numbers_that_are_not_finite_is_refused(tiny, tmp_path, value):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["layers.1.feed_forward.w1.weight"][3, 2] = value
    save_file(tensors, file)
    for read in (
        lambda: load_component(model / "transformer", TRANSFORMER),
        lambda: import_model(model, tmp_path / "out"),
        lambda: export_single(model, tmp_path / "x.safetensors"),
    ):
        with pytest.raises(UserError, match=r"w1\.weight' holds numbers that are not finite"):
            read()
    assert any("not finite" in line for line in inspect(model, verify=True))


def test_numbers_beyond_the_type_to_write_are_named(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["layers.1.feed_forward.w1.weight"][0, 0] = 1e6
    save_file(tensors, file)
    with pytest.raises(UserError, match="or they are beyond F16"):
        export_single(model, tmp_path / "x.safetensors", dtype="F16")
