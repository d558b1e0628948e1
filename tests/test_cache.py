import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from conftest import left_by_killed
from PIL import Image

from dopsd_jax.common.errors import UserError
from dopsd_jax.conditioning.cached import CachedFeatures
from dopsd_jax.config.loading import load
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.cache import FeatureCache, feature_key
from dopsd_jax.data.measure import measure
from dopsd_jax.data.padding import pad_stack, padded_length
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.views import views_of
from dopsd_jax.families.base import TEACHER
from dopsd_jax.methods.method import Needs

BASE = {
    "role": "teacher",
    "prompt": "a red cube",
    "encoder": "e" * 64,
    "options": {"template": "clean", "max_length": 512},
    "pictures": [("f" * 64, "cover:64x64")],
}


def arrays(seed=0, n=5):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, 8)).astype(np.float32)
    return {
        "features": features.astype(ml_dtypes.bfloat16),
        "exact": features,
        "length": np.array(n, np.int32),
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_keys_depend_on_every_part_and_on_nothing_else():
    changed = {
        "role": "student",
        "prompt": "a red cube ",
        "encoder": "d" * 64,
        "options": {"template": "doubled", "max_length": 512},
        "pictures": [("0" * 64, "cover:64x64")],
    }
    keys = {feature_key(**BASE)} | {feature_key(**BASE | {k: v}) for k, v in changed.items()}
    ((image, crop),) = BASE["pictures"]
    for pictures in ([], [(image, "cover:64x48")], [(image, crop), ("0" * 64, crop)]):
        keys.add(feature_key(**BASE | {"pictures": pictures}))
    assert len(keys) == 9
    turned = dict(reversed(BASE["options"].items()))
    assert feature_key(**BASE | {"options": turned}) == feature_key(**BASE)


# What a run has at first, and what another one may have in its place.
PARTS = {
    "caption": ("a dog", "a cat"),
    "shade": (90, 80),
    "mask": (255, 200),
    "bucket": ((64, 64), (48, 64)),
    "mirrored": (False, True),
    "text_encoder": ("t", "T"),
    "vlm": ("v", "V"),
    "vae": ("a", "A"),
    "dtype": ("float32", "bfloat16"),
    "said": ("", "x"),
    "factor": (8, 16),
}
PICTURE = {"shade", "bucket", "mirrored"}
DEPENDS = {
    "student": {"caption", "text_encoder", "dtype"},
    "teacher": {"caption", "text_encoder", "vlm", "dtype", "said", *PICTURE},
    "latent": {"vae", "dtype", *PICTURE},
    "mask": {"mask", "factor", *PICTURE},
}


def entries(folder, **changed):
    """Where a run keeps what belongs to its one picture, by what it is."""
    own = SimpleNamespace(**{name: value for name, (value, _) in PARTS.items()} | changed)
    folder.mkdir()
    Image.new("RGB", (64, 64), (own.shade,) * 3).save(folder / "a.png")
    mask = np.full((64, 64), own.mask, np.uint8)
    mask[:32] = 0
    Image.fromarray(mask).save(folder / "a_mask.png")
    (folder / "a.txt").write_text(own.caption)
    rows = load_rows(folder, masks=True, views=views_of(mirrored=True))
    pipe = SimpleNamespace(
        ENCODERS=(("text_encoder",), ("text_encoder", "vlm")),
        part_digest=lambda name, memo: getattr(own, name),
        options=lambda role, teacher: {"said": own.said} if role == TEACHER else {},
        family=SimpleNamespace(CONTEXTS={"vlm": True}),
        vae_config=SimpleNamespace(factor=own.factor),
    )
    config = load("zimage:random", {"dtype": own.dtype})
    data = measure(rows, [Bucket(*own.bucket)], masked="files")
    store = CachedFeatures(pipe, data, config, folder, Needs(teacher=True, target=True))
    row = int(own.mirrored)
    texts = {name: store.key((row, 0), role) for role, name in enumerate(("student", "teacher"))}
    return texts | {"latent": store.latent_key(row), "mask": store.mask_key(row)}


def test_what_a_run_keeps_has_another_place_for_whatever_it_depends_on(tmp_path):
    """And the same for all else: nothing is computed twice."""
    first = entries(tmp_path / "first")
    assert len(set(first.values())) == 4
    for name, (_, value) in PARTS.items():
        other = entries(tmp_path / name, **{name: value})
        for kind, parts in DEPENDS.items():
            assert (other[kind] != first[kind]) == (name in parts), (kind, name)


def test_keys_are_the_same_in_another_process():
    code = f"from dopsd_jax.data.cache import feature_key; print(feature_key(**{BASE!r}))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == feature_key(**BASE)


def test_what_is_put_is_got_bit_for_bit(tmp_path):
    cache = FeatureCache(tmp_path / "deep/cache", report=pytest.fail)
    key = feature_key(**BASE)
    assert cache.get(key) is None and cache.shapes(key) is None
    cache.put(key, arrays())
    assert_same(cache.get(key), arrays())
    assert_same(FeatureCache(tmp_path / "deep/cache").load(key), arrays())
    assert cache.shapes(key) == {"features": (5, 8), "exact": (5, 8), "length": ()}
    assert cache.path(key).parent.name == key[:2]
    cache.put(key, arrays(1))
    assert_same(cache.get(key), arrays(1))


def test_arrays_may_be_views(tmp_path):
    cache = FeatureCache(tmp_path)
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    cache.put("k" * 64, {"x": whole.T[::2]})
    assert_same(cache.get("k" * 64), {"x": np.ascontiguousarray(whole.T[::2])})


def test_other_types_are_a_bug(tmp_path):
    for wrong in (np.zeros(3), np.zeros((0, 3), np.float32), np.array(["x"])):
        with pytest.raises(ValueError):
            FeatureCache(tmp_path).put("k" * 64, {"x": wrong})


def test_missing_tells_what_is_to_be_computed(tmp_path):
    lines = []
    cache = FeatureCache(tmp_path, report=lines.append)
    keys = [feature_key(**BASE | {"prompt": str(i)}) for i in range(6)]
    for key in keys[:4]:
        cache.put(key, arrays())
    cache.path(keys[1]).write_bytes(cache.path(keys[1]).read_bytes()[:-1])
    cache.path(keys[2]).write_bytes(b"")
    left = left_by_killed(cache.path(keys[0]))
    left.touch()
    assert cache.missing([*keys, *keys]) == [keys[1], keys[2], keys[4], keys[5]]
    assert not left.exists()
    assert len(lines) == 2 and all("damaged" in line and "removed" in line for line in lines)


def test_missing_finds_all_damage_at_once(tmp_path):
    cache = FeatureCache(tmp_path, lambda line: None)
    keys = [feature_key(**BASE | {"prompt": str(i)}) for i in range(4)]
    for i, key in enumerate(keys):
        cache.put(key, arrays(i))
    for key in keys[1:3]:  # bits of the values: the header is whole
        content = bytearray(cache.path(key).read_bytes())
        content[-5] ^= 1
        cache.path(key).write_bytes(content)
    assert cache.missing(keys) == keys[1:3]


def test_no_damage_goes_unseen(tmp_path):
    lines = []
    cache = FeatureCache(tmp_path, report=lines.append)
    key = feature_key(**BASE)
    cache.put(key, arrays())
    whole = cache.path(key).read_bytes()
    rng = np.random.default_rng(0)
    cuts = [whole[:n] for n in rng.integers(0, len(whole), 40)]
    flips = []
    for place in rng.integers(0, len(whole), 200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        flips.append(bytes(flipped))
    for i, content in enumerate(cuts + flips):
        cache.path(key).write_bytes(content)
        before = len(lines)
        found = cache.get(key)
        if found is not None:  # a changed space in the header changes nothing
            assert_same(found, arrays())
            continue
        assert len(lines) == before + 1, i
        assert not cache.path(key).exists()
    assert len(lines) > 220


def test_an_entry_under_the_name_of_another_is_damage(tmp_path):
    lines = []
    cache = FeatureCache(tmp_path, report=lines.append)
    cache.put("a" * 64, arrays())
    cache.path("b" * 64).parent.mkdir()
    cache.path("a" * 64).rename(cache.path("b" * 64))
    assert cache.get("b" * 64) is None
    assert "belongs to another key" in lines[0]


def test_an_entry_that_must_be_there_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="start the run again"):
        FeatureCache(tmp_path).load("a" * 64)


def test_concurrent_writers_and_readers_see_whole_entries(tmp_path):
    key = feature_key(**BASE)
    expected = arrays(n=4000)
    failures = []

    def work():
        cache = FeatureCache(tmp_path, report=failures.append)
        for _ in range(15):
            cache.put(key, expected)
            found = cache.get(key)
            if found is None or found["exact"].tobytes() != expected["exact"].tobytes():
                failures.append("half an entry")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [p.name for p in cache_files(tmp_path)] == [f"{key}.safetensors"]


def cache_files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_full_disk_is_told_and_harms_nothing(tmp_path):
    cache = FeatureCache(tmp_path, report=pytest.fail)
    key, other = (feature_key(**BASE | {"prompt": p}) for p in "ab")
    cache.put(key, arrays())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for target in (key, other):
            with pytest.raises(UserError, match="no space left for cached features"):
                cache.put(target, arrays(n=4000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert_same(cache.get(key), arrays())
    assert cache.get(other) is None
    assert len(cache_files(tmp_path)) == 1


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        FeatureCache(tmp_path / "file/cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match="cannot be written"):
        FeatureCache(tmp_path / "cache")
    tmp_path.chmod(stat.S_IRWXU)


# --- padding


def test_lengths_come_from_a_small_set():
    assert [padded_length(n, 64, 300) for n in (1, 64, 65, 256, 257, 300)] == [
        64, 64, 128, 256, 300, 300,
    ]  # fmt: skip
    assert len({padded_length(n, 128, 512) for n in range(1, 513)}) == 4
    for wrong in (0, 301):
        with pytest.raises(ValueError):
            padded_length(wrong, 64, 300)


def test_features_are_stacked_with_zeros_behind():
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((n, 4)).astype(ml_dtypes.bfloat16) for n in (3, 8, 1)]
    stacked, lengths = pad_stack(features, 8)
    assert stacked.shape == (3, 8, 4) and stacked.dtype == ml_dtypes.bfloat16
    assert lengths.tolist() == [3, 8, 1] and lengths.dtype == np.int32
    for one, n, feature in zip(stacked, lengths, features, strict=True):
        np.testing.assert_array_equal(one[:n], feature)
        assert not one[n:].astype(np.float32).any()
    with pytest.raises(ValueError):
        pad_stack(features, 7)
