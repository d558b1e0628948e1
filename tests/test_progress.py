"""The time left is that of the work, without the compilation before it."""

import io

import pytest

from dopsd_jax.common.progress import CLEAR, Progress, byte_progress, duration, size


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def started(what, total, **options):
    """A progress whose clock and stream are ours."""
    clock, stream = Clock(), options.pop("stream", io.StringIO())
    return clock, stream, Progress(what, total, stream=stream, clock=clock, **options)


@pytest.mark.parametrize("batch", [1, 8])
def test_the_first_batch_does_not_count(batch):
    """It compiles for 100 s; afterwards every batch takes 2 s."""
    clock, stream, progress = started("drawing", 10 * batch)
    for number in range(10):
        clock.now += 100.0 if number == 0 else 2.0
        for _ in range(batch):
            progress.advance()
        if number >= 2:
            assert progress.left == pytest.approx(2.0 * (9 - number))
    first, *said, last = stream.getvalue().splitlines()
    assert first.split() == ["drawing", f"1/{10 * batch}"]  # nothing to judge by yet
    assert last == f"drawing {10 * batch}/{10 * batch}"
    assert said and all("left" in line and "1:" not in line for line in said)


def test_a_second_compilation_weighs_little():
    clock, _, progress = started("drawing", 100)
    for number in range(20):
        clock.now += 100.0 if number in (0, 9) else 1.0
        progress.advance()
    assert progress.left == pytest.approx(80.0)


def test_quick_items_are_measured_too():
    """Each comes less than 0.02 s after the one before."""
    clock, _, progress = started("reading", 10_000)
    for _ in range(5000):
        clock.now += 0.01
        progress.advance()
    assert progress.left == pytest.approx(50.0, rel=0.05)


def test_what_is_skipped_does_not_count_and_seconds_are_returned():
    clock, _, progress = started("step", 100)
    for seconds in (60, 2, 2, 30, 3, 3):
        clock.now += seconds
        assert progress.advance() == seconds
        clock.now += 500
        progress.skip()
    assert progress.left == pytest.approx(94 * 2.5)  # the median of 2, 2, 30 and 3


def train(total, seconds, stream, done=0):
    clock, stream, progress = started(
        "step", total, done=done, rate=lambda steps: f"{8 * steps:.3g} images/s", stream=stream
    )
    for step in range(done + 1, total + 1):
        clock.now += 40 if step == done + 1 else seconds
        progress.advance(text=f"loss {1.5 / step:.5g}")
    return stream.getvalue(), progress


def test_without_a_terminal_plain_lines_appear_from_time_to_time():
    lines = train(100, 2.0, io.StringIO())[0].splitlines()
    assert lines[0] == "step   1/100  loss 1.5"
    assert lines[1] == "step   6/100  loss 0.25  4 images/s  3:08 left"
    assert lines[-1] == "step 100/100  loss 0.015  4 images/s"
    assert len(lines) == 21


def test_time_left_counts_from_where_the_run_went_on():
    assert train(100, 2.0, io.StringIO(), 90)[0].splitlines()[1].endswith("8 s left")  # step 96


def test_on_a_terminal_the_line_is_written_over():
    text, progress = train(4, 0.5, Terminal())
    before, *lines, last = text.split(CLEAR)
    assert before == "" and len(lines) == 3 and last.startswith("step 4/4")
    assert text.count("\n") == 1 and last.endswith("\n")
    progress.note("saved")
    assert progress._stream.getvalue() == text + "saved\n"
    clock, stream, progress = started("step", 9, stream=Terminal())
    clock.now += 1
    progress.advance()
    progress.note("saved")
    assert stream.getvalue() == f"{CLEAR}step 1/9\nsaved\n"


def test_bytes_have_a_size_and_a_speed():
    clock, stream = Clock(), io.StringIO()
    progress = byte_progress("writing", stream=stream, clock=clock)
    progress.start(4 * 10**9)
    for number in range(4):
        clock.now += 20
        progress.advance(10**9, f"layer {number}")
    assert stream.getvalue().splitlines()[2:] == [
        "writing 3.00 GB/4.00 GB  layer 2  50.00 MB/s  20 s left",
        "writing 4.00 GB/4.00 GB  layer 3  50.00 MB/s",
    ]


def test_items_pass_unchanged_and_the_last_line_says_all():
    _, stream, progress = started("encoding", 3)
    assert list(progress.over("abc")) == list("abc")
    assert stream.getvalue() == "encoding 3/3\n"


@pytest.mark.parametrize(("total", "quiet"), [(0, False), (3, True)])
def test_nothing_to_do_and_a_quiet_process_say_nothing(total, quiet):
    _, stream, progress = started("encoding", total, quiet=quiet)
    list(progress.over(range(total)))
    progress.note("saved") if quiet else None
    assert not stream.getvalue()


def test_durations_and_sizes_read_well():
    texts = [duration(s) for s in (0.4, 59, 61, 3599.7, 3 * 3600 + 61, 51 * 3600 + 20 * 60)]
    assert texts == ["0 s", "59 s", "1:01", "1:00:00", "3:01:01", "2 d 03:20"]
    assert [size(n) for n in (12, 1500, 12.31e9)] == ["12 bytes", "1.50 kB", "12.31 GB"]
