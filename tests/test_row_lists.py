"""What is read of a row without making it is what the row says, however rows are combined."""

import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from dopsd_jax.data.buckets import make_buckets
from dopsd_jax.data.masks import Masked
from dopsd_jax.data.measure import measure
from dopsd_jax.data.picture_index import Infos
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.sets import Joined
from dopsd_jax.data.table import WHOLE, Chosen, Table
from dopsd_jax.data.varied import EMPTY, CaptionVariants, Varied
from dopsd_jax.data.views import Viewed, views_of


def table(prefix: str = "t.jsonl") -> Table:
    """Three rows: in a file, with references and a size, and inside an archive of that name."""
    found = Table(("caption", "text"), prefix)
    found.append("x/./a.png", [("caption", "a, é"), ("caption", "b"), ("text", "日本")], line=3)
    found.append("x//b.png", [("text", "")], size=(30, 40), references=["c.png/", "../d.png"])
    found.append("e.png", [("caption", "c")], line=7, view=views_of(2)[1], concept="mug")
    return found


BOTH = Joined([table(), table("u.csv")], ["caption"])
LISTS = {
    "table": table(),
    "only": table().only(["text"]),
    "chosen": Chosen(table(), np.array([2, 0])),
    "viewed": Viewed(table(), views_of(2, True)),
    "varied": Varied(table(), CaptionVariants(orders=3, empty=True)),
    "masked": Masked(table(), ["", "m.png", ""]),
    "joined": BOTH,
    "all": Viewed(Varied(BOTH, CaptionVariants(2)), views_of(2)),
}


@pytest.mark.parametrize("name", LISTS)
def test_parts_of_rows_are_those_of_the_rows(name):
    rows = LISTS[name]
    made = list(rows)
    assert len(made) == len(rows)
    for numbers in (range(len(rows)), [*reversed(range(len(rows))), 0], []):
        own = [made[i] for i in numbers]
        assert [rows.where(i) for i in numbers] == [row.where for row in own]
        assert rows.views(numbers) == [row.view for row in own]
        assert rows.captions(numbers) == [row.captions for row in own]
        sizes = [[30, 40] if row.image.name == "b.png" else [0, 0] for row in own]
        assert rows.declared_sizes(numbers).tolist() == sizes
        names = [(str(row.image), *map(str, row.references)) for row in own]
        assert rows.pictures(numbers) == names


def test_names_are_those_of_pathlib():
    edits = (os.path.join("x", "b.png"), "c.png", os.path.join("..", "d.png"))
    assert table().pictures([0, 1]) == [(os.path.join("x", "a.png"),), edits]
    assert table().where(1) == os.path.join("x", "b.png") and table().where(0) == "t.jsonl:3"


def test_a_part_of_the_captions_leaves_the_rest_of_the_rows():
    whole, part = table(), table().only(["text"])
    assert [row.captions for row in part] == [(("text", "日本"),), (("text", ""),), ()]
    assert [(row.image, row.references, row.view, row.concept) for row in part] == [
        (row.image, row.references, row.view, row.concept) for row in whole
    ]
    assert whole.only(["text", "caption"])[0].captions == whole[0].captions


def test_the_digest_is_that_of_earlier_versions(tmp_path):
    """A run is only resumed with the data that it began with, so it may never change."""
    for i, side in enumerate((64, 96)):
        Image.new("RGB", (side, 64), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f'é, "{i}"\t\\', "utf-8")
    variants = CaptionVariants(orders=2, empty=True)
    rows = load_rows(tmp_path, variants=variants, views=views_of(mirrored=True))
    dataset, total = measure(rows, make_buckets(64)), hashlib.sha256()
    for row, info, bucket in zip(dataset.rows, dataset.infos, dataset.buckets, strict=True):
        captions = [caption for caption in row.captions if caption[0] != EMPTY]
        view = [row.view] if row.view != WHOLE else []
        total.update(json.dumps([info.digest, bucket, captions, *view]).encode())
    assert dataset.digest() == total.hexdigest()


def test_facts_of_pictures_are_taken_and_joined(tmp_path):
    for i in range(4):
        colours = ("RGBA", (i, 0, 0, 9)) if i % 2 else ("RGB", (i // 2, 0, 0))
        Image.new(colours[0], (64 + i, 64), colours[1]).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("x")
    infos = measure(load_rows(tmp_path), make_buckets(64)).infos
    taken = infos.take([3, 0])
    assert list(taken) == [infos[3], infos[0]] and list(infos.take([])) == []
    others = Infos()
    for part in (taken, infos.take([1]), Infos()):
        others.extend(part)
    assert list(others) == [infos[3], infos[0], infos[1]]
    assert [own.tolist() for own in others.remarks().values()] == [[0, 2]]
    assert others.follow_same().tolist() == [False] * 3
    assert infos.take([2, 2, 1]).follow_same().tolist() == [False, True, False]
