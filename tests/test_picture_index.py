"""A second start opens only what is new, and finds the same."""

import json
import math
import os

import pytest
from PIL import Image

from dopsd_jax.common.errors import UserError
from dopsd_jax.data import picture_index
from dopsd_jax.data.buckets import make_buckets, nearest
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.data.images import ImageLimits
from dopsd_jax.data.measure import measure
from dopsd_jax.data.picture_index import Infos, PictureIndex
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.sources.captions import KNOWN_KEYS
from dopsd_jax.data.strings import Strings
from dopsd_jax.data.table import Table

BUCKETS = make_buckets(64)


@pytest.fixture
def folder(tmp_path):
    """Four pictures that were written an hour ago."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(4):
        mode, colour = ("RGBA", (i, 0, 0, 9)) if i == 3 else ("RGB", (i, 0, 0))
        Image.new(mode, (64 + 16 * i, 64), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
        os.utime(folder / f"{i}.png", (1e9, 1e9))
    return folder


def look(folder, cache, **options):
    """The measured data set, and how many pictures were opened for it."""
    index = PictureIndex(cache, "set")
    return measure(load_rows(folder), BUCKETS, index=index, **options), index.opened


def test_a_second_start_opens_nothing_and_finds_the_same(folder, tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    first, opened = look(folder, cache)
    again, opened_again = look(folder, cache)
    assert (opened, opened_again) == (4, 0)
    assert list(again.infos) == list(first.infos) == list(measure(load_rows(folder), BUCKETS).infos)
    assert again.notes == first.notes and "transparency" in again.notes[0]
    assert again.digest() == first.digest() and again.buckets == first.buckets


def test_changed_and_new_pictures_are_opened(folder, tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    first, _ = look(folder, cache)
    Image.new("RGB", (64, 64), (9, 9, 9)).save(folder / "0.png")
    os.utime(folder / "0.png", (1e9 + 1, 1e9 + 1))
    (folder / "1.png").rename(folder / "8.png")
    (folder / "1.txt").rename(folder / "8.txt")
    now, opened = look(folder, cache)
    assert opened == 2 and now.digest() != first.digest()
    assert now.digest() == measure(load_rows(folder), BUCKETS).digest()
    _, opened = look(folder, cache, limits=ImageLimits(max_pixels=10**7))
    assert opened == 4  # other limits: every picture is looked at anew


def test_a_picture_that_was_just_written_is_not_trusted(folder, tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    os.utime(folder / "2.png")
    assert look(folder, cache)[1] == 4
    assert look(folder, cache)[1] == 1


def test_what_a_stopped_start_found_is_kept(folder, tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    look(folder, cache)
    Image.new("RGB", (64, 64)).save(folder / "0.png")  # newer, so looked at, and then damaged
    (folder / "0.png").write_bytes(b"damaged")
    with pytest.raises(UserError):
        look(folder, cache)
    (folder / "0.png").unlink()
    (folder / "0.txt").unlink()
    assert look(folder, cache)[1] == 0


def test_a_damaged_index_is_made_anew(folder, tmp_path):
    lines = []
    cache = FeatureCache(tmp_path / "cache", report=lines.append)
    first, _ = look(folder, cache)
    (stored,) = (tmp_path / "cache").rglob("*.safetensors")
    content = bytearray(stored.read_bytes())
    content[-20] ^= 1
    stored.write_bytes(content)
    again, opened = look(folder, cache)
    assert opened == 4 and "damaged" in lines[0] and again.digest() == first.digest()


def test_long_lists_of_pictures_are_looked_at_in_pieces(folder, monkeypatch, capsys):
    monkeypatch.setattr("dopsd_jax.data.measure._AT_ONCE", 3)
    monkeypatch.setattr("dopsd_jax.common.progress.LINE_SECONDS", 0.0)
    dataset = measure(load_rows(folder), BUCKETS)
    assert [info.width for info in dataset.infos] == [64, 80, 96, 112]
    assert "looking at pictures 3/4" in capsys.readouterr().out


def test_columns_give_back_what_was_put_in(folder):
    strings = ["", "a", "日本", "b\udce9"]  # the last: a file name that is no UTF-8
    assert list(Strings(strings)) == strings and Strings(strings)[-2] == "日本"
    table = Table(KNOWN_KEYS, "d.jsonl")
    table.append("x/a.png", [("short_en", "a"), ("caption", "b")], line=7, size=(30, 40))
    table.append("x/b.png", [("caption", "c")])
    assert table[0].where == "d.jsonl:7" and table[1].where == "x/b.png"
    assert table.declared_sizes([1, 0]).tolist() == [[0, 0], [30, 40]]
    assert table[0].captions == (("short_en", "a"), ("caption", "b"))
    assert table.only(("caption",))[0].captions == (("caption", "b"),)
    assert [row.where for row in table.only(("caption",))] == [row.where for row in table]
    with pytest.raises(IndexError):
        table[2]
    infos = measure(load_rows(folder), BUCKETS).infos
    assert list(Infos.from_arrays(infos.arrays())) == list(infos)
    assert json.loads(infos.arrays()["kinds"].tobytes()) == [[], ["transparency laid on white"]]
    assert picture_index.SETTLED > 0


def test_the_nearest_bucket_is_exact():
    """Against the definition in logarithms, and with ties to the first."""
    for width in range(20, 200, 7):
        for height in range(20, 200, 11):
            apart = {b: abs(math.log(width / height * b.height / b.width)) for b in BUCKETS}
            assert apart[nearest(width, height, BUCKETS)] <= min(apart.values()) + 1e-12
    square, wide, tall = BUCKETS[0], (32, 16), (16, 32)
    assert nearest(1, 1, (type(square)(*wide), type(square)(*tall))) == wide
