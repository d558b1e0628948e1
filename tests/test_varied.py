"""Variants of captions: shuffled tags and empty captions, decided by data and seed alone."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from test_loader import make, same
from test_methods import open_features, write_rows
from test_prepared import write

from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.data.prepared import Prepared
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.table import DataRow
from dopsd_jax.data.varied import EMPTY, CaptionVariants, Varied, tag_orders
from dopsd_jax.families.base import STUDENT


def test_orders_of_tags_are_distinct_and_always_the_same():
    text = "ohwx, mug, red,round , on a table"
    orders = tag_orders(text, 1, 8)
    assert len(orders) == len(set(orders)) == 8 and orders[0] == text
    assert orders[1] == "ohwx, round, red, mug, on a table"  # must never change: caches have it
    for order in orders:
        tags = [tag.strip() for tag in order.split(",")]
        assert tags[0] == "ohwx" and sorted(tags) == sorted(t.strip() for t in text.split(","))
    assert tag_orders(text, 1, 3) == orders[:3]  # more orders keep those that are encoded


@pytest.mark.parametrize(
    ("text", "keep", "expected"),
    [
        ("a mug", 0, {"a mug"}),
        ("a mug, red", 1, {"a mug, red"}),
        ("a,b", 0, {"a,b", "b, a"}),
        ("a, a, a", 0, {"a, a, a"}),
        ("x, a, a, b", 1, {"x, a, a, b", "x, a, b, a", "x, b, a, a"}),
        ("a, b", 5, {"a, b"}),
        ("", 0, {""}),
    ],
)
def test_no_more_orders_than_there_are(text, keep, expected):
    assert set(tag_orders(text, keep, 100)) == expected


def test_rows_have_orders_as_alternatives_and_an_empty_caption():
    captions = (("short_en", "a, b"), ("long_en", "c, d"))
    rows = [DataRow(Path("a.png"), captions, "a.png")]
    variants = CaptionVariants(orders=2, unshuffled="long_en", empty=True)
    (row,) = Varied(rows, variants)
    expected = ("short_en", "a, b"), ("short_en", "b, a"), ("long_en", "c, d"), (EMPTY, "")
    assert row.captions == expected and row.having("short_en") == (0, 1)


@pytest.mark.parametrize(
    ("orders", "keep", "texts", "where"),
    [
        (8, 0, ("a mug", "a cup on a table"), "has two tags with a comma between them"),
        (8, 1, ("ohwx, mug", "ohwx,"), "two tags behind the first 1, with a comma between them"),
        (8, 0, ("a mug", "a cup, red"), None),
        (1, 0, ("a mug", "a cup"), None),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_captions_without_tags_to_shuffle_are_told(tmp_path, orders, keep, texts, where, empty):
    for name, text in enumerate(texts):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    variants = CaptionVariants(orders, keep, empty=empty)
    notes = [n for n in load_rows(tmp_path, variants=variants).notes if "shuffle_tags" in n]
    assert len(notes) == (where is not None) and all(where in note for note in notes)


def test_dropout_is_a_share_of_draws_and_changes_nothing_else():
    plain, dropping = make(7, 5), make(7, 5, dropout=0.25)
    dropped = []
    for n in range(500):
        same(plain.batch(n), dropping.batch(n))
        assert plain.batch(n).dropped == ()
        dropped += dropping.batch(n).dropped
    assert len(dropped) == 2000 and 0.2 < np.mean(dropped) < 0.3
    again = make(7, 5, dropout=0.25)  # as a run that goes on at batch 321
    assert again.batch(321).dropped == dropping.batch(321).dropped
    more = make(7, 5, dropout=0.5)
    assert all(
        a <= b
        for n in range(50)
        for a, b in zip(dropping.batch(n).dropped, more.batch(n).dropped, strict=True)
    )
    part = dropping.batch(321).part(np.array([1]), 2)
    assert part.dropped == dropping.batch(321).dropped[1::2]
    assert all(all(make(7, 5, dropout=1.0).batch(n).dropped) for n in range(20))


def test_prepared_rows_keep_their_empty_captions(tmp_path):
    prepared = Prepared(write(tmp_path, keys=("short_en", EMPTY), asked=("short_en",)))
    assert prepared.prompt_keys == ("short_en",)
    assert prepared.rows[1].captions == (("short_en", "short_en 1"), (EMPTY, f"{EMPTY} 1"))
    assert len(prepared.load((1, 1))) == 2


def test_a_dropped_caption_is_the_students_alone(random_model, tmp_path):
    path = write_rows(tmp_path / "rows", {"text": "a dog"}, {"text": "a cat"})
    features = open_features(random_model, path, tmp_path, data__caption_dropout=0.5)
    own = 0, features.dataset.shape(0), np.array([1, 0]), ("-",) * 2, np.array([0, 0])
    plain, found = (
        features.batch(BatchIndex(*own, dropped=dropped), 1).contexts
        for dropped in ((), (True, False))
    )
    jax.tree.map(np.testing.assert_array_equal, plain.teacher, found.teacher)
    for place, text in enumerate(("", "a dog")):
        told = features.pipe.features(STUDENT, text)["features"]
        assert found.student.lengths[0, place] == len(told)
        ours = found.student.features[0, place, : len(told)]
        np.testing.assert_allclose(ours, told, rtol=1e-5, atol=1e-5)
