"""HEIC pictures of phones: read with the extra, and one line without it."""

import io
import tarfile

import numpy as np
import pytest
from conftest import problems_of
from PIL import Image

from dopsd_jax.data import heic
from dopsd_jax.data.images import inspect_image, open_image
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.sources import uncaptioned

START = b"\0\0\0\x18ftypheic" + bytes(99)


def phone_picture(path, width=96, height=64, **options):
    pytest.importorskip("pillow_heif")
    heic.available()
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = 255, 0, 0  # the left half is red, the right one blue
    pixels[:, width // 2 :] = 0, 0, 255
    Image.fromarray(pixels).save(path, "HEIF", quality=95, **options)
    return path


def test_a_phone_s_picture_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the right when it is shown
    for name, options, shape in (("a", {}, (64, 96)), ("b", {"exif": exif.tobytes()}, (96, 64))):
        path = phone_picture(tmp_path / f"{name}.heic", **options)
        image = open_image(path).astype(int)
        assert image.shape == (*shape, 3)
        edge, far = (image[:8], image[-8:]) if options else (image[:, :8], image[:, -8:])
        assert np.abs(edge - [255, 0, 0]).max() < 30 and np.abs(far - [0, 0, 255]).max() < 30
        for verify in (True, False):
            info = inspect_image(path, verify=verify)
            assert (info.height, info.width) == shape and not info.notes
    (tmp_path / "a.txt").write_text("a mug")
    (tmp_path / "b.txt").write_text("a cup")
    assert len(load_rows(tmp_path).rows) == 2


def test_a_cut_one_is_damaged(tmp_path):
    path = phone_picture(tmp_path / "a.heic")
    content = path.read_bytes()
    for size in (20, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:size])
        assert "is damaged or truncated" in problems_of(inspect_image, path)[0]


def test_without_the_library_a_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(heic, "available", lambda: False)
    monkeypatch.delitem(Image.OPEN, heic.FORMAT, raising=False)
    for name in ("a.heic", "b.HEIF"):
        (tmp_path / name).write_bytes(START)
    problems = problems_of(load_rows, tmp_path)
    assert len(problems) == 2 and problems[0].startswith(f"{tmp_path / 'a.heic'}: HEIC is read")
    assert "pip install 'dopsd_jax[heic]'" in problems[1]
    assert uncaptioned.find(tmp_path, ".txt").faults == [*problems]  # before a model is loaded
    (tmp_path / "a.jpg").write_bytes(START)  # as some phones name them
    assert "pip install 'dopsd_jax[heic]'" in problems_of(inspect_image, tmp_path / "a.jpg")[0]
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        member = tarfile.TarInfo("a.heic")
        member.size = len(START)
        archive.addfile(member, io.BytesIO(START))
    assert "a.heic: HEIC is read with" in problems_of(load_rows, tmp_path / "set.tar")[0]
