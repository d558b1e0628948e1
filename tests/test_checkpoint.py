"""Checkpoints: what is damaged is found, the newest good one is used, and none is lost."""

import concurrent.futures
import contextlib
import errno
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax.common.errors import UserError
from dopsd_jax.parallel.multihost import SharedError
from dopsd_jax.training import checkpoint
from dopsd_jax.training.checkpoint import Checkpoints, flatten


def state(n):
    weights = jax.random.normal(jax.random.key(n), (40, 30))
    return {"student": {"a": weights, "b": -weights}, "step": jnp.int32(n)}


def saved(folder, steps, **options):
    checkpoints = Checkpoints(folder, **{"keep": 3} | options)
    for step in steps:
        checkpoints.save(step, state(step))
    checkpoints.close()
    return checkpoints


def restored(folder):
    """What a new run finds, and the lines it prints."""
    said = []
    found = Checkpoints(folder, keep=3).restore(state(0), said.append)
    return found, said


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with steps 1 and 2; do not write into it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saved(folder, (1, 2))
    return folder


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_another_process_is_writing_is_no_part_of_a_checkpoint(tmp_path, monkeypatch):
    """Its file of digests is there under another name first, and gone a moment later."""
    folder, write_text = tmp_path / "run", checkpoint.write_text

    def both(path, text):
        (path.parent / ".digests.1.json.partial-77-0").write_text("{")
        write_text(path, text)

    monkeypatch.setattr(checkpoint, "write_text", both)
    saved(folder, (1,))
    monkeypatch.undo()
    (step, _), said = restored(folder)
    assert step == 1 and not said
    assert list((folder / "1").glob(".digests.*"))


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, lambda path: path.unlink()])
def test_damage_to_any_file_is_found_and_the_one_before_used(pair, tmp_path, damage):
    names = [p.relative_to(pair) for p in files_of(pair / "2")]
    assert len(names) >= 4 and max((pair / n).stat().st_size for n in names) > 4000
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(pair, folder)
        damage(folder / name)
        (step, found), said = restored(folder)
        assert step == 1, name
        np.testing.assert_array_equal(found["student"]["a"], state(1)["student"]["a"])
        assert len(said) == 1 and f"{folder / '2'}: cannot be restored" in said[0], name


def test_a_whole_checkpoint_comes_back_bit_for_bit(pair):
    (step, found), said = restored(pair)
    assert step == 2 and not said
    for name, leaf in flatten(state(2)).items():
        np.testing.assert_array_equal(flatten(found)[name], leaf)


def test_a_save_that_failed_is_noticed_at_once_and_the_present_state_saved(tmp_path, monkeypatch):
    checkpoints, write_text = Checkpoints(tmp_path, keep=3), checkpoint.write_text

    def fail(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def save(step):
        checkpoints.save(step, state(step))
        while not checkpoints.failed:
            time.sleep(0.01)

    monkeypatch.setattr(checkpoint, "write_text", fail)
    save(1)
    monkeypatch.setattr(checkpoint, "write_text", write_text)
    with pytest.raises(UserError, match=r"the disk is full.* goes on from step 2"):
        checkpoints.rescue(2, state(2))
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    # Where that fails too, the line is the same.
    monkeypatch.setattr(checkpoint, "write_text", fail)
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(3)
    with pytest.raises(UserError, match=r"the disk is full.* goes on from step 2"):
        checkpoints.rescue(4, state(4))
    assert not checkpoints.failed
    checkpoints.close()


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("own", "other", "status"),
    [(None, None, 0), (FULL, TimeoutError("key 7"), 2), (TimeoutError("key 7"), FULL, 2),
     (TimeoutError("key 7"), None, 1), (None, TimeoutError("key 7"), 1)],
)  # fmt: skip
def test_a_fault_of_one_process_ends_all(tmp_path, monkeypatch, capsys, own, other, status):
    """A full disk is told as one, whatever the others see of it; the rest stays a crash."""
    ended, told = [], []
    for error in (other, own):
        future = concurrent.futures.Future()
        future.set_exception(error) if error else future.set_result(None)
        ended.append(future)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def gather(value):
        told.append(value)
        return [value] if len(told) == 1 else [value, told[0]]

    monkeypatch.setattr(checkpoint.multihost, "gather", gather)
    checkpoints = Checkpoints(tmp_path, keep=1)
    with contextlib.suppress(Exception):
        checkpoints._end_together(ended[0])
    capsys.readouterr()
    wanted = {0: contextlib.nullcontext, 1: lambda: pytest.raises(OSError, match="key 7"),
              2: lambda: pytest.raises(SharedError, match="disk is full")}  # fmt: skip
    if status == 1 and own is None:
        wanted[1] = lambda: pytest.raises(RuntimeError, match="in process 1: TimeoutError: key 7")
    with wanted[status]():
        checkpoints._end_together(ended[1])
    assert ("process 0: " in capsys.readouterr().err) == (own is not None)


def test_the_newest_and_the_regular_ones_are_kept(tmp_path):
    assert saved(tmp_path, range(1, 8), keep=2, every=3).steps == [3, 6, 7]


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restored(tmp_path / "new") == (None, [])


def test_a_damaged_checkpoint_is_written_again_and_counts_for_nothing(pair, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pair, folder)
    flip_a_bit(max(files_of(folder / "2"), key=lambda p: p.stat().st_size))
    checkpoints = Checkpoints(folder, keep=1)
    assert checkpoints.restore(state(0), lambda line: None)[0] == 1
    assert checkpoints.steps == [1, 2]  # nothing is removed before something better is there
    checkpoints.save(2, state(2))
    checkpoints.close()
    assert checkpoints.steps == [2]
    assert restored(folder)[0][0] == 2


def test_a_later_damaged_checkpoint_does_not_push_out_a_good_one(pair, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pair, folder)
    shutil.copytree(folder / "2", folder / "9")
    cut_in_half(max(files_of(folder / "9"), key=lambda p: p.stat().st_size))
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.restore(state(0), lambda line: None)[0] == 2
    checkpoints.save(3, state(3))
    checkpoints.close()
    assert checkpoints.steps == [2, 3]


def test_a_save_that_was_cut_off_does_not_count(pair, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pair, folder)
    (folder / "2" / "digests.0.json").unlink()  # stopped between orbax's commit and the digests
    (folder / "3.orbax-checkpoint-tmp").mkdir()
    (step, _), said = restored(folder)
    assert step == 1 and len(said) == 1 and "cut off" in said[0]
    assert not list(folder.glob("*tmp*"))


def test_folders_renamed_into_each_other_are_found(pair, tmp_path):
    """Each is whole, but holds the state of another step."""
    folder = tmp_path / "run"
    shutil.copytree(pair, folder)
    (folder / "2").rename(folder / "3")
    (step, found), said = restored(folder)
    assert step == 1 and found["step"] == 1
    assert len(said) == 1 and "3: cannot be restored (it holds step 2" in said[0]
    (folder / "1").rename(folder / "2")
    with pytest.raises(UserError, match="none of the checkpoints") as error:
        restored(folder)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_never_used(tmp_path, bad):
    saved(tmp_path, (1,))
    spoilt = state(2)
    spoilt["student"]["a"] = spoilt["student"]["a"].at[3, 4].set(bad)
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(2, spoilt)
    checkpoints.close()
    (step, _), said = restored(tmp_path)
    assert step == 1 and len(said) == 1 and "not finite" in said[0]


def test_other_folders_are_no_checkpoints(pair, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pair, folder)
    for name in ("07", "²", "9" * 200, "3 (copy)"):
        (folder / name).mkdir()
    (step, _), said = restored(folder)
    assert step == 2 and not said


def test_one_processs_digests_are_not_enough(pair, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pair, folder)
    path = folder / "2" / "digests.0.json"
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    assert restored(folder)[0][0] == 1


def test_another_kind_of_state_is_refused_and_nothing_removed(pair):
    with pytest.raises(UserError, match="none of the checkpoints"):
        Checkpoints(pair, keep=1).restore({"other": jnp.zeros(2)}, lambda line: None)
    assert Checkpoints(pair, keep=1).steps == [1, 2]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"step": "2", "processes": 1, "files": {}}',
                '{"step": 2, "processes": 1, "files": []}', "[" * 5000],
)  # fmt: skip
def test_digests_of_wrong_kinds_are_damage(tmp_path, content):
    folder = tmp_path / "checkpoints" / "2"
    folder.mkdir(parents=True)
    (folder / "digests.0.json").write_text(content)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    assert checkpoints.steps == [2]
    assert checkpoints._faults(2) == ["digests.0.json is damaged"]
