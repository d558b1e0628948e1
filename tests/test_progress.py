"""The time left is that of the work, without the compilation before it."""

import pytest

from dopsd_jax.common.progress import Countdown, duration


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("batch", "seconds"), [(1, 2.0), (8, 2.0)])
def test_the_first_batch_does_not_count(batch, seconds):
    """It compiles for 100 s; afterwards every batch takes 2 s."""
    clock, said = Clock(), []
    count = Countdown("drawing", 10 * batch, said.append, clock)
    for number in range(10):
        clock.now += 100.0 if number == 0 else seconds
        for _ in range(batch):
            count.advance()
        if number >= 2:
            assert count.left == pytest.approx(seconds * (9 - number))
    assert said[0] == f"drawing: 1/{10 * batch}"  # nothing to judge by yet
    assert said[-1] == f"drawing: {10 * batch}/{10 * batch}"
    assert all("1:4" not in line and "left" in line for line in said[2:-1])


def test_a_second_compilation_weighs_little():
    clock = Clock()
    count = Countdown("drawing", 100, lambda text: None, clock)
    for number in range(20):
        clock.now += 100.0 if number in (0, 9) else 1.0
        count.advance()
    assert count.left == pytest.approx(80.0)


def test_items_pass_unchanged_and_the_last_line_says_all():
    said = []
    assert list(Countdown("encoding", 3, said.append).over("abc")) == list("abc")
    assert said == ["encoding: 3/3"]


def test_nothing_to_do_says_nothing():
    said = []
    assert list(Countdown("encoding", 0, said.append).over([])) == [] and not said


def test_durations_read_well():
    texts = [duration(s) for s in (0.4, 59, 61, 3599.7, 3 * 3600 + 61, 51 * 3600 + 20 * 60)]
    assert texts == ["0 s", "59 s", "1:01", "1:00:00", "3:01:01", "2 d 03:20"]
