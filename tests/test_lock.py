"""One program at a time in a work directory; and no dead one in the way of the next."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import RANDOM_CONFIG, ROOT, left_by_killed, run_program

from dopsd_jax.common import processes
from dopsd_jax.common.atomic import atomic_folder, partial_of, remove_leftovers, write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.run import lock
from dopsd_jax.run.lock import exclusive, exclusive_run

HOLD = """
import os, sys, time
from dopsd_jax.run.lock import exclusive
with exclusive(sys.argv[1], "training"):
    child = os.fork() if "fork" in sys.argv else -1
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


def hold(folder, *options):
    """A process that has the lock of `folder`; and the id of its child, with `fork`."""
    command = [sys.executable, "-c", HOLD, str(folder), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()


def test_the_process_at_work_is_named(tmp_path):
    process, _ = hold(tmp_path)
    try:
        with pytest.raises(UserError) as error, exclusive(tmp_path, "training"):
            pass
    finally:
        kill(process)
    (line,) = error.value.problems
    assert f"process {process.pid} on {socket.gethostname()} (training, since 2" in line
    assert str(tmp_path) in line


@pytest.mark.parametrize("options", [(), ("fork",)])
def test_a_killed_process_never_blocks(tmp_path, options):
    """Not even when a child of it lives on and has inherited the lock."""
    process, child = hold(tmp_path, *options)
    kill(process)
    assert (tmp_path / lock.FILE).exists()
    try:
        begin = time.monotonic()
        with exclusive(tmp_path, "training"):
            assert json.loads((tmp_path / lock.FILE).read_text())["process"] == os.getpid()
            with pytest.raises(UserError), exclusive(tmp_path, "training"):
                pass
        assert time.monotonic() - begin < lock.WATCH_SECONDS
    finally:
        if child > 0:
            os.kill(child, signal.SIGKILL)


def test_the_lock_goes_when_the_block_ends(tmp_path):
    for _ in range(2):
        with exclusive(tmp_path / "new" / "run", "training"):
            pass
    assert not (tmp_path / "new" / "run").exists()  # nothing was written there
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path, "training"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.glob("*.json"))


def foreign(folder):
    content = {"host": "node7", "process": 12, "since": "2026-01-01 10:00:00", "what": "training"}
    (folder / lock.FILE).write_text(json.dumps(content | {"place": "node7 x y", "started": "1"}))


def test_a_lock_of_another_machine_counts_while_it_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WATCH_SECONDS", 1.2)
    foreign(tmp_path)
    said = []
    with exclusive(tmp_path, "training", say=said.append):
        assert len(said) == 1 and "node7" in said[0]
    foreign(tmp_path)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.2):
            os.utime(tmp_path / lock.FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 12 on node7"):
            exclusive(tmp_path, "training", say=said.append).__enter__()
    finally:
        ended.set()
        thread.join()
    assert json.loads((tmp_path / lock.FILE).read_text())["host"] == "node7"


def test_the_file_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with exclusive(tmp_path, "training"):
        os.utime(tmp_path / lock.FILE, (0, 0))
        end = time.monotonic() + 20
        while not (tmp_path / lock.FILE).stat().st_mtime:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    said = []
    with exclusive(tmp_path, "training", say=said.append):
        assert len(said) == 1 and "has no locks" in said[0]
        with pytest.raises(UserError, match=f"process {os.getpid()} on"):
            exclusive(tmp_path, "training").__enter__()
    process, _ = hold(tmp_path)
    kill(process)
    with exclusive(tmp_path, "training", say=said.append):
        pass


def test_an_object_store_is_told_of(capsys):
    with exclusive("gs://bucket/run", "training"):
        pass
    assert "has no locks" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b'{"process": "x"}'])
def test_any_content_of_a_stale_file_is_taken_over(tmp_path, content, monkeypatch):
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.1)
    (tmp_path / lock.FILE).write_bytes(content)
    with exclusive(tmp_path, "training"):
        assert json.loads((tmp_path / lock.FILE).read_text())["process"] == os.getpid()


def test_a_file_where_the_folder_is_due(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run: cannot be made"):
        exclusive(tmp_path / "run", "training").__enter__()


def test_a_full_disk_is_told_and_leaves_no_lock(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"lock\.json: the disk is full"):
            exclusive(tmp_path, "training").__enter__()
    with exclusive(tmp_path, "training"):
        pass


def test_what_killed_writers_left_is_removed(tmp_path):
    (tmp_path / "lora").mkdir()
    left = [
        left_by_killed(tmp_path / "metrics.jsonl"),
        left_by_killed(tmp_path / "lora" / "step_2.safetensors"),
        left_by_killed(tmp_path / "lora" / "step_3") / "vae",
    ]
    # Of a process that runs: this one; of another machine; of the user.
    kept = [partial_of(tmp_path / "page"), tmp_path / ".a.partial-00000000-1-1-0a1b2c3d"]
    kept += [tmp_path / "metrics.jsonl", tmp_path / "lora" / "my.partial-x"]
    for path in (*left, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    with exclusive_run(tmp_path, "training"):
        assert all(p.exists() for p in kept) and not any(p.exists() for p in left)
        assert not left[-1].parent.exists()
    os.utime(kept[1], (0, 0))
    remove_leftovers(tmp_path, name="b")
    assert all(p.exists() for p in kept)
    remove_leftovers(tmp_path)
    assert [p.exists() for p in kept] == [True, False, True, True]


def test_files_with_long_names_are_written_or_refused_in_one_line(tmp_path):
    path = tmp_path / ("ü" * 110 + "a" * 30 + ".txt")
    write_text(path, "x")
    with atomic_folder(tmp_path / ("b" * 255)) as folder:
        write_text(folder / "a", "x")
    left = left_by_killed(path)
    left.write_text("x")
    remove_leftovers(tmp_path, name=path.with_suffix(".tx").name)
    assert left.exists()
    remove_leftovers(tmp_path, name=path.name)
    assert not left.exists() and path.read_text() == "x"
    long = tmp_path / ("a" * 256)
    with pytest.raises(UserError, match="a: cannot be written"):
        write_text(long, "x")
    assert sorted(tmp_path.iterdir()) == [tmp_path / ("b" * 255), path]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "file"), [("prepare", "lock-0-of-1.json"), ("evaluate", lock.FILE)]
)
def test_other_programs_that_write_a_folder_lock_it_too(tmp_path, program, file):
    out = tmp_path / "out"
    with exclusive(out, program, file=file):
        result = run_program(program, *RANDOM_CONFIG, f"--out={out}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert f"{out}: is in use by process {os.getpid()}" in line


@pytest.mark.parametrize("process", [-1, 0, True, "1", None, 10**30])
def test_a_lock_with_a_process_that_cannot_be_does_not_block(tmp_path, monkeypatch, process):
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(lock, "_lock", lambda handle: None)  # a file system without locks
    owner = {"process": process, "place": processes.place(), "started": None}
    (tmp_path / lock.FILE).write_text(json.dumps(owner))
    with exclusive(tmp_path, "training", say=lambda line: None):
        pass


def test_a_lock_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / lock.FILE)
    with pytest.raises(UserError, match="a device or a pipe"), exclusive(tmp_path, "training"):
        pass
