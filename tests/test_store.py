"""What a run writes into an object store (gs://) is what it writes into a folder."""

import json

import numpy as np
import pytest
from etils import epath

from dopsd_jax import families
from dopsd_jax.common.atomic import atomic_file, write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.file_digests import file_digests
from dopsd_jax.reporting import metrics, pictures
from dopsd_jax.reporting.metrics import MetricsWriter, read_metrics
from dopsd_jax.reporting.run_page import write_report
from dopsd_jax.run import build, data_set
from dopsd_jax.run.workdir import find_workdir
from dopsd_jax.training import checkpoint

CONFIG = {"train": "lora", "model": "folder", "data": {"path": "photos", "cache": ""}}


def write_run(workdir):
    """What stands in a work directory besides checkpoints."""
    for first, last in ((0, 5), (3, 8)):  # cut off behind step 5, gone on with from 3
        with MetricsWriter(workdir, first) as writer:
            for step in range(first + 1, last + 1):
                writer.write({"step": step, "loss": 1 / step, "gap": 0.5})
    rows = [pictures.GridRow("a cat", (np.full((32, 32, 3), 90, np.uint8),))]
    pictures.save_grid(pictures.sample_path(workdir, 4), ("tuned",), rows)
    write_report(workdir)


def test_metrics_pictures_and_report(bucket, tmp_path):
    remote, local = epath.Path(f"{bucket}/runs/dog"), epath.Path(tmp_path / "dog")
    local.mkdir()
    write_text(remote / "config.json", json.dumps({"config": {"steps": 8}}))
    write_text(local / "config.json", json.dumps({"config": {"steps": 8}}))
    write_run(remote), write_run(local)
    assert [record["step"] for record in read_metrics(remote / "metrics.jsonl")] == [*range(1, 9)]
    for name in ("metrics.jsonl", "samples/step_000004.png", "report.html"):
        assert (remote / name).read_bytes() == (local / name).read_bytes(), name
    assert sorted(path.name for path in remote.iterdir()) == sorted(p.name for p in local.iterdir())


def test_metrics_that_cannot_be_stored_for_a_moment_end_no_run(bucket, monkeypatch):
    """Before a checkpoint they must be stored."""
    said = []
    writer = MetricsWriter(epath.Path(f"{bucket}/run"), say=said.append)

    def away(path):
        raise TimeoutError("the store did not answer")

    with monkeypatch.context() as patched:
        patched.setattr(metrics, "atomic_file", away)
        patched.setattr(metrics, "STORE_SECONDS", 0)
        writer.write({"step": 1})
        assert said == ["the store did not answer; it is tried again"]
        with pytest.raises(TimeoutError):
            writer.flush()
    writer.write({"step": 2})
    writer.close()
    assert [r["step"] for r in read_metrics(writer.path)] == [1, 2]


def test_a_file_that_is_not_finished_does_not_appear(bucket):
    path = epath.Path(f"{bucket}/a")
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half of")
        raise KeyboardInterrupt
    assert path.read_text() == "old"


def test_the_files_of_a_checkpoint_are_found_and_hashed(bucket, tmp_path):
    names = ["_METADATA", "state/d/abc", "state/manifest"]
    digests = []
    for folder in (epath.Path(f"{bucket}/checkpoints/2"), epath.Path(tmp_path)):
        for name in (*names, "digests.0.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"content of {name}")
        assert checkpoint._files(folder) == names
        digests.append(file_digests(folder, names))
    assert digests[0] == digests[1] and len(set(digests[0].values())) == 3


def test_what_needs_a_folder_is_said_at_once(bucket):
    with pytest.raises(UserError, match="features cannot be cached in gs://"):
        find_workdir(f"{bucket}/run", CONFIG)
    with pytest.raises(UserError) as caught:
        find_workdir(f"{bucket}/run", CONFIG | {"model": "random", "train": "full"})
    assert len(caught.value.problems) == 3


def test_where_no_folder_is_named_it_is_that_of_the_family():
    for family, name in ((families.AUTO, "zimage"), ("flux2_klein", "flux2_klein")):
        assert find_workdir(None, CONFIG | {"family": family}) == epath.Path("runs") / name


def test_prepared_data_need_no_folder(bucket):
    write_text(epath.Path(f"{bucket}/set/prepared.json"), "{}")
    config = build.ConfigDict(CONFIG | {"data": {"path": f"{bucket}/set", "cache": ""}})
    workdir = find_workdir(f"{bucket}/run", config)
    assert "://" not in str(data_set.cache_folder(config, workdir))


def test_a_file_in_the_place_of_a_work_directory_is_told(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run: is a file; name a folder"):
        find_workdir(str(tmp_path / "run"), CONFIG)
