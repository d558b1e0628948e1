"""What a start took, by part, and what a step waited for."""

import json
import time

import pytest

from dopsd_jax.common.start_parts import FILE, StartParts, Waits, process_age


def clock_of(*times: float):
    return iter(times).__next__


def test_parts_follow_each_other_and_leave_nothing_out(tmp_path):
    parts = StartParts(2.0, clock_of(10, 13, 13.5, 14))
    for name in ("data", "weights", "data"):
        parts.end(name)
    assert parts.seconds == {"imports": 2.0, "data": 3.5, "weights": 0.5}
    assert parts.describe() == "start: 6.0 s: imports 2.0 s, data 3.5 s, weights 0.5 s"
    parts.write(tmp_path)
    assert json.loads((tmp_path / FILE).read_text()) == parts.seconds


def test_the_time_in_which_an_item_is_made_is_waited_and_no_other():
    waits = Waits("ab", clock_of(0, 1, 5, 5.25, 9))
    assert [(item, waits.seconds) for item in waits] == [("a", 1), ("b", 0.25)]


def test_a_process_knows_its_age():
    age, begin = process_age(), time.monotonic()
    assert 0 < age < 86400
    time.sleep(0.05)
    assert process_age() - age == pytest.approx(time.monotonic() - begin, abs=0.03)
