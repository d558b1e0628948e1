import json
import os
import time
import tracemalloc

import pytest
from conftest import problems_of
from PIL import Image

from dopsd_jax.common.errors import few
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.sources.captions import UPSTREAM_KEYS


def touch_images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(folder / name, "PNG")


def write_jsonl(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- D-OPSD jsonl


def test_a_d_opsd_record_gives_its_first_picture_and_all_its_captions(tmp_path):
    touch_images(tmp_path, "target_images/00.png", "other.png")
    record = {"class_name": "Millennium", "local_path_list": ["target_images/00.png", "other.png"]}
    record |= {"h*w": "832*1264"} | {key: f"{key} of 马" for key in UPSTREAM_KEYS}
    rows = load_rows(write_jsonl(tmp_path / "train.jsonl", record))
    (row,) = rows.rows
    assert row.image == tmp_path / "target_images/00.png"
    assert rows.prompt_keys == UPSTREAM_KEYS
    assert row.captions == tuple((key, f"{key} of 马") for key in UPSTREAM_KEYS)
    assert row.where.endswith("train.jsonl:1")
    assert rows.rows.declared_sizes([0]).tolist() == [[1264, 832]]  # width first
    assert "prompt keys short_en, medium_en" in rows.notes[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("local_path_list", ["a.png"]),
        ("local_paths", ["a.png"]),
        ("image_path_list", ["a.png", "nowhere.png"]),
        ("image_paths", ["a.png"]),
        ("oss_path_list", ["a.png"]),
        ("image_path", "a.png"),
        ("path", "a.png"),
        ("file_name", "a.png"),
        ("image", "a.png"),
    ],
)
def test_every_path_alias_is_read(tmp_path, key, value):
    touch_images(tmp_path, "a.png")
    rows = load_rows(write_jsonl(tmp_path / "d.jsonl", {key: value, "prompt": "x"}))
    assert rows.rows[0].image == tmp_path / "a.png"


def test_the_first_alias_that_is_not_empty_wins(tmp_path):
    touch_images(tmp_path, "a.png", "b.png")
    record = {"image_path": "b.png", "local_paths": ["a.png"], "local_path_list": [], "text": "x"}
    assert load_rows(write_jsonl(tmp_path / "d.jsonl", record)).rows[0].image.name == "a.png"


def test_pictures_are_found_absolute_then_beside_the_file_then_under_the_root(tmp_path):
    touch_images(tmp_path / "set", "a.png")
    touch_images(tmp_path / "root", "a.png", "b.png")
    touch_images(tmp_path / "else", "c.png")
    names = ["a.png", "b.png", str(tmp_path / "else/c.png")]
    path = write_jsonl(tmp_path / "set/d.jsonl", *({"path": n, "caption": "x"} for n in names))
    rows = load_rows(path, data_root=tmp_path / "root")
    parents = [row.image.parent.name for row in rows.rows]
    assert parents == ["set", "root", "else"]
    assert "d.jsonl:2: no such picture b.png" in problems_of(load_rows, path)[0]


def test_default_keys_are_those_of_every_row_and_the_choice_is_told(tmp_path):
    touch_images(tmp_path, "a.png")
    first = {"path": "a.png", "short_en": "x", "short_zh": "y", "medium_en": "z"}
    second = {"path": "a.png", "short_en": "x", "medium_en": "z", "short_zh": None}
    rows = load_rows(write_jsonl(tmp_path / "d.jsonl", first, second))
    assert rows.prompt_keys == ("short_en", "medium_en")
    assert rows.rows[0].captions == (("short_en", "x"), ("medium_en", "z"))
    assert "left out, because not in every row: short_zh (1 of 2 rows)" in rows.notes[0]


def test_a_requested_key_may_have_any_name_and_must_be_in_every_row(tmp_path):
    touch_images(tmp_path, "a.png")
    records = [{"path": "a.png", "mine": "x"}, {"path": "a.png"}, {"path": "a.png", "mine": " \n"}]
    path = write_jsonl(tmp_path / "d.jsonl", *records)
    problems = problems_of(load_rows, path, ["mine"])
    assert len(problems) == 2
    assert "'mine' is missing in lines 2 (1 of 3 rows)" in problems[0]
    assert "'mine' is empty in lines 3 (1 of 3 rows)" in problems[1]
    path = write_jsonl(tmp_path / "d.jsonl", records[0])
    assert load_rows(path, ["mine"]).rows[0].captions == (("mine", "x"),)


def test_rows_without_a_common_key_are_refused_with_the_counts(tmp_path):
    touch_images(tmp_path, "a.png")
    records = [{"path": "a.png", "short_en": "x"}, {"path": "a.png", "short_zh": "y"}]
    (problem,) = problems_of(load_rows, write_jsonl(tmp_path / "d.jsonl", *records))
    assert "no caption key is in every row (of 2 rows, short_en in 1, short_zh in 1)" in problem
    (problem,) = problems_of(load_rows, write_jsonl(tmp_path / "d.jsonl", {"path": "a.png"}))
    assert "none is there" in problem


def test_all_faults_of_all_lines_are_told_at_once(tmp_path):
    touch_images(tmp_path, "a.png")
    (tmp_path / "folder").mkdir()
    path = write_jsonl(
        tmp_path / "d.jsonl",
        {"path": "a.png", "caption": "good"},
        '{"path": "a.png", "caption": "broken',
        "[1, 2]",
        "",
        {"path": 7, "caption": "x"},
        {"caption": "x"},
        {"path": "nowhere.png", "caption": "x"},
        {"path": "folder", "caption": "x"},
        {"path": "a.png", "caption": ["x"]},
        {"local_paths": "a.png", "caption": "x"},
        {"path": "https://host/a.png", "caption": "x"},
        {"path": "a.png", "caption": ""},
        '{"path": "a.png", "caption": "half \\ud83d"}',
        {"path": "n" * 5000, "caption": "x"},
        {"path": "a\0b", "caption": "x"},
    )
    with path.open("ab") as file:
        file.write(b'{"path": "a.png", "caption": "caf\xe9"}\n')
        file.write(b"[" * 100_000 + b"\n")
    problems = problems_of(load_rows, path)
    expected = {
        2: "not valid JSON (Unterminated string starting at: line 1 column",
        3: "is a list; a row must be one JSON object",
        5: "'path' is a number",
        6: "names no picture",
        7: "no such picture nowhere.png (looked in",
        8: "folder is a folder",
        9: "'caption' is a list; a caption must be a string",
        10: "'local_paths' must be a list of paths",
        11: "https://host/a.png is remote",
        13: "'half \\ud83d' holds half a character",
        14: "no such picture nnnnn",
        15: "no such picture a",
        16: "not UTF-8 text (byte 0xe9)",
        17: "not valid JSON (maximum recursion depth",
    }
    for line, text in expected.items():
        assert any(f"d.jsonl:{line}: {text}" in p for p in problems), (line, text, problems)
    assert any("'caption' is empty in lines 12" in p for p in problems)
    assert len(problems) == len(expected) + 1


def test_many_faults_are_counted_not_printed(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", *["{"] * 1050)
    told = few(problems_of(load_rows, path))
    assert len(told) == 4 and told[-1] == "... and 1047 more like these"
    assert few(["a/b: x", "... and 4 more", "c/d: y y"])[-1] == "... and 4 more"


def test_a_byte_order_mark_and_blank_lines_are_accepted(tmp_path):
    touch_images(tmp_path, "a.png")
    line = json.dumps({"path": "a.png", "caption": "x"})
    (tmp_path / "d.jsonl").write_text(f"{line}\r\n\r\n{line}", encoding="utf-8-sig")
    assert [r.where[-2:] for r in load_rows(tmp_path / "d.jsonl").rows] == [":1", ":3"]


@pytest.mark.parametrize("key", ["h*w", "w*h"])
def test_the_declared_size_is_read_by_its_own_order(tmp_path, key):
    touch_images(tmp_path, "a.png")
    record = {"path": "a.png", "text": "x", key: ["832*1264", "1*1"]}
    rows = load_rows(write_jsonl(tmp_path / "d.jsonl", record))
    expected = [1264, 832] if key == "h*w" else [832, 1264]
    assert rows.rows.declared_sizes([0]).tolist() == [expected]


def test_a_declared_size_that_is_none_is_told_and_not_used(tmp_path):
    touch_images(tmp_path, "a.png")
    records = [{"path": "a.png", "text": "x", "h*w": size} for size in ("832x1264", 7, "1*1")]
    rows = load_rows(write_jsonl(tmp_path / "d.jsonl", *records))
    assert any("is not a size" in note and "lines 1, 2;" in note for note in rows.notes)
    assert rows.rows.declared_sizes(range(3)).tolist() == [[0, 0], [0, 0], [1, 1]]


# --- folders


def test_a_folder_pairs_pictures_with_captions_also_in_subfolders(tmp_path):
    touch_images(tmp_path, "b.png", "a.JPG", "sub/c.webp", ".hidden/d.png", "_latent_cache/e.png")
    (tmp_path / "a.txt").write_text("first, second\nthird\n")
    (tmp_path / "b.txt").write_text("\ufeff b's caption ", encoding="utf-8")
    (tmp_path / "sub/c.txt").write_text("deep")
    rows = load_rows(tmp_path)
    assert [row.image.name for row in rows.rows] == ["a.JPG", "b.png", "c.webp"]
    texts = [row.captions for row in rows.rows]
    assert texts == [
        (("caption", "first, second\nthird"),),
        (("caption", "b's caption"),),
        (("caption", "deep"),),
    ]
    assert rows.prompt_keys == ("caption",)


def test_caption_lines_are_alternatives_on_request(tmp_path):
    touch_images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("one\n\n two \nthree")
    (row,) = load_rows(tmp_path, caption_lines=True).rows
    assert [text for _, text in row.captions] == ["one", "two", "three"]
    assert row.having("caption") == (0, 1, 2)


def test_all_faults_of_a_folder_are_told_at_once(tmp_path):
    touch_images(tmp_path, "a.png", "b.png", "b.jpg", "c.png", "d.png", "e.png", "f.png", "h.jxl")
    for name in "abe":
        (tmp_path / f"{name}.txt").write_text("x")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "e.txt").write_bytes("x".encode("utf-16"))
    (tmp_path / "f.txt").write_bytes(b"x\0y")
    problems = problems_of(load_rows, tmp_path)
    assert len(problems) == 6
    text = "\n".join(problems)
    assert "b.jpg" in text and "b.png would share the caption b.txt" in text
    assert "c.txt: is empty" in text
    assert "d.png: has no caption; write d.txt beside it (`dopsd-jax caption` can)" in text
    assert "e.txt: not UTF-8 text (looks like UTF-16)" in text
    assert "f.txt: holds NUL" in text
    assert "h.jxl: jxl cannot be read" in text


def test_a_stem_with_dots_and_another_extension(tmp_path):
    touch_images(tmp_path, "a.1.png", "a.2.png")
    for name in ("a.1", "a.2"):
        (tmp_path / f"{name}.cap").write_text(name)
    rows = load_rows(tmp_path, caption_extension=".cap")
    assert [row.captions[0][1] for row in rows.rows] == ["a.1", "a.2"]
    assert "set data.caption_extension" in problems_of(load_rows, tmp_path)[0]


def test_masks_and_lonely_captions_are_noted(tmp_path):
    touch_images(tmp_path, "a.png", "a-masklabel.png")
    for name in ("a.txt", "gone.txt"):
        (tmp_path / name).write_text("x")
    rows = load_rows(tmp_path)
    assert len(rows.rows) == 1
    assert "a-masklabel.png" in rows.notes[0] and "gone.txt" in rows.notes[1]


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    touch_images(tmp_path / "elsewhere", "a.png")
    (tmp_path / "elsewhere/a.txt").write_text("x")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set")
    assert len(load_rows(tmp_path / "set").rows) == 1


# --- metadata in a folder


def test_metadata_jsonl_names_the_pictures_of_its_folder(tmp_path):
    touch_images(tmp_path, "train/a.png", "b.png")
    records = [{"file_name": "train/a.png", "text": "x"}, {"file_name": "b.png", "text": "y"}]
    write_jsonl(tmp_path / "metadata.jsonl", *records)
    rows = load_rows(tmp_path)
    assert rows.prompt_keys == ("text",)
    assert [row.captions[0][1] for row in rows.rows] == ["x", "y"]


def test_metadata_csv_is_read_with_quotes_and_line_numbers(tmp_path):
    touch_images(tmp_path, "a.png", "b.png")
    table = '\ufefffile_name,prompt\na.png,"one, two\nthree"\nb.png,four\n'
    (tmp_path / "metadata.csv").write_text(table, encoding="utf-8")
    rows = load_rows(tmp_path)
    assert [row.captions[0][1] for row in rows.rows] == ["one, two\nthree", "four"]
    assert rows.rows[1].where.endswith("metadata.csv:4")


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (b"file_name,text\na.png\n", ":2: 1 columns where the header has 2"),
        (b"file_name,text\na.png,x,y\n", ":2: 3 columns where the header has 2"),
        (b'file_name,text\na.png,"x\n', "broken CSV"),
        (b"file_name,text\na.png,x\na.png,caf\xe9\n", ":3: not UTF-8"),
        (b"text,text\nx,x\n", ":1: the header names 'text' twice"),
        (b"file_name,text\na.png,\n", "'text' is empty in lines 2"),
        (b"file_name,text,,\n", ":1: the header names '' twice"),
        (b"file_name,text\n", "holds no rows"),
        (b"", "holds no rows"),
    ],
)
def test_faults_of_a_csv(tmp_path, table, problem):
    touch_images(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_bytes(table)
    assert problem in problems_of(load_rows, tmp_path)[0]


def test_rows_between_tabs_are_all_read_or_refused(tmp_path):
    touch_images(tmp_path, *(f"{i}.png" for i in range(4)))
    table = tmp_path / "d.tsv"
    table.write_text("file_name\ttext\ta,b,c\n0.png\tx, y\t1\n")
    (row,) = load_rows(table).rows
    assert row.captions == (("text", "x, y"),)
    table.write_text('file_name\ttext\n0.png\t"a\n1.png\tb\n2.png\tx"\n4.png\tx\n')
    first, second = problems_of(load_rows, table)
    assert ":2: a field goes on to line 4, over tabs; a field that begins with a quote" in first
    assert ":5: no such picture 4.png" in second
    table.write_text('file_name\ttext\n0.png\t"a dog" on grass\n1.png\n')
    first, second = problems_of(load_rows, table)
    assert ":2: broken CSV" in first and first.endswith("must end with one")
    assert second.endswith(":3: 1 columns where the header has 2; quote fields that contain a tab")


def test_two_tables_in_one_folder_are_ambiguous(tmp_path):
    (tmp_path / "metadata.csv").touch()
    (tmp_path / "metadata.jsonl").touch()
    assert "remove one" in problems_of(load_rows, tmp_path)[0]


# --- what is not a data set


def test_a_path_that_is_no_data_set(tmp_path):
    touch_images(tmp_path / "pictures", "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/train.jsonl").touch()
    (tmp_path / "x.arrow").touch()
    cases = {
        "nowhere": "no such file or folder",
        "empty": "no pictures in this folder",
        "tables": "holds train.jsonl, give that file",
        "tables/train.jsonl": "holds no rows",
        "pictures/a.png": "is one picture",
        "x.arrow": "is not a data set",
    }
    for path, problem in cases.items():
        assert problem in problems_of(load_rows, tmp_path / path)[0]
    assert "from local folders only" in problems_of(load_rows, "gs://bucket/set")[0]


def test_wrong_options_are_refused(tmp_path):
    touch_images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("x")
    assert "must be a list" in problems_of(load_rows, tmp_path, "caption")[0]
    assert "is empty" in problems_of(load_rows, tmp_path, [])[0]
    assert "only the key 'caption'" in problems_of(load_rows, tmp_path, ["short_en"])[0]
    assert "start with a dot" in problems_of(load_rows, tmp_path, caption_extension="txt")[0]
    assert "data.root" in problems_of(load_rows, tmp_path, data_root=tmp_path / "no")[0]
    assert load_rows(tmp_path, ["caption"]).prompt_keys == ("caption",)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    touch_images(tmp_path, "sub/a.png")
    (tmp_path / "sub").chmod(0)
    assert "check its permissions" in problems_of(load_rows, tmp_path)[0]
    (tmp_path / "sub").chmod(0o700)


def test_a_million_rows_of_garbage_are_not_read_to_the_end(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"{\n" * 1_000_000)
    began = time.process_time()
    problems = problems_of(load_rows, path)
    assert time.process_time() - began < 5
    assert len(problems) == 1002 and "... and 50000 more" in problems
    assert problems[-1].endswith("it has so many faults that it was not read to the end")


def test_names_in_faults_take_no_memory(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", *[f'{{"{"k" * 100_000}": 1}}'] * 30)
    tracemalloc.start()
    assert "names no picture" in problems_of(load_rows, path)[0]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20


def test_a_header_of_many_columns_is_checked_quickly(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(",".join(f"c{i}" for i in range(100_000)) + ",c1\n1,2\n")
    began = time.process_time()
    assert "the header names 'c1' twice" in problems_of(load_rows, path)[0]
    assert time.process_time() - began < 5
