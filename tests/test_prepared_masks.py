"""Masks in a prepared data set: they count as those of the pictures that it was made from."""

import jax
import numpy as np
import pytest
from conftest import ROOT, run_program
from PIL import Image
from test_masks import left_half
from test_methods import config_of, open_features
from test_prepared import write

from dopsd_jax.common.errors import UserError
from dopsd_jax.data import prepared_parts as parts
from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.run import build, data_set, prepared_folder

FIELDS = {"data__buckets": "64x48", "data__flip": True, "data__weights": "1,2"}


def folder(path, *masked):
    """Three pictures with captions, some of them with masks."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(len(path.name))
    for i in range(3):
        pixels = rng.integers(0, 255, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"{path.name}, picture {i}")
        if i in masked:
            mask = np.where(rng.random((48, 64)) < 0.1 * i, 128, left_half())
            Image.fromarray(mask.astype(np.uint8)).save(path / f"{i}_mask.png")
    return str(path)


@pytest.mark.slow
def test_masks_of_prepared_sets_count_as_those_of_their_pictures(random_model, tmp_path):
    """In both sets, mirrored or not; how much black counts is still free then."""
    pictures = ",".join([folder(tmp_path / "one", 0, 2), folder(tmp_path / "second", 1)])
    made, masked = str(tmp_path / "made"), {"data__masks": "files", **FIELDS}
    flags = [f"--config.{k.replace('__', '.')}={v}" for k, v in masked.items()]
    common = (f"--config={ROOT}/configs/zimage.py:random", f"--config.model={random_model}", *flags)
    common += (f"--config.data.path={pictures}", f"--workdir={tmp_path}", f"--out={made}")
    for shard, masks in ((0, "4 of 6"), (1, "2 of 6")):
        own = ("--batch=1", "--rows_per_part=6", f"--shard={shard}", "--shards=2")
        done = run_program("prepare", *common, *own)
        assert done.returncode == 0, done.stderr
        assert f"masks: {masks} rows have one" in done.stdout
    opened = lambda path, **more: open_features(random_model, path, tmp_path, **masked, **more)
    ours, theirs = (opened(path, data__mask_floor=0.25) for path in (made, pictures))
    assert ours.dataset.digest() == theirs.dataset.digest()
    assert len(ours.dataset.masked()) == 6
    count = len(ours.dataset.rows)
    index = BatchIndex(
        0, ours.dataset.shape(0), np.arange(count), ("-",) * count, np.zeros(count, int)
    )
    batches = [features.batch(index, 2) for features in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *batches)
    region = batches[0].region
    assert region.shape == (2, 6, 6, 8, 1) and 0.1 < region.min() < 0.5 < 1.5 < region.max()
    for other, said in (("off", "none"), ("alpha", "alpha,8")):
        with pytest.raises(UserError) as caught:
            open_features(random_model, made, tmp_path, **{**masked, "data__masks": other})
        assert f" files,8, now it is {said}; set it back" in caught.value.problems[0]


def test_masks_that_a_prepared_set_does_not_have(random_model, tmp_path):
    made = str(write(tmp_path / "set"))
    config = config_of(
        model=str(random_model), data__path=made, data__buckets="64x64", data__masks="files"
    )
    pipe, _ = build.open_pipeline(config, tmp_path)
    with pytest.raises(UserError) as caught:
        data_set.open_data(config, tmp_path, pipe)
    (problem,) = caught.value.problems
    assert "masks (config.data.masks, pixels of a cell) none, now it is files,8" in problem


def test_a_preparation_goes_on_with_its_own_masks_only(tmp_path):
    path = write(tmp_path / "set", masked=True)
    own = parts.read_manifest(path)
    assert prepared_folder.open_folder(path, own) == path
    settings = {k: v for k, v in own.settings.items() if k != "masks"}
    with pytest.raises(UserError) as caught:
        prepared_folder.open_folder(path, own._replace(settings=settings))
    assert "begun with masks files,8, now none; give another --out" in caught.value.problems[0]


def test_parts_are_made_again_whose_pictures_or_masks_have_changed(random_model, tmp_path):
    data, out = folder(tmp_path / "a", 1), tmp_path / "set"
    common = (
        f"--config={ROOT}/configs/zimage.py:random", f"--config.model={random_model}",
        f"--config.data.path={data}", "--config.data.buckets=64x48", "--config.data.masks=files",
        f"--workdir={tmp_path / 'work'}", f"--out={out}", "--rows_per_part=1",
    )  # fmt: skip

    def made():
        """The numbers of the parts that a call writes."""
        before = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
        done = run_program("prepare", *common)
        assert done.returncode == 0, done.stderr
        after = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
        return [i for i, path in enumerate(sorted(after)) if before.get(path) != after[path]]

    assert made() == [0, 1, 2] and made() == []
    Image.new("RGB", (64, 48)).save(tmp_path / "a/2.png")
    assert made() == [2] and made() == []
    mask = np.where(left_half(), 0, 255).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "a/1_mask.png")
    assert made() == [1] and made() == []
