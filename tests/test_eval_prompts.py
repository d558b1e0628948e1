"""The prompts of a real data set: which, with which noise, shown which picture, scored as what."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dopsd_jax.common.errors import UserError
from dopsd_jax.conditioning.anchors import lines_of
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.concepts import other_pictures
from dopsd_jax.data.images import open_image
from dopsd_jax.data.measure import measure
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.sources.captions import captions_in
from dopsd_jax.evaluation import prompts, seeds
from dopsd_jax.evaluation.drawing import Painter
from dopsd_jax.families.base import STUDENT, TEACHER


@pytest.fixture
def dataset(tmp_path):
    """Six rows of a style, of which the third has no class name."""
    return made(tmp_path, " in [V] style")


def made(tmp_path, style):
    lines = []
    for i in range(6):
        Image.fromarray(np.full((64, 96 + 16 * i, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
        record = {"image": f"{i}.png", "caption": f"a horse {i}{style}", "h*w": "64*96"}
        lines.append(record if i == 3 else record | {"class_name": "Millennium"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return measure(load_rows(tmp_path / "data.jsonl"), [Bucket(96, 64), Bucket(64, 96)])


def test_rows_and_tests_have_the_noise_of_the_protocol(dataset):
    tests = [prompts.Test(prompt=f"test {i}", where=f"p:{i}") for i in range(5)]
    found = prompts.cases(dataset, tests, rows=2, scored_text=False)
    assert [(c.kind, c.prompt, c.seed) for c in found[:2]] == [
        ("training", "a horse 0 in [V] style", 30),
        ("training", "a horse 3 in [V] style", 330),
    ]
    # Tests take the two rows in turn: k = 0, 0, 1, 1, 2.
    assert [c.seed for c in found[2:]] == [31, 331, 32, 332, 33]
    assert [c.target[0, 0, 0] for c in found] == [0, 120, 0, 120, 0, 120, 0]
    assert {(c.height, c.width) for c in found} == {(64, 96)}
    many = [prompts.Test(prompt=f"test {i}", where=f"p:{i}") for i in range(150)]
    found = [c.seed for c in prompts.cases(dataset, many, rows=1, scored_text=False)]
    assert found[:100] == list(range(30, 130)) and max(found) == 129  # 130 is the next row's
    assert seeds.picture_seed(331, 0) == 331 and seeds.picture_seed(331, 2) == 2_000_331
    last = seeds.case_seed(2**31 - 1, 10**6)
    assert seeds.picture_seed(last, seeds.MOST - 1) < 2**32


def test_the_class_word_is_scored_and_the_placeholder_drawn(dataset):
    tests = [
        prompts.Test(prompt="a ship, [V]", where="p:1"),
        prompts.Test(prompt="a ship in [V] style", where="p:2", row=3),
        prompts.Test(prompt="[V] ship", where="p:3", row=1, class_name="Baroque"),
        prompts.Test(prompt="a ship", where="p:4"),
    ]
    found = prompts.cases(dataset, tests, rows=1, class_word="Fauvist")
    assert [c.prompt for c in found[1:]] == [t["prompt"] for t in tests]
    assert [c.text for c in found] == [
        "a horse 0 in Millennium style", "a ship, Millennium style", "a ship in Fauvist style",
        "Baroque style ship", "a ship",
    ]  # fmt: skip
    for drawn in ("a [V] on a beach", "a [V] dog on a beach"):
        assert prompts.with_class(drawn, "dog", style=False) == "a dog on a beach"


def test_a_test_without_the_word_that_is_taught_is_an_ordinary_prompt(dataset, tmp_path):
    """If the captions have that word: otherwise it is not known what the tests are about."""
    tests = [prompts.Test(prompt=p, where="p:1") for p in ("a [V] ship", "a ship", "a Horse")]
    kinds = lambda words=(), rows=dataset: [
        c.kind for c in prompts.cases(rows, tests, rows=1, scored_text=False, words=words)
    ]
    assert kinds() == kinds(("", "")) == ["training", "test", "ordinary", "ordinary"]
    assert kinds(("horse",)) == kinds(("HORSE",)) == ["training", "test", "ordinary", "test"]
    assert kinds(("hors", "orse")) == kinds()  # words, not letters: a banana is no ana
    assert kinds(rows=made(tmp_path, "")) == ["training", "test", "test", "test"]


def test_every_prompt_without_a_class_and_every_wrong_row_is_named(dataset):
    tests = [prompts.Test(prompt="a [V] ship", where="p:1", row=3)]
    with pytest.raises(UserError) as error:
        prompts.cases(dataset, tests, rows=6)
    assert len(error.value.problems) == 2 and all("--class_word" in p for p in error.value.problems)
    assert prompts.cases(dataset, tests, rows=6, scored_text=False)
    tests = [prompts.Test(prompt="a", where=f"p:{i}", row=6 + i) for i in range(2)]
    with pytest.raises(UserError) as error:
        prompts.cases(dataset, tests, rows=6)
    assert len(error.value.problems) == 2 and "p:1: row 7, but" in error.value.problems[1]


def test_prompts_are_read_from_text_and_from_objects(tmp_path):
    text, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("\n a ship \n\na [V] hat\n")
    assert [t["prompt"] for t in prompts.read_prompts(text)] == ["a ship", "a [V] hat"]
    objects.write_text('{"prompt": "a ship", "row": 2}\n{"prompt": "x", "class_name": "hat"}\n')
    assert [t.get("row") for t in prompts.read_prompts(objects)] == [2, None]


def test_every_fault_of_a_file_of_prompts_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": 3}\n[1]\n{"prompt": "a", "row": -1}\n{"prompt": "a", "class_name": ""}\n{"x\n'
        '{"prompt": "a", "seed": 1}\n'
    )
    with pytest.raises(UserError) as error:
        prompts.read_prompts(path)
    assert [p.split(":")[1] for p in error.value.problems] == list("123456")
    for content in (b"", b"\xff\xfe", b"a\0b"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"p\.jsonl"):
            prompts.read_prompts(path)
    with pytest.raises(UserError, match="no such file; name a file with --prompts"):
        prompts.read_prompts(tmp_path / "nowhere.txt")


def test_lines_of_prompts_end_at_line_ends_alone_and_have_their_numbers(tmp_path):
    text, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    inner = "a\x0bb\x0cc\x85d\u2028e"
    text.write_bytes(f"\r\n\n{inner}\rtwo\n".encode())
    assert lines_of(text) == [(3, inner), (4, "two")]
    assert [(t["where"], t["prompt"]) for t in prompts.read_prompts(text)] == [
        (f"{text}:3", inner),
        (f"{text}:4", "two"),
    ]
    assert captions_in(text.read_bytes(), lines=True) == ((inner, "two"), None)
    objects.write_text('\n\n{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:4: has no text"):
        prompts.read_prompts(objects)


def test_a_file_of_many_prompts_is_no_caption(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a ship\n" * 200_000)
    assert len(prompts.read_prompts(path)) == 200_000
    path.write_text(" \n")
    with pytest.raises(UserError, match="is empty; write a prompt in each line"):
        lines_of(path)


def asked_of_the_teacher(found, **teacher):
    pipe = SimpleNamespace(options=lambda role, teacher: {}, mesh=None)
    return [Painter(pipe, teacher, 1).asked(case, TEACHER) for case in found]


def test_a_teacher_is_shown_the_other_picture_that_training_shows_it(dataset):
    others = other_pictures(dataset.rows, dataset.infos, 0, "data")
    tests = [prompts.Test(prompt="a ship", where="p:1", row=3)]
    found = prompts.cases(replace(dataset, others=others), tests, rows=1, scored_text=False)
    for case, row, asked in zip(found, (0, 3), asked_of_the_teacher(found), strict=True):
        shown = open_image(others[row].image)[0, 0, 0]
        assert case.target[0, 0, 0] == 40 * row != shown
        assert asked.role == TEACHER and asked.prompt == case.prompt
        assert [picture[0, 0, 0] for picture in asked.pictures] == [shown]


def test_a_teacher_that_sees_no_picture_is_told_its_own_caption(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((64, 96, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    lines = [
        json.dumps({"image": f"{i}.png", "short_en": "a dax", "detailed_en": f"a dax at {i}"})
        for i in range(2)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    rows = load_rows(tmp_path / "data.jsonl", teacher_key="detailed_en")
    found = measure(rows, [Bucket(96, 64)])
    found = replace(found, prompt_keys=("short_en",))
    tests = [prompts.Test(prompt="a ship", where="p:1")]
    cases = prompts.cases(found, tests, rows=2, scored_text=False, teacher_key="detailed_en")
    *trained, test = asked_of_the_teacher(cases, context="prompt")
    assert [(one.role, one.prompt, list(one.pictures)) for one in trained] == [
        (STUDENT, "a dax at 0", []), (STUDENT, "a dax at 1", []),
    ]  # fmt: skip
    assert test is None, "no caption of the teacher's is known for a test"


def test_pictures_that_are_edited_are_cut_as_in_training(tmp_path):
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    for name, size in (("before", (96, 48)), ("after", (64, 64))):
        Image.new("RGB", size).save(tmp_path / name / "a.png")
    (tmp_path / "after/a.txt").write_text("make it red")
    rows = load_rows(tmp_path / "after", references=[str(tmp_path / "before")])
    size = lambda bucket, height, width, where: Bucket(width, height)
    found = measure(rows, [Bucket(64, 64)], reference_size=size)
    for cuts, expected in ((False, (48, 96, 3)), (True, (64, 64, 3))):
        (case,) = prompts.cases(found, [], rows=1, scored_text=False, cuts_references=cuts)
        assert [picture.shape for picture in case.references] == [expected]


def test_a_file_of_prompts_that_is_missing_is_told_with_what_it_must_be(tmp_path):
    with pytest.raises(UserError, match="--prompts takes text files with a prompt a line"):
        lines_of(tmp_path / "none.txt", "--prompts")
