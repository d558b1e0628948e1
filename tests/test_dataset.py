import json

import numpy as np
import pytest
from PIL import Image

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.buckets import UPSTREAM, Bucket, Shape, make_buckets
from dopsd_jax.data.dataset import describe
from dopsd_jax.data.images import ImageLimits, fit, open_image
from dopsd_jax.data.loader import Batches
from dopsd_jax.data.measure import measure
from dopsd_jax.data.rows import load_rows
from dopsd_jax.random_model import synthetic


def write_set(folder, sizes, **fields):
    lines = []
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
        record = {"path": f"{i}.png", "short_en": f"picture {i}", "detailed_en": "long " * (i + 1)}
        lines.append(json.dumps(record | {key: value[i] for key, value in fields.items()}))
    (folder / "d.jsonl").write_text("\n".join(lines))
    return load_rows(folder / "d.jsonl")


def test_rows_go_to_their_buckets(tmp_path):
    rows = write_set(tmp_path, [(126, 83), (177, 236), (50, 50), (83, 126), (64, 64)])
    dataset = measure(rows, UPSTREAM)
    assert [str(b) for b in dataset.buckets] == [
        "1248x832", "864x1152", "1024x1024", "832x1248", "1024x1024",
    ]  # fmt: skip
    by_shape = dataset.rows_by_shape()
    assert by_shape[Shape(Bucket(1024, 1024))].tolist() == [2, 4]
    assert sorted(np.concatenate(list(by_shape.values())).tolist()) == [0, 1, 2, 3, 4]


def test_faults_of_all_pictures_are_told_at_once_with_their_rows(tmp_path):
    rows = write_set(tmp_path, [(64, 64)] * 4)
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    with pytest.raises(UserError) as caught:
        measure(rows, UPSTREAM)
    assert len(caught.value.problems) == 2
    assert "d.jsonl:2: " in caught.value.problems[0] and "1.png: is empty" in str(caught.value)
    assert "d.jsonl:4: " in caught.value.problems[1] and "3.png: is damaged" in str(caught.value)
    assert len(measure(write_set(tmp_path, [(64, 64)]), UPSTREAM, ImageLimits()).rows) == 1


def test_without_verification_damage_behind_the_header_passes(tmp_path):
    rows = write_set(tmp_path, [(300, 300)])
    content = bytearray((tmp_path / "0.png").read_bytes())
    content[60] ^= 255
    (tmp_path / "0.png").write_bytes(content)
    assert len(measure(rows, UPSTREAM, verify=False).rows) == 1
    with pytest.raises(UserError):
        measure(rows, UPSTREAM)


def test_a_wrong_declared_size_is_told_and_not_used(tmp_path):
    rows = write_set(tmp_path, [(64, 96), (64, 96)], **{"h*w": ["96*64", "64*96"]})
    dataset = measure(rows, UPSTREAM)
    assert [str(b) for b in dataset.buckets] == ["832x1248"] * 2
    (note,) = [note for note in dataset.notes if "disagrees" in note]
    assert "in 1 of 2 rows" in note and "d.jsonl:2 (96x64, is 64x96)" in note


def test_the_report_says_what_there_is(tmp_path):
    rows = write_set(tmp_path, [(64, 64)] * 3 + [(2000, 1400)])
    lines = describe(measure(rows, UPSTREAM), batch_size=2)
    text = "\n".join(lines)
    assert "data: 4 rows (a picture with its captions), 4 different pictures, digest " in text
    assert "bucket 1024x1024: 3 rows, 3 of them enlarged" in text
    assert "bucket 1152x832" not in text and "bucket 1248x832: 1 rows, 0 of them enlarged" in text
    assert "captions under 'short_en': 4, of 9 to 9 characters (median 9)" in text
    assert "captions under 'detailed_en': 4, of 5 to 20 characters (median 12.5)" in text
    assert "batches of 2: 3 an epoch, 2 places filled by repeating rows" in text
    assert "3 of 4 pictures are smaller than their bucket and are enlarged, up to 16.00" in text
    assert "note: " in text and "prompt keys short_en, detailed_en" in text


def test_the_report_agrees_with_the_batches(tmp_path):
    rows = write_set(tmp_path, [(64, 64)] * 5 + [(64, 96)] * 3)
    dataset = measure(rows, UPSTREAM)
    options = {"batch_size": 4, "seed": 0}
    batches = Batches(dataset.rows_by_shape(), dataset.rows, dataset.prompt_keys, **options)
    assert f"batches of 4: {batches.per_epoch} an epoch" in "\n".join(describe(dataset, 4))


def test_repeated_pictures_are_noted(tmp_path):
    rows = write_set(tmp_path, [(64, 64)] * 3)
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes())
    dataset = measure(rows, UPSTREAM)
    assert any("2 rows share a picture" in note for note in dataset.notes)
    assert "data: 3 rows (a picture with its captions), 2 different" in describe(dataset, 1)[0]


def test_the_digest_follows_pictures_captions_and_buckets(tmp_path):
    def digest(buckets=UPSTREAM):
        return measure(load_rows(tmp_path / "d.jsonl"), buckets).digest()

    write_set(tmp_path, [(64, 64), (64, 80)])
    first = digest()
    assert digest() == first
    assert digest(make_buckets(512)) != first
    text = (tmp_path / "d.jsonl").read_text()
    (tmp_path / "d.jsonl").write_text(text.replace("picture 1", "picture I"))
    assert digest() != first
    (tmp_path / "d.jsonl").write_text(text)
    assert digest() == first
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    assert digest() != first


# --- the drawn example


def test_the_drawn_set_is_an_ordinary_folder(tmp_path):
    folder = synthetic.write_folder(tmp_path / "drawn", count=8)
    dataset = measure(load_rows(folder), make_buckets(128))
    assert len(dataset.rows) == 8 and len(dataset.rows_by_shape()) > 1
    assert not dataset.notes
    captions = [row.captions[0][1] for row in dataset.rows]
    assert len(set(captions)) == 8
    for shape in synthetic.SHAPES:
        assert sum(shape in caption for caption in captions) == 1


def test_drawing_is_deterministic_and_leaves_finished_files_alone(tmp_path):
    folder = synthetic.write_folder(tmp_path, count=3)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    (tmp_path / "001.png").write_bytes(b"half")
    synthetic.write_folder(tmp_path, count=3)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    assert {n: c for n, (c, _) in before.items()} == {n: c for n, (c, _) in after.items()}
    assert before["000.png"] == after["000.png"]
    assert not np.array_equal(synthetic.draw(0, 0, 64, 64)[0], synthetic.draw(8, 0, 64, 64)[0])


def test_a_folder_of_other_pictures_is_not_touched(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "mine.png")
    with pytest.raises(UserError, match=r"holds other pictures or captions \(mine.png\)"):
        synthetic.write_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.png"]


@pytest.mark.parametrize("number", range(16))
def test_pictures_show_what_their_captions_say(number):
    picture, caption = synthetic.draw(0, number, 160, 128)
    assert picture.shape == (128, 160, 3) and picture.dtype == np.uint8
    colour = next(rgb for name, rgb in synthetic.COLOURS.items() if f" {name} " in caption)
    there = np.abs(picture.astype(int) - colour).max(-1) == 0
    ys, xs = np.nonzero(there)
    assert 0.01 < there.mean() < 0.5
    x, y = (xs.min() + xs.max()) / 2 - 79.5, (ys.min() + ys.max()) / 2 - 63.5
    places = {"left": x < -20, "right": x > 20, "top": y < -15, "bottom": y > 15}
    for word, holds in places.items():
        assert holds == (f"{word} on a" in caption), (caption, x, y)
    for edge in (there[0], there[-1], there[:, 0], there[:, -1]):
        assert not edge.any(), caption


def test_drawn_edges_are_smooth():
    large, _ = synthetic.draw(0, 0, 512, 512)
    small, _ = synthetic.draw(0, 0, 128, 128)
    assert np.abs(fit(large, 128, 128).astype(int) - small).mean() < 1


def test_drawn_pictures_can_be_read_back(tmp_path):
    synthetic.write_folder(tmp_path, count=2)
    picture, caption = synthetic.draw(0, 1, *synthetic.SIZES[1])
    np.testing.assert_array_equal(open_image(tmp_path / "001.png"), picture)
    assert (tmp_path / "001.txt").read_text() == f"{caption}\n"
