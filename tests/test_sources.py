"""Data sets as people have them: everything is read, or a line says what is not."""

import io
import json
import os
import tarfile
import time
import unicodedata

import numpy as np
import pytest
from conftest import problems_of
from PIL import Image

from dopsd_jax.data import rows as rows_module
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.dataset import describe
from dopsd_jax.data.images import inspect_image, open_image
from dopsd_jax.data.measure import measure
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.sources import tar, uncaptioned
from dopsd_jax.data.sources.layout import Layout


def pixels(seed=0, size=(48, 40)):
    return np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)


def picture(path, kind="PNG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels()).save(path, kind, **options)
    return path


def captioned(path, caption="a mug", kind="PNG"):
    picture(path, kind)
    path.with_suffix(".txt").write_bytes(caption.encode())


def texts(rows):
    return [text for row in rows.rows for _, text in row.captions]


# --- layouts


def test_a_layout_is_one_entry_of_the_list(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    (tmp_path / "set.toy").write_text("a.png=a mug\nb.png=gone\n")

    def read(path, options):
        into = options.collector(path, "lines")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            name, _, text = line.partition("=")
            if (path.parent / name).exists():
                into.add(str(path.parent / name), [("caption", text)], number, line=number)
            else:
                into.problem(f"{path}:{number}: no such picture {name}; mend the line")
        return into

    toy = Layout("a toy", lambda path: path.suffix == ".toy", read)
    monkeypatch.setattr(rows_module, "LAYOUTS", [toy, *rows_module.LAYOUTS])
    assert "set.toy:2: no such picture b.png" in problems_of(load_rows, tmp_path / "set.toy")[0]
    picture(tmp_path / "b.png")
    rows = load_rows(tmp_path / "set.toy")
    assert texts(rows) == ["a mug", "gone"] and rows.rows[1].where.endswith("set.toy:2")


def test_an_option_of_another_layout_is_told(tmp_path):
    captioned(tmp_path / "a.png")
    (problem,) = problems_of(load_rows, tmp_path, image_key="picture")
    assert "data.image_key" in problem and "read as a folder of pictures" in problem
    (tmp_path / "d.jsonl").write_text("{}")
    for name, value in (
        ("folder_repeats", True),
        ("caption_lines", True),
        ("caption_extension", ".caption"),
    ):
        (problem,) = problems_of(load_rows, tmp_path / "d.jsonl", **{name: value})
        assert problem.startswith(f"data.{name} is for a folder of pictures with caption files")
        assert problem.endswith("d.jsonl is read as a table of pictures and captions; unset it")
    (problem,) = problems_of(load_rows, tmp_path, data_root=tmp_path)
    assert problem.startswith("data.root is for a table of pictures and captions, and")


# --- folders


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a", "a.2024"])
def test_a_picture_with_a_rare_ending_or_none_is_read(tmp_path, name):
    picture(tmp_path / name, "JPEG")
    (tmp_path / (name.removesuffix(".jfif").removesuffix(".jpe") + ".txt")).write_text("a mug")
    assert texts(load_rows(tmp_path)) == ["a mug"]
    assert not load_rows(tmp_path).notes


def test_a_picture_with_a_rare_ending_needs_a_caption(tmp_path):
    captioned(tmp_path / "b.png")
    picture(tmp_path / "a.jfif", "JPEG")
    assert "a.jfif: has no caption" in problems_of(load_rows, tmp_path)[0]


def test_repeats_of_numbered_folders_are_told_or_used(tmp_path):
    captioned(tmp_path / "img/10_ohwx mug/a.png")
    captioned(tmp_path / "img/2_ohwx plate/b.png", "a plate")
    rows = load_rows(tmp_path)
    assert len(rows.rows) == 2
    assert "is not used (10_ohwx mug, 2_ohwx plate); with data.folder_repeats" in rows.notes[0]
    rows = load_rows(tmp_path, folder_repeats=True)
    assert [texts(rows).count(text) for text in ("a mug", "a plate")] == [10, 2]
    assert "count as often as their folder says: 10_ohwx mug, 2_ohwx plate" in rows.notes[0]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "img/2_ohwx plate/b.png")
    rows = load_rows(tmp_path, folder_repeats=True)
    assert not any("share a picture" in note for note in measure(rows, [Bucket(64, 64)]).notes)


def test_a_folder_s_name_is_the_caption_on_request(tmp_path):
    picture(tmp_path / "10_ohwx mug/a.png")
    picture(tmp_path / "cats/b.png")
    captioned(tmp_path / "cats/c.png", "own")
    problems = problems_of(load_rows, tmp_path)
    assert len(problems) == 2
    assert "data.folder_captions=True to take its folder's name, 'ohwx mug'" in problems[0]
    assert texts(load_rows(tmp_path, folder_captions=True)) == ["ohwx mug", "cats", "own"]
    picture(tmp_path / "top.png")
    (problem,) = problems_of(load_rows, tmp_path, folder_captions=True)
    assert "top.png: has no caption" in problem and "folder_captions" not in problem


def test_file_names_of_macs_match_those_of_others(tmp_path):
    picture(tmp_path / unicodedata.normalize("NFC", "café.png"))
    (tmp_path / unicodedata.normalize("NFD", "café.txt")).write_text("a mug")
    assert texts(load_rows(tmp_path)) == ["a mug"]
    line = {"file_name": unicodedata.normalize("NFD", "café.png"), "text": "a cup"}
    (tmp_path / "d.jsonl").write_text(json.dumps(line))
    assert texts(load_rows(tmp_path / "d.jsonl")) == ["a cup"]


def test_endings_may_be_capitals_and_follow_the_picture_s(tmp_path):
    picture(tmp_path / "a.PNG")
    (tmp_path / "a.TXT").write_text("one")
    picture(tmp_path / "b.png")
    (tmp_path / "b.png.txt").write_text("two")
    assert texts(load_rows(tmp_path)) == ["one", "two"]


def test_a_name_that_is_not_utf_8_is_one_line(tmp_path):
    name = "caf\udce9"  # as Python reads a byte that is no UTF-8
    try:
        captioned(tmp_path / f"{name}.png")
    except OSError:
        pytest.skip("the file system has no such names")
    told = f"{tmp_path}/caf\\udce9.png: is not a name in UTF-8; rename it"
    assert problems_of(load_rows, tmp_path) == (told,)
    found = uncaptioned.find(tmp_path, ".txt", overwrite=True)
    assert found.faults[0].encode("utf-8", "backslashreplace").decode() == told
    (tmp_path / f"{name}.png").unlink()
    captioned(tmp_path / "a.png")
    lines = describe(measure(load_rows(tmp_path), [Bucket(64, 64)]), 1)
    assert f"note: {tmp_path}: captions without a picture are not used: caf\\udce9.txt" in lines
    assert all(line.isprintable() for line in lines)


def test_two_caption_files_of_one_picture_are_refused(tmp_path):
    captioned(tmp_path / "a.png")
    (tmp_path / "a.TXT").write_text("two")
    told = f"{tmp_path}/a.TXT, {tmp_path}/a.txt are captions of one picture; keep one"
    assert problems_of(load_rows, tmp_path) == (told,)
    for overwrite in (False, True):
        assert uncaptioned.find(tmp_path, ".txt", overwrite=overwrite).faults == [told]


def test_captions_in_other_files_beside_the_picture_are_named_or_read(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.tags").write_text("mug, red")
    (problem,) = problems_of(load_rows, tmp_path)
    assert "a.tags is beside it: set data.caption_extension to '.tags'" in problem
    (tmp_path / "a.json").write_text(json.dumps({"short_en": "a mug", "width": 3}))
    rows = load_rows(tmp_path, caption_extension=".json")
    assert rows.rows[0].captions == (("short_en", "a mug"),)
    (tmp_path / "a.json").write_text("[1]")
    (problem,) = problems_of(load_rows, tmp_path, caption_extension=".json")
    assert "a.json: is a list; it must be one JSON object" in problem


def test_masks_and_leftovers_are_noted(tmp_path):
    captioned(tmp_path / "a.png")
    picture(tmp_path / "mask/a.png")
    picture(tmp_path / "a_mask.png")
    captioned(tmp_path / "b_mask.png", "a picture of a mask")
    for name in (".aitk_size.json", "a.npz", "a_0120x0096_zi.safetensors", ".DS_Store", "._a.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "_latent_cache").mkdir()
    rows = load_rows(tmp_path)
    assert texts(rows) == ["a mug", "a picture of a mask"]
    masks, others, passed = rows.notes
    told = "are not used (with data.masks=files masks say what counts): a_mask.png, mask/a.png"
    assert masks.endswith(told)
    for path in ("mask/a.png", "a_mask.png"):
        (tmp_path / path).unlink()
    picture(tmp_path / "control/a.png")
    assert load_rows(tmp_path).notes[0].endswith("condition pictures are not used: control/a.png")
    assert others.endswith("are not used: a.npz, a_0120x0096_zi.safetensors")
    assert passed.endswith("are passed over: _latent_cache/, .aitk_size.json")


def test_tables_of_other_programs_are_named(tmp_path):
    (tmp_path / "train-00000-of-00001.arrow").write_bytes(b"ARROW1")
    (problem,) = problems_of(load_rows, tmp_path)
    assert "it holds train-00000-of-00001.arrow, which is not read: unpack it" in problem
    (problem,) = problems_of(load_rows, tmp_path / "train-00000-of-00001.arrow")
    assert "arrow is not read; unpack it" in problem


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_devices_and_pipes_are_refused_before_they_are_read(tmp_path, kind):
    picture(tmp_path / "a.png")
    make = os.mkfifo if kind == "fifo" else lambda path: path.symlink_to("/dev/zero")
    make(tmp_path / "a.txt")
    assert "a.txt: is a device or a pipe" in problems_of(load_rows, tmp_path)[0]
    make(tmp_path / "b.png")
    assert "b.png: is a device or a pipe" in problems_of(open_image, tmp_path / "b.png")[0]
    (tmp_path / "d.jsonl").write_text('{"path": "b.png", "text": "x"}')
    assert "b.png is a device or a pipe" in problems_of(load_rows, tmp_path / "d.jsonl")[0]
    for name in ("e.jsonl", "e.csv", "e.json", "e.tar", "e.array_record"):
        make(tmp_path / name)
        assert "is a device or a pipe" in problems_of(load_rows, tmp_path / name)[0]


# --- captions


def test_line_ends_of_windows_become_plain_ones(tmp_path):
    captioned(tmp_path / "a.png", "a red mug\r\non a table\r\n")
    captioned(tmp_path / "b.png", "a red mug\ron a table")
    captioned(tmp_path / "c.png", "a red mug\r\n")
    rows = load_rows(tmp_path)
    assert texts(rows) == ["a red mug\non a table"] * 2 + ["a red mug"]
    assert "line ends of Windows are read as plain ones in 2 captions: a.png" in rows.notes[0]


@pytest.mark.parametrize("mark", ["[trigger]", "[name]"])
def test_the_placeholder_of_a_trigger_is_never_trained_unnoticed(tmp_path, mark):
    captioned(tmp_path / "a.png", f"{mark} mug on a table")
    captioned(tmp_path / "b.png", "a plate")
    (problem,) = problems_of(load_rows, tmp_path)
    assert "stands in 1 captions: a.png; set data.trigger" in problem
    rows = load_rows(tmp_path, trigger="ohwx")
    assert texts(rows) == ["ohwx mug on a table", "a plate"]
    assert "is put for the placeholder in 1 captions: a.png" in rows.notes[0]
    assert "'ohwx' is not in 1 captions: b.png" in rows.notes[1]
    assert texts(load_rows(tmp_path, trigger=mark))[0] == f"{mark} mug on a table"


def test_pictures_are_named_once_and_with_their_folder(tmp_path):
    for folder in ("10_mug", "3_plate"):
        captioned(tmp_path / folder / "a.png", "[trigger]\n[trigger] on a table")
    (problem,) = problems_of(load_rows, tmp_path, folder_repeats=True, caption_lines=True)
    assert "stands in 26 captions: 10_mug/a.png, 3_plate/a.png; set" in problem


def test_captions_of_a_table_have_limits(tmp_path):
    picture(tmp_path / "a.png")
    lines = [{"path": "a.png", "text": text} for text in ("x" * (2 << 20), "x\0y")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    problems = problems_of(load_rows, tmp_path / "d.jsonl")
    assert "is larger than 1 MiB" in problems[0] and "NUL" in problems[1]


# --- tables


def test_pictures_that_metadata_does_not_list_are_noted(tmp_path):
    for name in ("a.png", "b.png", "sub/c.jfif"):
        captioned(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red mug"}\n')
    rows = load_rows(tmp_path)
    assert texts(rows) == ["a red mug"]
    assert "metadata.jsonl does not list are not used: b.png, sub/c.jfif" in "".join(rows.notes)


def test_a_table_in_a_subfolder_is_found(tmp_path):
    picture(tmp_path / "train/a.png")
    line = '{"file_name": "a.png", "text": "a red mug"}\n'
    (tmp_path / "train/metadata.jsonl").write_text(line)
    rows = load_rows(tmp_path)
    assert texts(rows) == ["a red mug"]
    assert "its rows are those of train/metadata.jsonl" in rows.notes[0]
    (tmp_path / "test").mkdir()
    (tmp_path / "test/metadata.jsonl").write_text(line)
    (problem,) = problems_of(load_rows, tmp_path)
    assert "holds test/metadata.jsonl, train/metadata.jsonl; give one of these" in problem


@pytest.mark.parametrize(
    "table",
    [
        "image, caption\na.png, A dragon mug\n",
        "image ,caption \na.png,A dragon mug\n",
        "\ufeffimage;caption\r\na.png;A dragon mug\r\n",
        'image\tcaption\na.png\t"A dragon mug"\n',
        'image, caption\na.png, "A dragon mug"',
    ],
)
def test_separated_values_as_spreadsheets_write_them(tmp_path, table):
    picture(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text(table, newline="")
    for path in (tmp_path, tmp_path / "captions.csv"):
        assert texts(load_rows(path)) == ["A dragon mug"]


def test_columns_of_any_name(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "d.csv").write_text("photo,description\na.png,a mug\n")
    (problem,) = problems_of(load_rows, tmp_path / "d.csv")
    assert "its fields are 'photo', 'description'" in problem and "data.image_key" in problem
    (problem,) = problems_of(load_rows, tmp_path / "d.csv", image_key="photo")
    assert "the fields here are 'photo', 'description'" in problem and "caption_key" in problem
    rows = load_rows(tmp_path / "d.csv", ["description"], image_key="photo")
    assert rows.rows[0].captions == (("description", "a mug"),)
    (problem,) = problems_of(load_rows, tmp_path / "d.csv", image_key="file")
    assert "has no 'file' (its fields are 'photo'" in problem


@pytest.mark.parametrize(
    "content",
    [
        {"a.png": "a mug"},
        {"a": {"caption": "a mug", "tags": "mug"}},
        [{"file_name": "a.png", "caption": "a mug"}],
    ],
)
def test_captions_json_names_pictures_and_captions(tmp_path, content):
    picture(tmp_path / "a.png")
    (tmp_path / "captions.json").write_text(json.dumps(content))
    assert texts(load_rows(tmp_path)) == ["a mug"]


@pytest.mark.parametrize("content", ["3", "null", '{"a.png": 3}', "[[]]", "[", '["a.png"]'])
def test_captions_json_of_another_kind_is_one_line(tmp_path, content):
    (tmp_path / "captions.json").write_text(content)
    assert problems_of(load_rows, tmp_path)


def test_a_number_of_many_digits_is_one_line(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "d.jsonl").write_text('{"path": "a.png", "text": "x", "n": ' + "9" * 5000 + "}")
    assert "d.jsonl:1: holds a number of 5000 digits" in problems_of(
        load_rows, tmp_path / "d.jsonl"
    )[0]  # fmt: skip


def test_names_of_a_table_are_escaped(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"image_path": "\\u001b[31mred\\u0007", "caption": "x"}')
    assert problems_of(load_rows, tmp_path / "d.jsonl")[0].isprintable()


# --- archives


@pytest.mark.parametrize("size", ["9" * 30, "-1536", "1" + "0" * 18, "x"])
def test_sizes_in_the_headers_of_a_tar_are_checked(tmp_path, size):
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"size": size}
    block = member.create_pax_header(member.get_info(), "utf-8") if size != "x" else None
    block = block or member.tobuf(tarfile.USTAR_FORMAT).replace(b"00000000000", b"0000000000x", 1)
    (tmp_path / "a.tar").write_bytes(block * 3 + bytes(10240))
    assert problems_of(load_rows, tmp_path / "a.tar")


def with_header(path, kind, *contents):
    """A tar file with a header of `kind` before each of its members."""
    with open(path, "wb") as file:
        for content in contents:
            extra = tarfile.TarInfo("extra")
            extra.type, extra.size = kind, len(content)
            file.write(extra.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
            file.write(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(10240))
    return path


def test_fields_of_a_tar_cost_no_more_than_their_length(tmp_path):
    """On some versions of Python, tarfile's own patterns take minutes for each of these."""
    began = time.process_time()
    for content in (b"2 " * 32_000, b"60012 comment=" + b"1" * 59_997 + b"\n", b"9 a=b\n"):
        path = with_header(tmp_path / "a.tar", tarfile.XHDTYPE, *[content] * 3)
        assert "further fields that are none" in problems_of(load_rows, path)[0]
    assert time.process_time() - began < 2


def test_fields_for_all_members_of_a_tar_have_a_limit(tmp_path):
    records = []
    for number in range(4):
        text = b" k%d=%s\n" % (number, b"v" * 20_000)
        records.append(b"%d%s" % (len(text) + 5, text))
    path = with_header(tmp_path / "a.tar", tarfile.XGLTYPE, *records[:3])
    assert "a.png: is empty" in problems_of(load_rows, path)[0]
    path = with_header(tmp_path / "a.tar", tarfile.XGLTYPE, *records)
    assert any("fields for all members" in problem for problem in problems_of(load_rows, path))


def test_faults_of_a_tar_are_not_read_to_the_end(tmp_path):
    path = with_header(tmp_path / "a.tar", tarfile.SYMTYPE, *[b""] * 3000)
    assert "so many faults" in problems_of(load_rows, path)[0]


def test_a_long_name_in_a_tar_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_EXTRA", 1000)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("n" * 2000 + ".png"))
    assert "a name or header of 200" in problems_of(load_rows, tmp_path / "a.tar")[0]


# --- pictures


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(48, 40), (101, 67)])
def test_a_jpeg_without_its_end_mark_is_read_and_a_cut_one_refused(tmp_path, progressive, size):
    content = io.BytesIO()
    Image.fromarray(pixels(1, size)).save(content, "JPEG", progressive=progressive)
    whole, path = content.getvalue(), tmp_path / "a.jpg"
    path.write_bytes(whole)
    expected = open_image(path)
    assert not inspect_image(path).notes
    for short in (whole[:-2], whole[:-1]):
        path.write_bytes(short)
        np.testing.assert_array_equal(open_image(path), expected)
        assert "end mark is missing" in inspect_image(path).notes[0]
    for cut in (4, 6, 10, 50, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        assert "damaged or truncated" in problems_of(inspect_image, path)[0]


def test_files_that_never_end_are_no_pictures(tmp_path):
    for name, beginning in {"a.webp": b"RIFF\xff\xff\xff\x7fWEBPVP8 ", "b.bmp": b"BM"}.items():
        with open(tmp_path / name, "wb") as file:
            file.write(beginning)
            file.truncate(1 << 40)  # a hole: takes no room
        assert "is larger than" in problems_of(inspect_image, tmp_path / name)[0]
