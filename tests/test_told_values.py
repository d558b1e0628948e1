"""Values in messages stand as their user writes them: on a command line, or in a JSON file."""

import re

import jax
import pytest
from conftest import problems_of

from dopsd_jax import dopsd, families
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.config import changes, schema
from dopsd_jax.config.loading import load
from dopsd_jax.models.qwen3 import Qwen3Config

PYTHON = re.compile(r"None|True|False|\[|\(\d|\('")  # what no command line has


def checked(name, value):
    """The line about a field of a configuration file, or of a command line with it."""
    config = load("zimage:random").to_dict()
    *groups, last = name.split(".")
    (config[groups[0]] if groups else config)[last] = value
    return problems_of(schema.check, config, ["data.resolution", "data.tag_variants"])


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("data.buckets", ((832, 1248), (1024, 1024)), "data.buckets = 832x1248,1024x1024;"),
        ("data.buckets", ["64x64", "32x64"], "data.buckets = 64x64,32x64;"),
        ("data.resolution", (512, 512), "data.resolution: 512,512 names a number twice"),
        ("data.shuffle_tags", False, "data.shuffle_tags = false;"),
        ("offload", ["teacher", "x"], "config.offload: 'x' is not one of"),
    ],
)
def test_in_a_check(name, value, told):
    lines = [line for line in checked(name, value) if told in line]
    assert len(lines) == 1 and not PYTHON.search(lines[0])


def steps(loss="x0", loss_steps="all", told="all"):
    return dopsd.make_nodes((1.0, 0.5, 0.0), loss, loss_steps, jax.random.key(0), told)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: steps(loss_steps=(0, 7)), "config.loss_steps: 0,7 must name some"),
        (lambda: steps(loss=(1, 2, 3)), "config.loss: 1,2,3 is not x0"),
        (lambda: steps((0, 1), (0,)), "config.loss: 0.0,1.0 may have no weight at any step of "
         "config.loss_steps, 0, and"),
        (lambda: steps(loss_steps=(0,), told=(1,)), "steps 1 is in config.loss_steps, 0, so"),
        (lambda: families.load("zimage").grid((0.5, 1.0), None), "config.grid: 0.5,1.0,0.0 is not"),
    ],
)  # fmt: skip
def test_in_what_a_method_needs(call, told):
    (line,) = problems_of(call)
    assert told in line and not PYTHON.search(line)


def test_in_what_differs_from_a_run():
    fields = schema.flat(load("zimage:random"))
    old = {"config": fields | {"data.buckets": [[64, 64]]}, "facts": {"model_revision": None}}
    new = {
        "config": fields | {"data.flip": True, "data.buckets": ["64x64", "32x32"]},
        "facts": {"model_revision": "abc"},
    }
    buckets, flip, revision = changes.compare(old, new, [])[1]
    assert "config.data.buckets = 64x64, now 64x64,32x32;" in buckets
    assert "config.data.flip = false, now true;" in flip
    assert "model_revision none, now it is abc" in revision
    (gone,) = changes.compare(old | {"config": fields | {"old": 3}}, old | {"config": fields}, [])[
        1
    ]
    assert "config.old = 3, now nothing;" in gone


def test_in_a_json_file():
    fields = Fields({"a": True, "b": None, "c": {"d": [None, "e"]}, "f": "g"}, "x.json")
    fields.count("a")
    fields.only("b", False, None, required=True)
    fields.only("b", False, required=True)
    fields.text("c")
    fields.only("f", "h")
    assert problems_of(fields.finish) == (
        "x.json: field a is true; it must be a positive whole number",
        "x.json: field b is null; only false is supported",
        'x.json: field c is {"d": [null, "e"]}; it must be a string',
        "x.json: field f is 'g'; only 'h' is supported",
    )
    for value, kind in (([], "a list"), (None, "null"), ("a", "a string"), (3, "a number")):
        assert problems_of(Fields(value, "x").finish) == (f"x: is {kind}, not a JSON object",)
    given = {"tie_word_embeddings": None, "layer_types": [None]}
    lines = problems_of(Qwen3Config.from_dict, given, "x")
    assert not any(PYTHON.search(line.replace("[null]", "")) for line in lines)
