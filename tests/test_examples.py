"""The examples in docstrings give what they show."""

import doctest
import importlib

import pytest
from test_rooms import MODULES, NAME

WITH_EXAMPLES = sorted(name for name, path in MODULES.items() if ">>> " in path.read_text("utf-8"))


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_are_true(name):
    found = doctest.testmod(importlib.import_module(f"{NAME}.{name}"))
    assert found.attempted and not found.failed


def test_what_a_reader_meets_first_has_an_example():
    assert {"common.flow", "common.lora_options", "data.buckets", "dopsd"} <= set(WITH_EXAMPLES)
