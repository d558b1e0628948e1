"""Reading and writing safetensors: against the reference library, and against damage."""

import errno
import json
import struct
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dopsd_jax.common import atomic
from dopsd_jax.common.errors import UserError
from dopsd_jax.weights.safetensors_io import TensorFiles, read_header
from dopsd_jax.weights.safetensors_write import write_safetensors, write_sharded
from dopsd_jax.weights.tensors import DTYPES, ArrayTensors


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "half": rng.standard_normal((3, 5)).astype(np.float16),
        "brain": rng.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16),
        "single": rng.standard_normal((7, 2)).astype(np.float32),
        "double": rng.standard_normal(4),
        "number": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "bytes": np.arange(5, dtype=np.uint8),
        "long": np.arange(-3, 3),
        "flags": np.array([True, False, True]),
    }


def _same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _write(path, arrays, **kwargs):
    tensors = ArrayTensors(arrays)
    write_safetensors(path, tensors.infos, tensors.read, **kwargs)
    return path


def test_reads_what_the_reference_library_writes(tmp_path, arrays):
    save_file(arrays, tmp_path / "x.safetensors", metadata={"who": "reference"})
    files = TensorFiles.open(tmp_path / "x.safetensors")
    assert files.metadata == {"who": "reference"}
    assert files.infos.keys() == arrays.keys()
    assert all(_same(files.read(name), array) for name, array in arrays.items())


def test_the_reference_library_reads_what_we_write(tmp_path, arrays):
    _write(tmp_path / "x.safetensors", arrays, metadata={"format": "pt"})
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == arrays.keys()
        for name, array in arrays.items():
            assert _same(file.get_tensor(name), array), name


def test_every_known_type_survives(tmp_path):
    arrays = {
        code: np.arange(6).astype(np.uint8).repeat(dtype.itemsize).view(dtype).reshape(2, 3)
        for code, dtype in DTYPES.items()
        if code != "BOOL"
    }
    files = TensorFiles.open(_write(tmp_path / "x.safetensors", arrays))
    assert all(_same(files.read(name), array) for name, array in arrays.items())
    assert all(files.infos[code].dtype == code for code in arrays)


def test_tensors_begin_at_multiples_of_their_item_size(tmp_path, arrays):
    header = read_header(_write(tmp_path / "x.safetensors", arrays))
    assert all(info.start % info.numpy.itemsize == 0 for info in header.tensors.values())


def test_rows_are_the_rows_of_the_whole(tmp_path, arrays):
    files = TensorFiles.open(_write(tmp_path / "x.safetensors", arrays))
    for rows in (slice(2, 5), slice(None, 3), slice(-2, None), slice(5, 2)):
        assert _same(files.read("single", rows), arrays["single"][rows])


# Damage. Each case: what is done to a good file, and what the message must say.


def _file(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _entry(**changes) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return json.dumps({"x": {k: v for k, v in entry.items() if v is not None}}).encode()


DATA = bytes(8)
GOOD = _file(_entry(), DATA)
TWO = b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[%s]%s}}'
DAMAGE = {
    "empty": (b"", "0 bytes"),
    "short": (b"\x01\x00", "too few"),
    "no header": (struct.pack("<Q", 50) + b"{}", "truncated"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "not a safetensors file"),
    "bad json": (_file(b'{"x": ', DATA), "not valid JSON"),
    "bad utf-8": (_file(b'{"\xff": 1}', DATA), "not valid JSON"),
    "deep json": (_file(b"[" * 100_000, b""), "not valid JSON"),
    "a list": (_file(b"[1]", DATA), "not a JSON object"),
    "twice": (_file(_entry()[:-1] + b"," + _entry()[1:], DATA), "'x' twice"),
    "metadata of numbers": (_file(b'{"__metadata__": {"a": 1}}', b""), "__metadata__"),
    "entry not a table": (_file(b'{"x": 3}', DATA), "does not hold exactly"),
    "no shape": (_file(_entry(shape=None), DATA), "does not hold exactly"),
    "one field more": (_file(_entry(stride=1), DATA), "does not hold exactly"),
    "unknown type": (_file(_entry(dtype="F4"), DATA), "type 'F4' is not one of"),
    "type not a string": (_file(_entry(dtype=[1]), DATA), "is not one of"),
    "negative size": (_file(_entry(shape=[-2]), DATA), "not a list of sizes"),
    "size true": (_file(_entry(shape=[True, 2]), DATA), "not a list of sizes"),
    "one offset": (_file(_entry(data_offsets=[8]), DATA), "not a range"),
    "offsets turned round": (_file(_entry(data_offsets=[8, 0]), DATA), "not a range"),
    "shape and bytes differ": (_file(_entry(shape=[3]), DATA), "8 bytes, but F32 [3] takes 12"),
    "huge shape": (_file(_entry(shape=[2**62, 2**62]), DATA), "8 bytes, but F32"),
    "truncated": (GOOD[:-3], "truncated: 8 bytes of data, 5 there"),
    "longer": (GOOD + b"xyz", "3 bytes behind the last tensor"),
    "gap at the start": (_file(_entry(data_offsets=[8, 16]), bytes(16)), "leaves a gap"),
    "gap": (_file(TWO % (b"2", b',"data_offsets":[6,8]'), DATA), "'y' leaves a gap"),
    "overlap": (_file(TWO % (b"6", b',"data_offsets":[2,8]'), DATA), "'y' overlaps"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path, case):
    content, message = DAMAGE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        TensorFiles.open(path)
    assert message in str(caught.value)
    assert all(str(path) in problem and "again" in problem for problem in caught.value.problems)


def test_every_cut_of_a_file_is_noticed(tmp_path, arrays):
    whole = _write(tmp_path / "x.safetensors", arrays).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(UserError):
            TensorFiles.open(tmp_path / "cut.safetensors")


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path, arrays):
    files = TensorFiles.open(_write(tmp_path / "x.safetensors", arrays))
    with open(tmp_path / "x.safetensors", "r+b") as file:
        file.truncate(files.infos["single"].start + 3)
    with pytest.raises(UserError, match="ends inside tensor 'single'"):
        files.read("single")


def test_all_faults_of_a_header_are_told_at_once(tmp_path):
    entries = {f"t{i}": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 1]} for i in range(5)}
    (tmp_path / "x.safetensors").write_bytes(_file(json.dumps(entries).encode(), b"\0"))
    with pytest.raises(UserError) as caught:
        TensorFiles.open(tmp_path / "x.safetensors")
    assert len(caught.value.problems) == 5


# Folders.


def _shards(folder, arrays, size=60):
    write_sharded(folder, "diffusion_pytorch_model", ArrayTensors(arrays), max_shard=size)


def test_shards_hold_everything_once_and_in_bounds(tmp_path, arrays):
    _shards(tmp_path, arrays)
    files = TensorFiles.open(tmp_path)
    assert len(files.files) > 2
    assert all(_same(files.read(name), array) for name, array in arrays.items())
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    assert set(index["weight_map"]) == set(arrays)
    count = len(files.files)
    assert {f.name for f in files.files} == {
        f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    }
    for file in files.files:
        total = sum(info.nbytes for info in read_header(file).tensors.values())
        assert total <= 60 or len(read_header(file).tensors) == 1


def test_one_shard_has_no_index(tmp_path, arrays):
    _shards(tmp_path, arrays, size=10**9)
    assert [f.name for f in tmp_path.iterdir()] == ["diffusion_pytorch_model.safetensors"]
    assert len(TensorFiles.open(tmp_path).infos) == len(arrays)


def _index(folder):
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_missing_and_damaged_shards_are_all_listed(tmp_path, arrays):
    _shards(tmp_path, arrays)
    first, second, third = sorted(tmp_path.glob("*-of-*"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    _write(third, {"stranger": np.zeros(3, np.float32)})
    with pytest.raises(UserError) as caught:
        TensorFiles.open(tmp_path)
    text = str(caught.value)
    assert f"{first}: missing" in text
    assert f"{second}: truncated" in text
    assert f"{third}: lacks tensor" in text
    assert f"{third}: tensor 'stranger' is not in" in text


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, arrays, shard):
    _write(tmp_path / "x.safetensors", arrays)
    (tmp_path / "in").mkdir()
    _shards(tmp_path / "in", arrays)
    path, index = _index(tmp_path / "in")
    index["weight_map"]["half"] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a plain"):
        TensorFiles.open(tmp_path / "in")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index_is_named(tmp_path, arrays, content):
    _shards(tmp_path, arrays)
    path, _ = _index(tmp_path)
    path.write_text(content)
    with pytest.raises(UserError, match=r"index\.json"):
        TensorFiles.open(tmp_path)


def test_folders_without_one_clear_file_are_refused(tmp_path, arrays):
    with pytest.raises(UserError, match="no such file"):
        TensorFiles.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no safetensors file"):
        TensorFiles.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickle"):
        TensorFiles.open(tmp_path)
    _write(tmp_path / "a.safetensors", arrays)
    assert TensorFiles.open(tmp_path).infos
    _write(tmp_path / "b.safetensors", arrays)
    with pytest.raises(UserError, match=r"a\.safetensors, b\.safetensors"):
        TensorFiles.open(tmp_path)
    _write(tmp_path / "model.safetensors", arrays)  # the name the libraries take
    assert TensorFiles.open(tmp_path).files[0].name == "model.safetensors"


def test_shards_without_an_index_are_refused(tmp_path, arrays):
    _shards(tmp_path, arrays)
    _index(tmp_path)[0].unlink()
    with pytest.raises(UserError, match="no index"):
        TensorFiles.open(tmp_path)


# Writing.


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path, arrays, monkeypatch):
    path = _write(tmp_path / "x.safetensors", {"old": np.ones(4, np.float32)})
    before = path.read_bytes()
    tensors = ArrayTensors(arrays)

    def produce(name):
        if name == "single":  # as the system tells it, in the middle of the file
            raise OSError(errno.ENOSPC, "No space left on device")
        return tensors.read(name)

    with pytest.raises(UserError, match="disk is full"):
        write_safetensors(path, tensors.infos, produce)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="free some space"):
        _write(path, arrays)
    assert path.read_bytes() == before


def test_an_interruption_leaves_the_old_file_and_no_rest(tmp_path, arrays):
    path = _write(tmp_path / "x.safetensors", {"old": np.ones(4, np.float32)})
    before = path.read_bytes()

    def produce(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, ArrayTensors(arrays).infos, produce)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_full_device_is_reported(arrays):
    with pytest.raises(UserError, match="disk is full"), atomic.atomic_file("/dev/shm/x") as file:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x" * 10)
        file.write(b"never")


def test_places_that_cannot_be_written_are_named(tmp_path, arrays):
    with pytest.raises(UserError, match="no such folder"):
        _write(tmp_path / "no" / "x.safetensors", arrays)
    with pytest.raises(UserError, match="is a folder"):
        _write(tmp_path, arrays)


def test_announced_and_produced_tensors_must_agree(tmp_path, arrays):
    infos = ArrayTensors(arrays).infos
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(tmp_path / "x.safetensors", infos, lambda name: np.zeros(1))
    assert not any(tmp_path.iterdir())
