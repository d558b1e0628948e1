"""The picture that opens README.md is made by the programs of today; nothing is trained for it."""

from types import SimpleNamespace

import front
import paper_run
import pytest
from PIL import Image


@pytest.mark.slow
def test_each_way_to_train_has_its_column_and_its_scores(tmp_path, monkeypatch, capsys):
    """Students that learned nothing draw as the base does, and score as it does."""
    trained = []

    def train(bench, config, seed, start, looks):
        trained.append((config.method, config.anchor.share, config.data.path))
        return start, []

    monkeypatch.setattr(paper_run.Bench, "train", train)
    monkeypatch.setattr(front, "PROMPTS", 2)
    monkeypatch.setattr(front, "FOLDER", SimpleNamespace(value=str(tmp_path)))
    monkeypatch.setattr(front, "OUT", SimpleNamespace(value=str(tmp_path / "front.png")))
    front.main([])
    data = str(front.DATA)
    assert trained == [("sft", 0, data), ("dopsd", 0, data), ("dopsd", 0.25, data)]
    *said, path = capsys.readouterr().out.splitlines()[-4:]
    for name, line in zip(front.ARMS, said, strict=True):
        assert line.startswith(f"{name} identity ") and line.endswith(
            "crispness 1.00, retention 1.00"
        )
    with Image.open(path) as drawn:
        assert drawn.width > 5 * 192 and drawn.height > 5 * 192  # columns and prompts
