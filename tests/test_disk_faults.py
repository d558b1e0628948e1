"""Which faults of a disk are the user's to mend, and what they end with."""

import errno
import os

import pytest

from dopsd_jax.common import atomic
from dopsd_jax.common.atomic import disk_error, make_folder, write_text
from dopsd_jax.common.errors import UserError, report


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_what_the_user_must_mend_is_a_line(number):
    error = disk_error(OSError(number, os.strerror(number)), "/run/x.json")
    assert isinstance(error, UserError) and error.problems[0].startswith("/run/x.json: ")


@pytest.mark.parametrize(
    "error",
    [*(OSError(n, os.strerror(n)) for n in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)),
     TimeoutError("the store did not answer")],
)  # fmt: skip
def test_what_passes_stays_a_crash_that_names_the_file(tmp_path, monkeypatch, error):
    """Its status is not 2, so a launcher starts the same command again."""

    def fail(handle):
        raise error

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(OSError, match=r"cannot be written .*x\.json") as caught:
        report(lambda: write_text(tmp_path / "x.json", "{}"))
    assert caught.value.errno == error.errno and not list(tmp_path.iterdir())


def test_a_fault_of_a_store_without_a_number_is_told():
    assert "cannot be written (Forbidden)" in str(disk_error(OSError("Forbidden"), "gs://run/x"))


def test_a_folder_that_cannot_be_made_is_a_line(tmp_path):
    (tmp_path / "lora").write_text("in the way")
    with pytest.raises(UserError, match="lora: cannot be written"):
        make_folder(tmp_path / "lora")
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")


def test_a_full_disk_is_one_line_wherever_it_is_met(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "/run/a\nb")

    assert report(main) == 2
    wanted = "error: /run/a b: the disk is full; free some space and run again, nothing was lost\n"
    assert capsys.readouterr().err == wanted
    with pytest.raises(OSError, match="Input/output"):
        report(lambda: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
