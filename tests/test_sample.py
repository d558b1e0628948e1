"""The program `sample`: what it draws without being told sizes, and what it never does."""

import re

import pytest
from conftest import ROOT, left_by_killed, run_program
from PIL import Image

MINIATURE = ROOT / "examples" / "miniature" / "model"
PROMPT = "a large red heart on the left on a white background"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the same command, and their pictures after the first."""
    out = tmp_path_factory.mktemp("sample")
    command = ("sample", f"--model={MINIATURE}", f"--prompt={PROMPT}", f"--out={out}", "--count=4")
    first = run_program(*command)
    assert first.returncode == 0, first.stderr
    early = {path.name: path.read_bytes() for path in out.iterdir()}
    left_by_killed(out / "000_seed3.png").touch()
    second = run_program(*command, "--steps=2")
    assert second.returncode == 0, second.stderr
    return out, first.stdout, early


def test_without_sizes_the_model_draws_its_own(runs):
    out, said, early = runs
    assert sorted(early) == [f"000_seed{seed}.png" for seed in range(4)]
    with Image.open(out / "000_seed0.png") as picture:
        assert picture.size == (64, 64)
    assert "to draw 4 of 64x64 pixels, float32 on cpu" in said


def test_progress_leaves_compilation_out(runs):
    _, said, _ = runs
    lines = said.splitlines()
    assert len(lines) == 5
    for number in (1, 2, 4):  # with the first two nothing is known yet
        assert re.fullmatch(rf"picture {number}/4  \S+/000_seed{number - 1}.png", lines[number])
    assert re.fullmatch(r"picture 3/4  \S+/000_seed2.png  \d+ s left", lines[3])


def test_earlier_pictures_are_never_overwritten(runs):
    out, _, early = runs
    assert {name: (out / name).read_bytes() for name in early} == early
    assert len(list(out.iterdir())) == 8
    assert (out / "000_seed1_2.png").read_bytes() != early["000_seed1.png"]


@pytest.mark.parametrize("option", ["--steps=1000000000", "--seed=4294967296", "--count=10000000"])
def test_numbers_out_of_range_are_one_line(option, tmp_path):
    result = run_program("sample", "--model=x", "--prompt=y", f"--out={tmp_path}", option)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and option[2:6] in line
