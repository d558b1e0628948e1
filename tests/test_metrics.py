"""metrics.jsonl survives interruption."""

import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax.common.errors import UserError
from dopsd_jax.reporting.metrics import MetricsWriter, plain, read_metrics


def record(step):
    return {
        "step": step,
        "loss": np.float32(1 / step),
        "loss_per_step": jnp.arange(4) / (3 * step),
        "gap": 0.5 / step,
        "images_per_second": 2,
    }


def write(workdir, steps, **options):
    with MetricsWriter(workdir, **options) as writer:
        for step in steps:
            writer.write(record(step))


def test_one_json_object_a_line_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(record(1))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    writer.write(record(2))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["loss"] == 0.5
    assert json.loads(lines[0])["loss_per_step"] == [0.0, 0.33333334, 0.6666667, 1.0]


def test_float32_has_its_shortest_form_and_only_finite_numbers_are_written(tmp_path):
    assert plain(np.float32(0.1)) == 0.1 and plain(jnp.float32(0.1)) == 0.1
    assert plain(jnp.bfloat16(0.1)) == pytest.approx(0.1, rel=1e-2)
    assert plain(float("nan")) is None and plain(np.float32("inf")) is None
    assert plain(jnp.array([1.0, jnp.nan, -jnp.inf])) == [1.0, None, None]
    assert plain(jnp.array([1, 2])) == [1, 2] and plain(np.bool_(True)) is True
    assert plain({"a": [jnp.float32(0.5)]}) == {"a": [0.5]}  # of no run, but in its file
    assert plain(1e-300) == 1e-300 and plain(3) == 3 and plain("a") == "a"
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "loss": jnp.nan})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'


@pytest.mark.parametrize("cut", [0, 1, 17, None])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, cut):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    write(whole, range(1, 9))
    # Saved at 3, cut off after 5 (perhaps in the middle of a line), gone on with from 3.
    write(parts, range(1, 6))
    path = parts / "metrics.jsonl"
    if cut is not None:
        path.write_bytes(path.read_bytes() + b'{"step": 6, "loss": 0.25}'[:cut])
    write(parts, range(4, 9), step=3)
    assert path.read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [p.name for p in parts.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_start_drops_everything(tmp_path):
    write(tmp_path, range(1, 6))
    write(tmp_path, [1])
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_steps_go_up(tmp_path):
    write(tmp_path, [1, 2])
    with MetricsWriter(tmp_path, step=2) as writer, pytest.raises(ValueError, match="step 2 after"):
        writer.write(record(2))


def test_a_half_written_last_line_is_left_out_and_other_broken_lines_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"ste\n[]\n{"step": 4}\n{"loss": 1}\n')
    with pytest.raises(UserError) as error:
        read_metrics(path)
    numbers = [p.removeprefix(f"{path}:").split(":")[0] for p in error.value.problems]
    assert numbers == ["2", "3", "5"]


def test_a_full_disk_is_told_and_leaves_whole_lines(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(record(1))

    class Full:
        """Takes ten bytes, then has no space."""

        def __init__(self, file):
            self.file, self.space = file, 10

        def write(self, data):
            if not self.space:
                raise OSError(errno.ENOSPC, "No space left on device")
            done = self.file.write(data[: self.space])
            self.space -= done
            return done

        def __getattr__(self, name):
            return getattr(self.file, name)

    real = writer._file
    writer._file = Full(real)
    with pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full"):
        writer.write(record(2))
    writer._file = real
    writer.write(record(2))
    assert [r["step"] for r in read_metrics(writer.path)] == [1, 2]


def test_only_a_file_is_read_and_only_the_first_of_many_faults(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n" * 100_000)
    with pytest.raises(UserError) as caught:
        read_metrics(path)
    assert len(caught.value.problems) == 1000
    path.write_bytes(b"x" * (3 << 20))  # without an end: cut off, but no line of metrics
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: "):
        read_metrics(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="a device or a pipe"):
        read_metrics(path)
