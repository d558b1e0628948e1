"""What an installation offers: the programs, their names, the shipped configurations."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import dopsd_jax
from dopsd_jax import __main__ as console
from dopsd_jax.common.errors import UserError
from dopsd_jax.config import find

PACKAGE = Path(dopsd_jax.__file__).parent


def run(*args, cwd=ROOT):
    command = [sys.executable, "-m", "dopsd_jax", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def test_the_top_of_the_package_holds_what_a_user_starts_and_the_method():
    files = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert files == {*console.PROGRAMS, "dopsd"}


@pytest.mark.parametrize("args", [(), ("--help",)])
def test_the_package_lists_its_programs(args):
    code, out, err = run(*args)
    assert code == 0 and not err
    for name in console.PROGRAMS:
        assert f"\n  {name} " in out


def test_the_package_tells_its_version():
    assert run("--version") == (0, f"dopsd_jax {dopsd_jax.__version__}\n", "")


def test_an_unknown_program_is_one_line():
    code, out, err = run("trian")
    assert (code, out) == (2, "")
    assert err == "error: trian: is not a program; see dopsd-jax --help\n"


def test_a_program_starts_by_its_name(tmp_path):
    code, out, _ = run("convert", "inspect", "--help")
    assert code == 0 and "usage" in out


def test_messages_name_nothing_that_only_a_clone_has():
    found = []
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = [node for node in nodes if isinstance(node, ast.Constant)]
        texts = [str(node.value) for node in texts if id(node) not in docstrings]
        found += [t for t in texts if re.search(r"\b(tools|benchmarks|tests)/\w+", t)]
    assert not found


def test_shipped_configurations_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "configs" / "zimage.py"
    assert find.find_config("zimage") == str(path)
    assert find.find_config("zimage:tiny") == f"{path}:tiny"
    for name in ("configs/zimage.py:tiny", "own.py", "./zimage", "/a/b"):
        assert find.find_config(name) == name
    (tmp_path / "zimage").write_text("")  # a file of that name comes first
    assert find.find_config("zimage:x") == "zimage:x"
    known = r"zimagee: is neither a file nor .*; those are flux2_klein, zimage"
    with pytest.raises(UserError, match=known):
        find.find_config("zimagee:tiny")


def test_an_installation_has_its_files_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "PACKAGE", tmp_path / "dopsd_jax")
    inside, beside = tmp_path / "dopsd_jax" / "examples", tmp_path / "examples"
    beside.mkdir()
    assert find.shipped("examples") == beside
    inside.mkdir(parents=True)
    assert find.shipped("examples") == inside
