"""The program `sample`: what it draws without being told sizes, and what it never does."""

import re

import numpy as np
import pytest
from conftest import ROOT, left_by_killed, run_program
from PIL import Image

import dopsd_jax
from dopsd_jax import push
from dopsd_jax.models import kinds
from dopsd_jax.reporting import parameters, pictures

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


def test_every_picture_has_a_line(runs):
    """Small ones are drawn together: the time left is known only if writing one took a while."""
    _, said, _ = runs
    lines = said.splitlines()
    assert len(lines) == 5
    for number in (1, 2, 3, 4):
        line = rf"picture {number}/4  \S+/000_seed{number - 1}.png(  \d+ s left)?"
        assert re.fullmatch(line, lines[number])


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


@pytest.fixture(scope="module")
def sheets(random_model, lora_file, tmp_path_factory):
    """Two prompts of a file, two seeds, two strengths."""
    out = tmp_path_factory.mktemp("sheets")
    (out / "prompts.txt").write_text("a red circle\n\na blue square, \n")
    result = run_program(
        "sample", f"--model={random_model}", f"--lora={lora_file}:0.5", "--strengths=0,2",
        f"--prompts={out / 'prompts.txt'}", "--seed=3,42", f"--out={out}", "--height=32",
        "--width=32", "--steps=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_every_prompt_seed_and_strength_is_a_picture(sheets):
    out, said = sheets
    names = {
        f"{number:03d}_seed{seed}_strength{factor}.png"
        for number in range(2)
        for seed in (3, 42)
        for factor in (0, 2)
    }
    assert {p.name for p in out.glob("0*.png")} == names
    assert "to draw 8 of 32x32" in said and f"sheet: {out / 'sheet_seed42.png'}" in said


def test_a_sheet_for_each_seed_shows_prompts_and_strengths(sheets):
    out, _ = sheets
    for seed in (3, 42):
        with Image.open(out / f"sheet_seed{seed}.png") as sheet:
            labels = pictures.read_labels(sheet)
        assert labels.title == f"seed {seed}, 2 forwards"
        assert labels.columns == ("0", "2")
        assert labels.captions == ("a red circle", "a blue square,")


def test_a_picture_says_how_it_was_drawn(sheets, random_model, lora_file):
    out, _ = sheets
    made = parameters.read_parameters(out / "001_seed42_strength2.png")
    lora = parameters.Lora("strong", 1.0, parameters.digest(lora_file))
    expected = ("a blue square,", 2, 42, 32, 32, random_model.name, 1.0, (lora,))
    assert made == parameters.Parameters(*expected)


def test_the_picture_is_that_of_the_model_with_what_it_says(sheets, random_model, lora_file):
    out, _ = sheets
    for factor, lora in ((0, ()), (2, str(lora_file))):
        pipe = dopsd_jax.load_pipeline(str(random_model), lora=lora)
        expected = pipe(["a red circle"], height=32, width=32, steps=2, seed=3)[0]
        with Image.open(out / f"000_seed3_strength{factor}.png") as picture:
            assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1


def test_a_base_in_few_bits_draws_what_python_draws_with_it(random_model, lora_file, tmp_path):
    result = run_program(
        "sample", f"--model={random_model}", f"--lora={lora_file}", "--prompt=a red circle",
        f"--out={tmp_path}", "--base_dtype=int8", "--height=32", "--width=32", "--steps=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    pipe = dopsd_jax.load_pipeline(str(random_model), lora=str(lora_file), base_dtype="int8")
    expected = pipe(["a red circle"], height=32, width=32, steps=2, seed=0)[0]
    with Image.open(tmp_path / "000_seed0.png") as picture:
        assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1


def test_weights_are_no_wider_than_activations_unless_one_asks():
    assert kinds.drawn_base("auto", "bfloat16") == "bfloat16"
    assert kinds.drawn_base("auto", "float32") is None
    assert kinds.drawn_base("float32", "bfloat16") == "float32"


def test_push_takes_the_pictures_and_leaves_the_sheets_and_the_base(sheets, lora_file):
    out, _ = sheets
    shown, others = push.gallery(out, parameters.digest(lora_file))
    assert len(shown) == 4 and all("_strength2" in path.name for path, _ in shown)
    assert len(others) == 4 and all("_strength0" in path.name for path in others)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--strengths=0,1", "--prompt=x"], "--strengths: there is nothing to weaken"),
        (["--strengths=0,strong", "--lora=a", "--prompt=x"], "--strengths 'strong'"),
        (["--seed=1,x", "--prompt=x"], "--seed 'x'"),
        (["--seed=0000000000099999999999", "--prompt=x"], "is no whole number from 0"),
        (["--seed=1,2", "--count=2", "--prompt=x"], "--count: counts seeds from one on"),
        (["--seed=4294967295", "--count=2", "--prompt=x"], "--count 2: seeds end at"),
        ([], "--prompt: there is nothing to draw"),
        (["--out=a/p.PNG", "--prompt=x"], "--out a/p.PNG: is the name of a picture; name a folder"),
    ],
)
def test_options_that_are_wrong_together_are_one_line(options, message, tmp_path):
    result = run_program("sample", "--model=x", f"--out={tmp_path}", *options)
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_pictures_to_edit_and_prompts_that_cannot_be_had_are_said(random_model, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "empty.txt").write_text("\n \n")
    command = ("sample", f"--model={random_model}", f"--out={tmp_path / 'out'}")
    (tmp_path / "long.txt").write_text("a\n\n" + f"{'b ' * 3000}\n{'c ' * 3000}\n")
    edit = run_program(
        *command, "--prompt=x", f"--reference={tmp_path / 'a.png'}", "--height=17",
        f"--prompts={tmp_path / 'long.txt'}",
    )  # fmt: skip
    assert edit.returncode == 2 and "zimage edit no pictures" in edit.stderr
    assert "image height 17" in edit.stderr
    assert all(f"long.txt:{n}: the prompt '{x} " in edit.stderr for n, x in ((3, "b"), (4, "c")))
    references = [f"--reference={tmp_path / name}.png" for name in "xy"]
    empty = run_program(*command, f"--prompts={tmp_path / 'empty.txt'}", *references)
    assert empty.returncode == 2 and "empty.txt: is empty" in empty.stderr
    assert all(f"{name}.png: no such picture" in empty.stderr for name in "xy")
    assert not (tmp_path / "out").exists()


def test_one_program_draws_prompts_of_all_lengths(random_model, tmp_path):
    """Whatever the prompts, seeds and strengths; five pictures are a batch of 3 and one of 2."""
    many = [f"--prompt={'a red circle ' * count}" for count in (1, 12, 25, 40, 60)]
    out = ("--height=512", "--width=512", "--steps=1", f"--out={tmp_path}")
    result = run_program("sample", f"--model={random_model}", *many, *out, JAX_LOG_COMPILES="1")
    assert result.returncode == 0, result.stderr
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", result.stderr)
    assert compiled.count("sample") == compiled.count("decode") == 1
    assert compiled.count("hidden_states") == 5  # of 32, 64, ... tokens
    assert len(list(tmp_path.glob("*.png"))) == 5
