"""Captions in .caption and .json files beside pictures."""

import json

import pytest
from conftest import problems_of
from test_sources import picture, texts

from dopsd_jax.data.rows import load_rows


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.caption", "a mug\n", ["a mug"]),
        ("a.png.caption", "a mug", ["a mug"]),
        ("a.json", {"caption": "a mug", "width": 3}, ["a mug"]),
        ("a.png.json", {"text": "a mug"}, ["a mug"]),
        ("a.json", {"captions": ["a mug", "a red mug"], "prompt": None}, ["a mug", "a red mug"]),
        ("a.json", {"prompt": "a mug", "text": "a mug "}, ["a mug"]),
        ("a.json", {"caption": "a mug", "tags": "red, round"}, ["a mug, red, round"]),
        ("a.json", {"tags": ["mug", "red"]}, ["mug, red"]),
    ],
)
def test_sidecars_are_found_where_there_is_no_caption_file(tmp_path, name, content, expected):
    picture(tmp_path / "a.png")
    sidecar = tmp_path / name
    sidecar.write_text(content if isinstance(content, str) else json.dumps(content))
    rows = load_rows(tmp_path)
    assert texts(rows) == expected and rows.prompt_keys == ("caption",)
    assert rows.notes[0].endswith(f"without .txt come from other files beside them: {name}")
    (tmp_path / "a.txt").write_text("a cup")  # goes before all others, which are noted
    rows = load_rows(tmp_path)
    assert texts(rows) == ["a cup"] and rows.notes[0].endswith(f"are not used: {name}")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"caption": "a cup"}', "a.caption, {0} hold different captions; keep one"),
        ('{"caption": "a mug", "text": "a cup"}', "{0}: 'caption', 'text' hold different"),
        ('{"captions": {"en": "a cup"}}', "{0}: 'captions' must be text, or a list of texts"),
        ('["a cup"]', "{0}: is a list; it must be one JSON object"),
        ("{", "{0}: is not JSON"),
    ],
)
def test_sidecars_that_contradict_or_are_damaged_are_one_line(tmp_path, content, told):
    picture(tmp_path / "a.png")
    (tmp_path / "a.caption").write_text("a mug")
    (tmp_path / "a.json").write_text(content)
    (problem,) = problems_of(load_rows, tmp_path)
    assert told.format(tmp_path / "a.json") in problem


def test_a_json_beside_a_picture_that_holds_no_caption_is_none(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"width": 3, "caption": ""}')
    assert "a.png: has no caption" in problems_of(load_rows, tmp_path)[0]
    (tmp_path / "a.caption").write_text("a mug")
    assert texts(load_rows(tmp_path)) == ["a mug"]
