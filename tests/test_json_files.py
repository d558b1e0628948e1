"""Reading what others wrote: strict JSON, regular files only, messages that stay one line."""

import math
import os
import time
import tracemalloc

import pytest

from dopsd_jax.common.errors import UserError, few, raise_if, report
from dopsd_jax.common.files import read_bytes, read_text
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.common.json_files import parse_json, read_json

BAD = {
    "cut": (b'{"a": ', "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "not text": (b'{"a": "\xff"}', "not valid JSON ('utf-8' codec"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    "nan": (b'{"norm_eps": NaN}', "field norm_eps is nan, not a finite number"),
    "infinity": (b'{"a": {"shift": [1, -Infinity]}}', "field shift is -inf"),
    "too large": (b'{"rope_theta": 1e400}', "field rope_theta is inf"),
    "long number": (b'{"n": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
    "twice": (b'{"a": 1, "a": 2}', "names 'a' twice"),
    "deep": (b"[" * 100_000, "not valid JSON (maximum recursion"),
    "rather deep": (b"[" * 100 + b"]" * 100, "nested too deeply"),
    "half a character": (b'{"a": "\\ud800"}', "holds half a character"),
    "half a name": (b'{"\\udc80": 1}', "holds half a character"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "page": (b" <!DOCTYPE html><title>404</title>", "saved web page"),
    "pickle": (b"PK\3\4", "pickle"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_strict_json_is_one_line(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: ") and message in problem
    assert problem.isprintable()


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a":\r\n 1}')
    content, text = read_json(tmp_path / "a.json")
    assert content == {"a": 1} and text[0] == "{"
    assert parse_json('{"a": 1}', "here") == {"a": 1}


def test_checking_takes_little_memory_beside_the_content():
    content = b"[" + b"null," * 50_000 + b"1]"
    tracemalloc.start()
    parse_json(content, "x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20  # the list has 400 kB, its text 250 kB


def test_numbers_of_many_digits_are_infinite_for_who_checks_numbers():
    content = b'{"a": ' + b"9" * 400 + b', "b": NaN}'
    found = parse_json(content, "x", finite=False)
    assert found["a"] == math.inf and math.isnan(found["b"])


def test_what_is_no_file_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    began = time.monotonic()
    for name, said in {
        "pipe": "a device or a pipe",
        "zero": "a device or a pipe",
        "loop": "cannot be read",
        ".": "is a folder",
        "nowhere": "no such file",
        "file/below": "no such file",
        "a" * 5000: "cannot be read",
        "zero\0byte": "not a file name",
    }.items():
        with pytest.raises(UserError, match=said):
            read_bytes(tmp_path / name)
    assert time.monotonic() - began < 1


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)  # a hole: takes no room
    with pytest.raises(UserError, match="larger than 8 MiB"):
        read_text(tmp_path / "huge")
    (tmp_path / "small").write_text("12345")
    assert read_bytes(tmp_path / "small", limit=5) == b"12345"
    with pytest.raises(UserError, match="larger than"):
        read_bytes(tmp_path / "small", limit=4)


def test_names_from_files_cannot_speak_to_the_terminal():
    error = UserError("a\x1b[31mred\x07\u202ename\udc80: wrong\nhere", "x" * 100_000 + "; mend it")
    assert error.problems[0] == r"a\x1b[31mred\x07\u202ename\udc80: wrong here"
    assert len(error.problems[1]) < 2100 and error.problems[1].endswith("; mend it")
    assert UserError("é 狗 🐕: stays").problems == ("é 狗 🐕: stays",)


def test_many_problems_of_one_kind_are_three_and_the_count(capsys):
    tensors = [f"/m/x.safetensors: tensor 'layers.{i}.w' [{i}, 2] is missing" for i in range(20)]
    captions = [f"/data/{name}.png: has no caption; write {name}.txt" for name in "abcdef"]
    fields = [f"/m/config.json: field {name} is missing" for name in ("dim", "heads", "layers")]
    settings = [f"config.{name}: is nan; set a number" for name in ("a", "b", "c", "d", "e")]

    def fail():
        raise UserError(*tensors, *fields, *settings, *captions)

    assert report(fail) == 2
    lines = capsys.readouterr().err.splitlines()
    expected = [*tensors[:3], "... and 17 more like these", *fields, *settings, *captions[:3]]
    assert lines == [f"error: {line}" for line in [*expected, "... and 3 more like these"]]
    assert few(tensors[:4]) == tensors[:4]


def test_a_package_for_gs_that_is_missing_is_one_line(capsys):
    def main():
        raise ImportError("Please install gcsfs to access Google Storage")

    assert report(main) == 2
    assert "pip install 'dopsd_jax[gcs]'" in capsys.readouterr().err


def test_fields_of_every_kind_are_checked():
    wrong = {"a": "1", "b": 3, "c": [], "d": float("nan"), "e": True, "f": 10**400, "g": [1]}
    fields = Fields(wrong, "x.json")
    fields.count("a")
    fields.text("b")
    fields.table("c")
    fields.positive("d")
    fields.positive("e")
    fields.positive("f")
    fields.flag("g")
    fields.count("missing")
    fields.count("f", most=1000)
    assert (fields.text("none", ""), fields.flag("none", True)) == ("", True)
    assert (fields.count("none", default=7), fields.positive("none", 0.5)) == (7, 0.5)
    with pytest.raises(UserError) as caught:
        fields.finish()
    assert len(caught.value.problems) == 9
    assert all(p.startswith("x.json: field ") for p in caught.value.problems)


def test_millions_of_problems_are_a_thousand_and_the_count():
    with pytest.raises(UserError) as caught:
        raise_if(f"row {i}: is none" for i in range(100_000))
    assert len(caught.value.problems) == 1001
    assert caught.value.problems[-1] == "... and 99000 more"
