"""Paths that cannot be: of nobody, too long, closed. One line each, wherever a path is given."""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from conftest import problems_of
from PIL import Image

from dopsd_jax.common import atomic, lora_options
from dopsd_jax.config.loading import load
from dopsd_jax.conversion.inspection import inspect, layers_for
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.sources import uncaptioned
from dopsd_jax.evaluation import arms, data_judges
from dopsd_jax.evaluation.prompts import read_prompts
from dopsd_jax.serving.drawing import Studio
from dopsd_jax.serving.watching import Watched
from dopsd_jax.weights import hub
from dopsd_jax.weights.lora_files import read_lora

READERS = {
    "config": load,
    "rows": load_rows,
    "root": lambda path: load_rows("x", data_root=path),
    "model": hub.resolve,
    "prompts": read_prompts,
    "run": lambda path: Watched(Path(path)),
    "loras": lambda path: Studio(None, "", Path(path)),
    "inspect": lambda path: list(inspect(Path(path))),
    "layers": lambda path: layers_for(Path(path)),
    "lora": lambda path: read_lora(lora_options.lora_option(path).path, layers_for(None)),
    "result": lambda path: arms.of_run(path, None),
}
LONG = "a" * 300  # no file system takes such a name


@pytest.fixture
def top():
    """A folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def bound():
    """Within the block the modes of files bind root too, who is nobody meanwhile."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)


@pytest.mark.parametrize("path", ["~nouser9/x", LONG, f"{LONG}/x"])
@pytest.mark.parametrize("name", READERS)
def test_a_path_that_cannot_be_is_one_line(name, path):
    (problem,) = problems_of(READERS[name], path)
    assert path in problem or "data.path x" in problem


@pytest.mark.parametrize("name", sorted({*READERS} - {"root"}))
def test_a_folder_that_may_not_be_entered_is_one_line(name, top):
    (top / "closed").mkdir(mode=0)
    with bound():
        for path in ("closed", "closed/x"):
            (problem,) = problems_of(READERS[name], str(top / path))
            assert str(top) in problem


def test_judges_and_free_space_are_looked_for_where_nothing_can_be(top):
    data_judges.registered()  # imports what nobody may not
    (top / "closed").mkdir(mode=0)
    with bound():
        for path in (top / "closed", top / "closed" / "x", top / LONG):
            assert data_judges.find(path) is None
            atomic.need_space(path, 1)
    assert data_judges.find("~nouser9/x") is None


@pytest.mark.parametrize("kind", ["masks", "no ending"])
def test_a_neighbour_that_may_not_be_read_is_named(top, kind):
    Image.new("RGB", (64, 64)).save(top / "a.png")
    (top / "rows.jsonl").write_text('{"image": "a.png", "caption": "a"}\n')
    closed = top / ("masks" if kind == "masks" else "b")
    closed.mkdir() if kind == "masks" else closed.write_bytes(b"")
    closed.chmod(0)
    with bound():
        for read in (
            lambda: load_rows(top / "rows.jsonl", masks=True),
            lambda: uncaptioned.find(top, ".txt"),
        ):
            (problem,) = problems_of(read)
            assert problem.startswith(f"{closed}: cannot be read (Permission denied)")
