import itertools
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.buckets import Bucket, Shape
from dopsd_jax.data.loader import Batches, prefetch
from dopsd_jax.data.table import DataRow

KEYS = ("short_en", "medium_en", "short_zh")


def make_rows(count):
    captions = tuple((key, f"{key}!") for key in KEYS)
    return [DataRow(Path(f"{i}.png"), captions, str(i)) for i in range(count)]


def split(*sizes):
    """Rows 0..n-1 dealt to buckets of these sizes."""
    edges = np.cumsum([0, *sizes])
    return {
        Shape(Bucket(64 + 16 * i, 64)): np.arange(a, b)
        for i, (a, b) in enumerate(itertools.pairwise(edges.tolist()))
    }


def make(*sizes, batch_size=4, seed=0, **options):
    return Batches(
        split(*sizes), make_rows(sum(sizes)), KEYS, batch_size=batch_size, seed=seed, **options
    )


def same(a, b):
    assert (a.n, a.shape, a.prompt_keys) == (b.n, b.shape, b.prompt_keys)
    np.testing.assert_array_equal(a.rows, b.rows)
    np.testing.assert_array_equal(a.captions, b.captions)


def test_a_batch_depends_only_on_seed_and_number():
    one, other = make(7, 5, 1), make(7, 5, 1)
    expected = [one.batch(n) for n in range(40)]
    for n in np.random.default_rng(0).permutation(40).tolist():
        same(other.batch(n), expected[n])
    differing = make(7, 5, 1, seed=1)
    assert any(not np.array_equal(differing.batch(n).rows, expected[n].rows) for n in range(4))


def test_the_order_of_the_mapping_does_not_matter():
    by_shape = split(7, 5)
    turned = {bucket: ids[::-1] for bucket, ids in reversed(by_shape.items())}
    one, other = (
        Batches(rows, make_rows(12), KEYS, batch_size=2, seed=3) for rows in (by_shape, turned)
    )
    for n in range(20):
        same(one.batch(n), other.batch(n))


def test_the_order_is_the_same_in_every_version():
    # Resuming a run counts on this order; changing it changes what a resumed run sees.
    batches = make(3, 2, batch_size=2, seed=7)
    assert [batches.batch(n).rows.tolist() for n in range(6)] == [
        [1, 0],
        [2, 1],
        [3, 4],
        [2, 1],
        [1, 0],
        [4, 3],
    ]


@pytest.mark.parametrize("sizes", [(1,), (4,), (3, 1), (9, 4, 1), (17, 2, 2, 5)])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8])
def test_every_epoch_covers_every_row_in_batches_of_one_bucket(sizes, batch_size):
    batches = make(*sizes, batch_size=batch_size, seed=5)
    by_shape = split(*sizes)
    assert batches.per_epoch == sum(-(-size // batch_size) for size in sizes)
    for epoch in range(3):
        seen = Counter()
        for n in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch):
            batch = batches.batch(n)
            assert len(batch.rows) == batch_size
            assert set(batch.rows.tolist()) <= set(by_shape[batch.shape].tolist())
            seen.update(batch.rows.tolist())
            if len(by_shape[batch.shape]) >= batch_size:
                assert len(set(batch.rows.tolist())) == batch_size
        assert set(seen) == set(range(sum(sizes)))
        for ids in by_shape.values():
            counts = [seen[i] for i in ids.tolist()]
            assert max(counts) - min(counts) <= 1


def test_epochs_differ():
    batches = make(40, batch_size=4)
    epochs = [tuple(batches.batch(e * 10 + i).rows.tobytes() for i in range(10)) for e in range(5)]
    assert len(set(epochs)) == 5


def test_buckets_are_mixed_within_an_epoch():
    batches = make(40, 40, batch_size=4)
    order = [batches.batch(n).shape.bucket.width for n in range(20)]
    assert order != sorted(order) and order != sorted(order, reverse=True)


def test_shuffles_are_uniform():
    batches = make(6, batch_size=1)
    first = Counter(int(batches.batch(6 * epoch).rows[0]) for epoch in range(6000))
    # 1000 expected for each; five standard deviations are 144.
    assert all(abs(count - 1000) < 144 for count in first.values()), first


def test_one_key_is_drawn_for_a_batch_or_one_for_each_row():
    whole = make(32, batch_size=8)
    drawn = [whole.batch(n).prompt_keys for n in range(300)]
    assert all(len(set(keys)) == 1 for keys in drawn)
    counts = Counter(keys[0] for keys in drawn)
    assert set(counts) == set(KEYS) and min(counts.values()) > 60
    each = make(32, batch_size=8, draw="row")
    assert any(len(set(each.batch(n).prompt_keys)) > 1 for n in range(5))


def test_captions_belong_to_the_key_and_alternatives_are_all_drawn():
    captions = (("a", "1"), ("b", "2"), ("a", "3"), ("a", "4"))
    rows = [DataRow(Path("x"), captions, "x"), DataRow(Path("y"), (("b", "5"), ("a", "6")), "y")]
    batches = Batches({Shape(Bucket(16, 16)): np.arange(2)}, rows, "ab", batch_size=2, seed=0)
    drawn = Counter()
    for n in range(400):
        batch = batches.batch(n)
        for row, key, caption in zip(batch.rows, batch.prompt_keys, batch.captions, strict=True):
            assert rows[row].captions[caption][0] == key
            drawn[int(row), int(caption)] += 1
    assert set(drawn) == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)}
    assert min(drawn[0, i] for i in (0, 2, 3)) > 40


@pytest.mark.parametrize("draw", ["batch", "row"])
def test_which_caption_is_drawn_does_not_depend_on_the_key(draw):
    """As many captions of a key as there are keys: the same numbers would draw one of each."""
    captions = tuple((key, f"{key}{i}") for key in "ab" for i in range(2))
    rows = [DataRow(Path("x"), captions, "x"), DataRow(Path("y"), captions, "y")]
    shape = {Shape(Bucket(16, 16)): np.arange(2)}
    batches = Batches(shape, rows, "ab", batch_size=2, seed=0, draw=draw)
    for place in range(2):
        drawn = Counter(int(batches.batch(n).captions[place]) for n in range(400))
        assert sorted(drawn) == [0, 1, 2, 3] and min(drawn.values()) > 60


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shares", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 3], [1, 2]]])
def test_parts_make_up_every_micro_batch(shares, accumulate):
    batches = make(9, 3, batch_size=4 * accumulate, draw="row")
    for n in range(10):
        whole = batches.batch(n)
        rows = np.full((accumulate, 4), -1)
        captions, keys = rows.copy(), np.full((accumulate, 4), "", object)
        for places in shares:
            part = whole.part(np.array(places), accumulate)
            assert part.shape == whole.shape and part.n == n
            rows[:, places] = part.rows.reshape(accumulate, -1)
            captions[:, places] = part.captions.reshape(accumulate, -1)
            keys[:, places] = np.reshape(part.prompt_keys, (accumulate, -1))
        np.testing.assert_array_equal(rows.ravel(), whole.rows)
        np.testing.assert_array_equal(captions.ravel(), whole.captions)
        assert tuple(keys.ravel()) == whole.prompt_keys


def test_a_part_that_is_not_there_is_refused():
    whole = make(4, batch_size=4).batch(0)
    for places, accumulate in (([0], 3), ([4], 1), ([2], 2), ([-1], 1), ([], 1)):
        with pytest.raises(ValueError):
            whole.part(np.array(places, np.int64), accumulate)
    for wrong in ({"batch_size": 0}, {"seed": -1}, {"draw": "none"}):
        with pytest.raises(ValueError):
            make(4, **wrong)


def test_prefetch_gives_batches_in_order_from_any_start():
    batches = make(9, 3)

    def load(batch):
        time.sleep(0.005 * (batch.n % 3))
        return batch

    got = list(prefetch(batches, load, 5, 17, threads=4, ahead=4))
    assert [n for n, _ in got] == list(range(5, 17))
    for n, batch in got:
        same(batch, batches.batch(n))


def test_prefetch_loads_ahead_and_in_threads():
    loaded = {}

    def load(batch):
        loaded[batch.n] = threading.current_thread()
        return batch.n

    stream = prefetch(make(64), load, 0, 16, threads=2, ahead=4)
    assert next(stream) == (0, 0)
    patience = time.monotonic() + 20
    while len(loaded) < 4 and time.monotonic() < patience:
        time.sleep(0.01)
    assert len(loaded) >= 4
    assert threading.current_thread() not in loaded.values()
    time.sleep(0.1)
    assert len(loaded) < 16  # not everything at once
    stream.close()


def test_what_loading_raises_arrives_and_an_endless_stream_can_be_left():
    def load(batch):
        if batch.n == 3:
            raise UserError("row 3: damaged", "and more")
        return batch.n

    seen = []
    with pytest.raises(UserError) as caught:
        for n, _ in prefetch(make(64), load, 0, 2**40):
            seen.append(n)
    assert seen == [0, 1, 2] and caught.value.problems == ("row 3: damaged", "and more")
    stream = prefetch(make(64), lambda b: b.n, 0, 2**40)
    assert [next(stream)[0] for _ in range(3)] == [0, 1, 2]
    stream.close()
