"""The shipped lists of prompts and of instructions: each line is one as it stands."""

import unicodedata
from pathlib import Path

import pytest

import dopsd_jax

FOLDER = Path(dopsd_jax.__file__).parent / "data" / "prompts"
COUNTS = {"general": 500, "edits": 200}
CHINESE = {"general": 20, "edits": 7}  # at least


@pytest.fixture(params=COUNTS)
def name(request) -> str:
    return request.param


@pytest.fixture
def prompts(name) -> list[str]:
    text = (FOLDER / f"{name}.txt").read_bytes().decode("utf-8")
    assert text.endswith("\n")
    # Not splitlines(): it also cuts at characters that must not be in a prompt.
    return text.removesuffix("\n").split("\n")


def is_chinese(prompt: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in prompt)


def test_there_are_as_many_different_prompts_as_is_said(name, prompts):
    assert len(prompts) == len({prompt.casefold() for prompt in prompts}) == COUNTS[name]


def test_prompts_are_trimmed_and_have_no_control_characters(prompts):
    # Categories C: control, format, unassigned; Zl and Zp: separators of lines and paragraphs.
    bad = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
    for prompt in prompts:
        assert prompt and prompt == prompt.strip()
        assert not bad & {unicodedata.category(letter) for letter in prompt}, repr(prompt)


def test_prompts_have_1_to_60_words_or_at_most_120_chinese_characters(prompts):
    for prompt in prompts:
        assert len(prompt) <= 120 if is_chinese(prompt) else 1 <= len(prompt.split()) <= 60, prompt


def test_some_prompts_are_chinese(name, prompts):
    assert sum(map(is_chinese, prompts)) >= CHINESE[name]


def test_few_prompts_begin_with_the_usual_words(prompts):
    usual = ("a photo", "a portrait")
    assert sum(prompt.lower().startswith(usual) for prompt in prompts) <= 40
