"""An error in the arguments is told before the large libraries are imported."""

import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_rooms import HEAVY

from dopsd_jax import __main__ as console
from dopsd_jax import convert
from dopsd_jax.common.errors import UNREAD_EXIT, report
from dopsd_jax.methods import flow_matching
from dopsd_jax.models import kinds, quantised
from dopsd_jax.weights.lora_dialects import WRITTEN

ZIMAGE = f"--config={ROOT}/configs/zimage.py:random"
# Runs a program as `python -m` does, and writes at its end which libraries it has imported.
WATCHED = """
import atexit, json, runpy, sys
program, kept = sys.argv.pop(1), sys.argv.pop(1)
write = lambda: open(kept, "w").write(json.dumps([m.partition(".")[0] for m in sys.modules]))
atexit.register(write)
runpy.run_module(f"dopsd_jax.{program}", run_name="__main__", alter_sys=True)
"""


def run(folder, program, *arguments):
    """(exit status, stdout, stderr, libraries that were imported)."""
    kept = folder / "modules.json"
    command = [sys.executable, "-c", WATCHED, program, str(kept), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr, set(json.loads(kept.read_text()))


WITH_CONFIG = ("train", "prepare", "check", "evaluate", "estimate")
FAULTS = [
    ((), "error: --config: must be given; see --help"),
    (("--config=zimagee",), "--config zimagee: is neither a file nor a configuration"),
    (("--config=no/such/file.py",), "no/such/file.py"),
    ((f"{ZIMAGE}x",), "'randomx' is not one of"),
    ((ZIMAGE, "--no_such_option=1"), "no_such_option"),
    ((ZIMAGE, "word"), "word: not understood"),
    ((ZIMAGE, "--config.steps=0"), "config.steps: 0 must be at least 1"),
    ((ZIMAGE, "--config.lora.rnk=3"), "rnk"),
]


@pytest.mark.parametrize(("arguments", "message"), FAULTS)
def test_a_wrong_option_is_told_before_jax_is_imported(tmp_path, arguments, message):
    code, out, err, modules = run(tmp_path, "train", *arguments)
    assert code == 2 and not out
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert not HEAVY & modules


@pytest.mark.parametrize("program", console.PROGRAMS)
def test_every_program_tells_wrong_options_and_help_at_once(tmp_path, program):
    wrong = {"convert": ["inspect", "x"], "report": ["x"]}.get(program, [])
    code, _, err, modules = run(tmp_path, program, *wrong, "--no_such_option=1")
    assert code == 2 and "no_such_option" in err and len(err.splitlines()) == 1
    assert not HEAVY & modules
    code, out, err, modules = run(tmp_path, program, "--help")
    assert code == 0 and not err
    assert f"python -m dopsd_jax.{program}" in out
    assert program not in WITH_CONFIG or "--config" in out
    assert not HEAVY & modules


def test_options_that_must_be_given_are_told_together(tmp_path):
    code, _, err, _ = run(tmp_path, "sample", "--prompt=x")
    assert code == 2 and err == "error: --model, --out: must be given; see --help\n"


def test_output_that_nobody_reads_ends_a_program_quietly():
    """As behind `| head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "dopsd_jax.train", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert done.returncode == UNREAD_EXIT and not done.stderr


def test_another_pipe_that_breaks_is_a_crash():
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        report(lambda: os.write(writing, b"x"))
    os.close(writing)


@pytest.mark.parametrize("stdout", [io.StringIO(), None], ids=["text", "none"])
def test_a_pipe_breaks_where_stdout_is_no_file(monkeypatch, stdout):
    """As in a notebook, whose stdout has no number."""
    monkeypatch.setattr(sys, "stdout", stdout)

    def main():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        report(main)


def test_a_program_whose_stdout_is_closed_ends_as_another():
    """As with `>&-`: Python then has none, which only shows where more than `print` asks for it."""
    work = """if True:
        import sys
        from dopsd_jax.common import program

        def main():
            from dopsd_jax.common.progress import Progress
            list(Progress("x", 1).over([1]))

        program.parse()
        program.run(main)
    """
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", work]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stderr


ADDRESS = "https://example.org/x"
PATHS = [
    ("train", ZIMAGE, f"--workdir={ADDRESS}"), ("prepare", ZIMAGE, f"--out={ADDRESS}"),
    ("evaluate", ZIMAGE, f"--prompts={ADDRESS}"), ("estimate", f"--config={ADDRESS}"),
    ("sample", "--model=x", "--prompt=x", f"--out={ADDRESS}"), ("report", ADDRESS),
    ("caption", "--model=x", f"--images={ADDRESS}"),
    ("convert", "inspect", ADDRESS), ("convert", "import", ADDRESS, "out"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", PATHS, ids=lambda a: f"{a[0]}-{len(a)}")
def test_an_address_in_the_place_of_a_path_is_told_at_once(tmp_path, arguments):
    code, out, err, modules = run(tmp_path, *arguments)
    assert (code, out) == (2, "") and f"{ADDRESS}" in err and "is an address" in err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert not HEAVY & modules


def test_names_that_options_give_are_those_of_the_libraries():
    assert set(convert.DIALECTS) == set(WRITTEN)
    assert set(kinds.QUANTISED) == set(quantised.SCHEMES)
    assert flow_matching.LEVELS == ("logit_normal", "uniform", "shifted", "nodes")
