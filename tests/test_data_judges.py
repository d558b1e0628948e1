"""A data set's own judge is found without the programs knowing it."""

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from dopsd_jax.common.errors import UserError
from dopsd_jax.evaluation import data_judges
from dopsd_jax.miniature import edits
from dopsd_jax.miniature.concepts import FILE
from dopsd_jax.miniature.data_judge import WorldJudge

DAX = Path(__file__).parents[1] / "examples" / "miniature" / "dax"


class Toy:
    """Knows folders with a file named `toy`."""

    @classmethod
    def of_folder(cls, folder):
        return cls() if (folder / "toy").exists() else None


def register(monkeypatch, *judges):
    monkeypatch.setattr(data_judges, "registered", lambda: [judge.of_folder for judge in judges])


def test_a_registered_judge_is_found_by_the_folder_alone(tmp_path, monkeypatch):
    register(monkeypatch, Toy)
    assert data_judges.find(tmp_path) is None
    assert data_judges.find(tmp_path / "nowhere") is None
    (tmp_path / "toy").touch()
    assert isinstance(data_judges.find(tmp_path), Toy)
    register(monkeypatch, Toy, type("Other", (Toy,), {}))
    with pytest.raises(UserError, match=r"several judges know this data set \(Toy, Other\)"):
        data_judges.find(tmp_path)
    register(monkeypatch)
    assert data_judges.find(tmp_path) is None


def test_the_miniature_is_declared_as_any_other_judge_would_be(tmp_path):
    names = {entry.name for entry in importlib.metadata.entry_points(group=data_judges.GROUP)}
    assert "miniature" in names
    judge = data_judges.find(DAX)
    assert isinstance(judge, WorldJudge) and judge.word == "dax"
    assert data_judges.find(tmp_path) is None


def test_a_folder_that_is_of_two_kinds_is_judged_by_neither(tmp_path):
    for name in (FILE, edits.CONCEPT):
        shutil.copy(DAX / FILE, tmp_path / name)
    with pytest.raises(UserError) as caught:
        data_judges.find(tmp_path)
    (line,) = caught.value.problems
    assert line.startswith(f"{tmp_path}: has concept.json and edited_concept.json, and the first")
    (tmp_path / FILE).unlink()
    assert data_judges.find(tmp_path).edits
