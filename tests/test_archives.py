"""Rows inside tar and ArrayRecord files are the rows of the same data in a folder."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from conftest import problems_of
from PIL import Image

from dopsd_jax.data.buckets import make_buckets
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.data.images import open_image
from dopsd_jax.data.measure import measure
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.sources import array_record, tar

BUCKETS = make_buckets(64)


def png(number, size=(64, 48)):
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def add(archive, name, content, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            add(archive, name, content)
    return path


def sample(name, number=0, caption="a cat"):
    return [(f"{name}.png", png(number)), (f"{name}.txt", caption.encode())]


def write_folder(folder, count):
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.png").write_bytes(png(i))
        (folder / f"{i:03}.txt").write_text(f"picture {i}")
    return folder


def content(rows):
    """What training sees of rows, whatever they are in."""
    return [(row.captions, open_image(row.image).tobytes()) for row in rows.rows]


def test_archives_hold_what_a_folder_holds(tmp_path):
    folder = write_folder(tmp_path / "folder", 5)
    (tmp_path / "tars").mkdir()
    for shard, numbers in (("a", (0, 1, 2)), ("b", (3, 4))):
        members = [m for i in numbers for m in sample(f"set/{i:03}", i, f"picture {i}")]
        write_tar(tmp_path / f"tars/{shard}.tar", members)
    (tmp_path / "records").mkdir()
    array_record.write_array_record(
        tmp_path / "records/a.array_record",
        (({"caption": f"picture {i}"}, png(i)) for i in range(5)),
    )
    expected = load_rows(folder)
    digest = measure(expected, BUCKETS).digest()
    for path in ("tars", "tars/*.tar", "records", "records/a.array_record"):
        rows = load_rows(tmp_path / path)
        assert content(rows) == content(expected), path
        assert measure(rows, BUCKETS).digest() == digest
    assert load_rows(tmp_path / "tars").rows[3].where.endswith("b.tar:set/003.png")
    assert [row.captions for row in load_rows(tmp_path / "tars/b.tar").rows] == [
        (("caption", "picture 3"),), (("caption", "picture 4"),),
    ]  # fmt: skip


def test_json_members_bring_more_caption_keys(tmp_path):
    record = {"short_en": "cat", "caption": "a cat", "url": "x", "width": 64, "detailed_en": "long"}
    members = [*sample("0"), ("0.json", json.dumps(record).encode())]
    write_tar(tmp_path / "a.tar", members)
    rows = load_rows(tmp_path / "a.tar")
    assert rows.prompt_keys == ("short_en", "detailed_en", "caption")
    rows = load_rows(tmp_path / "a.tar", ["detailed_en"])
    assert rows.rows[0].captions == (("detailed_en", "long"),)
    (problem,) = problems_of(load_rows, tmp_path / "a.tar", ["medium_en"])
    assert "'medium_en' is missing in samples a.tar:0.png (1 of 1 rows)" in problem


def test_a_json_member_is_never_the_text_of_a_caption(tmp_path):
    """Whatever data.caption_extension says: it is an object with captions, as in a folder."""
    record = {"text": "a dog", "caption": "a brown dog"}
    write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.json", json.dumps(record).encode())])
    plain, named = (load_rows(tmp_path / "a.tar", caption_extension=e) for e in (".txt", ".json"))
    assert named.rows[0].captions == plain.rows[0].captions
    assert {text for _, text in named.rows[0].captions} == {"a dog", "a brown dog"}


@pytest.mark.parametrize(("concept", "read"), [("dog", "dog"), (7, "7"), (7.0, "7"), (None, "")])
def test_a_concept_is_text_or_a_whole_number(tmp_path, concept, read):
    record = json.dumps({"text": "x", "concept": concept}).encode()
    write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.json", record)])
    (row,) = load_rows(tmp_path / "a.tar").rows
    assert row.concept == read and row.captions == (("text", "x"),)


def test_another_concept_is_refused(tmp_path):
    for concept in ([1], 0.5, True):
        record = json.dumps({"text": "x", "concept": concept}).encode()
        write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.json", record)])
        (problem,) = problems_of(load_rows, tmp_path / "a.tar")
        assert "'concept' is" in problem and "text or a whole number" in problem


def test_what_lies_in_folders_below_archives_is_told(tmp_path):
    write_tar(tmp_path / "a.tar", sample("0"))
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "b.tar", sample("1"))
    (tmp_path / "more" / "c.png").write_bytes(png(2))
    rows = load_rows(tmp_path)
    assert len(rows.rows) == 1
    (note,) = [note for note in rows.notes if "below" in note]
    assert "2 archives and pictures in folders below are not used: more/b.tar, more/c.png" in note
    assert len(load_rows(tmp_path / "**" / "*.tar").rows) == 2


def test_alternatives_in_a_caption_member(tmp_path):
    write_tar(tmp_path / "a.tar", sample("0", caption="one\n\ntwo\n"))
    rows = load_rows(tmp_path / "a.tar", caption_lines=True)
    assert rows.rows[0].captions == (("caption", "one"), ("caption", "two"))


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("0.png", png(0))], "has no caption"),
        ([("0.txt", b"x")], "has no picture"),
        ([*sample("0"), ("0.jpg", png(1))], "has 2 pictures (.png, .jpg)"),
        ([*sample("0"), ("0.cls", b"5")], "0.cls: is neither a picture nor .txt or .json"),
        ([*sample("0"), ("0.png", png(0))], "0.png: is there twice"),
        ([("0.png", png(0)), *sample("1"), ("0.txt", b"x")], "apart from the other members"),
        (sample("../../etc/0"), "not a plain relative path"),
        (sample("/etc/0"), "not a plain relative path"),
        (sample("a\nerror: b"), "not a plain relative path"),
        ([("0.png", b""), ("0.txt", b"x")], "0.png: is empty"),
        ([("0.png", png(0)), ("0.txt", b"\xff\xfe")], ".txt not UTF-8"),
        ([("0.png", png(0)), ("0.json", b"{")], ".json is not JSON"),
        ([("0.png", png(0)), ("0.json", b"[]")], ".json is a list"),
        ([("0.png", png(0)), ("0.json", b'{"caption": 5}')], "'caption' is a number"),
        ([*sample("0"), ("0.json", b'{"caption": "dog"}')], "hold different captions"),
        ([("0.jxl", b"x")], "jxl cannot be read"),
        ([], "holds no pictures"),
    ],
)
def test_every_fault_of_a_member_is_told(tmp_path, members, told):
    path = write_tar(tmp_path / "a.tar", members)
    assert any(told in problem and "a.tar" in problem for problem in problems_of(load_rows, path))


def test_links_in_a_tar_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "0.txt", b"x")
        add(archive, "0.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    problems = problems_of(load_rows, tmp_path / "a.tar")
    assert any("0.png: is a link or a special file" in problem for problem in problems)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_is_never_taken_for_a_smaller_one(tmp_path, format):
    name = "folder/" * 20 + "0" if format != tarfile.USTAR_FORMAT else "0"
    path = write_tar(tmp_path / "a.tar", [*sample(name), *sample("1", 1)], format=format)
    whole = path.read_bytes()
    assert len(load_rows(path).rows) == 2
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # behind the last block with content
    for cut in [*range(0, end, 512), end - 700, 100]:
        path.write_bytes(whole[:cut])
        assert problems_of(load_rows, path), cut
    path.write_bytes(whole + whole)
    assert "behind its end mark" in problems_of(load_rows, path)[0]
    path.write_bytes(whole[:512].replace(b"0", b"7") + whole[512:])
    assert "truncated or damaged" in problems_of(load_rows, path)[0]


def test_damaged_records_are_told(tmp_path):
    path = tmp_path / "a.array_record"
    array_record.write_array_record(path, (({"caption": "x"}, png(i)) for i in range(9)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "empty or truncated" in problems_of(load_rows, path)[0]
    place = whole.index(png(5)) + 50
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert "a.array_record:5: is damaged" in problems_of(load_rows, path)[0]
    array_record.write_array_record(path, [({"caption": "x"}, b""), ({"caption": 3}, png(0))])
    problems = problems_of(load_rows, path)
    assert "holds no picture" in problems[0] and "'caption' is a number" in problems[1]


def test_the_index_of_an_archive_is_kept_until_it_changes(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path / "cache")
    path = write_tar(tmp_path / "a.tar", sample("0"))
    first = content(load_rows(path, cache=cache))
    read = tar._members
    monkeypatch.setattr(tar, "_members", lambda *_: pytest.fail("indexed again"))
    assert content(load_rows(path, cache=cache)) == first
    monkeypatch.setattr(tar, "_members", read)
    write_tar(path, sample("0", 1, "a dog"))
    os.utime(path, ns=(1, 1))
    assert load_rows(path, cache=cache).rows[0].captions == (("caption", "a dog"),)


def test_an_archive_that_changes_under_a_run_is_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("0"))
    (row,) = load_rows(path).rows
    path.write_bytes(path.read_bytes()[:600])
    assert "has changed or is truncated" in problems_of(open_image, row.image)[0]


def test_paths_that_mix_or_miss_archives(tmp_path):
    write_tar(tmp_path / "a.tar", sample("0"))
    (tmp_path / "b.tar.gz").touch()
    assert "no random access" in problems_of(load_rows, tmp_path)[0]
    (tmp_path / "b.tar.gz").rename(tmp_path / "b.array_record")
    assert "holds both" in problems_of(load_rows, tmp_path)[0]
    (tmp_path / "b.array_record").rename(tmp_path / "b.png")
    assert "holds archives and also b.png" in problems_of(load_rows, tmp_path)[0]
    assert "also matches b.png" in problems_of(load_rows, tmp_path / "*")[0]
    assert "matches no file" in problems_of(load_rows, tmp_path / "x*.tar")[0]


def test_a_damaged_picture_in_an_archive_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.png", png(0)[:400]), ("0.txt", b"x")])
    (problem,) = problems_of(measure, load_rows(path), BUCKETS)
    assert "a.tar:0.png: is damaged or truncated" in problem
