"""Prompts of the user's own, as config.sample_prompts gives them."""

import pytest
from conftest import problems_of
from ml_collections import ConfigDict

from dopsd_jax.common.config_fields import as_list
from dopsd_jax.conditioning.own_prompts import chosen


def texts(value):
    return [prompt.text for prompt in chosen(ConfigDict({"sample_prompts": value}))]


@pytest.mark.parametrize(
    "text",
    ["a [V] dog, at night", "[V] dog in snow", "a dog like [V]", "[V]", "(a dog), [V]"],
)
def test_a_prompt_is_taken_as_it_is_written(text):
    assert texts(text) == texts([text]) == [text]


def test_files_are_named_with_commas(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(f"a {path.stem}, large\n\n[V] {path.stem}\n")
    wanted = ["a a, large", "[V] a", "a b, large", "[V] b"]
    named = ",".join(map(str, paths))
    assert texts(named) == texts(f"[{named}]") == texts([str(path) for path in paths]) == wanted
    assert texts("") == texts([]) == []
    (problem,) = problems_of(texts, f"{paths[0]},a dog")
    assert "names text files and prompts; write all prompts into a text file" in problem


def test_only_the_brackets_of_a_list_are_taken_off():
    assert as_list("(1, 0.9)") == as_list("[1,0.9]") == as_list(" 1, 0.9 ") == ("1", "0.9")
    assert as_list("[V] a, b [V]") == ("[V] a", "b [V]")
    assert as_list("layers.[0-3].to_q, x") == ("layers.[0-3].to_q", "x")
