"""The shipped list of general prompts: each line is a prompt as it stands."""

import unicodedata
from pathlib import Path

import pytest

import dopsd_jax

FILE = Path(dopsd_jax.__file__).parent / "data" / "prompts" / "general.txt"


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    text = FILE.read_bytes().decode("utf-8")
    assert text.endswith("\n")
    # Not splitlines(): it also cuts at characters that must not be in a prompt.
    return text.removesuffix("\n").split("\n")


def is_chinese(prompt: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in prompt)


def test_there_are_500_different_prompts(prompts):
    assert len(prompts) == len({prompt.casefold() for prompt in prompts}) == 500


def test_prompts_are_trimmed_and_have_no_control_characters(prompts):
    # Categories C: control, format, unassigned; Zl and Zp: separators of lines and paragraphs.
    bad = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
    for prompt in prompts:
        assert prompt and prompt == prompt.strip()
        assert not bad & {unicodedata.category(letter) for letter in prompt}, repr(prompt)


def test_prompts_have_1_to_60_words_or_at_most_120_chinese_characters(prompts):
    for prompt in prompts:
        assert len(prompt) <= 120 if is_chinese(prompt) else 1 <= len(prompt.split()) <= 60, prompt


def test_at_least_20_prompts_are_chinese(prompts):
    assert sum(map(is_chinese, prompts)) >= 20


def test_few_prompts_begin_with_the_usual_words(prompts):
    usual = ("a photo", "a portrait")
    assert sum(prompt.lower().startswith(usual) for prompt in prompts) <= 40
