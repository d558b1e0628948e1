"""Rows of Parquet files, as data sets are published on the Hugging Face hub."""

import sys

import pytest
from conftest import problems_of
from test_archives import BUCKETS, content, png, write_folder

from dopsd_jax.data.measure import measure
from dopsd_jax.data.rows import load_rows

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def write(path, pictures, key="caption", **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns[key] = [f"picture {i}" for i in range(len(pictures))]
    pq.write_table(pa.table({"image": pictures, **columns}), path, row_group_size=2)
    return path


def test_a_published_data_set_holds_what_a_folder_holds(tmp_path):
    """The files of a repository of the hub; pictures as `datasets` stores them, and as bytes."""
    folder, repository = write_folder(tmp_path / "folder", 5), tmp_path / "repository"
    pictures = [png(i) for i in range(5)]
    cells = [{"bytes": picture, "path": f"{i}.png"} for i, picture in enumerate(pictures)]
    train = write(repository / "data/train-00000-of-00001.parquet", cells, label=[1] * 5)
    (repository / "README.md").write_text("card")
    bare = write(tmp_path / "bare.parquet", pictures)
    expected = load_rows(folder)
    digest = measure(expected, BUCKETS).digest()
    for path in (repository, train.parent, train, train.parent / "train-*.parquet", bare):
        rows = load_rows(path)
        assert content(rows) == content(expected), path
        assert measure(rows, BUCKETS).digest() == digest
    assert "its rows are those of data/" in load_rows(repository).notes[0]
    assert rows.rows[3].where.endswith("bare.parquet:image[3]")

    write(repository / "data/test-00000-of-00001.parquet", cells)
    rows = load_rows(repository)
    assert len(rows.rows) == 10 and "the rows of test, train are used together" in rows.notes[1]


def test_columns_of_any_name_are_found_or_asked_for(tmp_path):
    path = write(tmp_path / "a.parquet", [png(0)], "blip", source=[png(1)])
    (problem,) = problems_of(load_rows, path)
    assert "has pictures in image, source; name their column in data.image_key" in problem
    (row,) = load_rows(path, ["blip"], image_key="source").rows
    with row.image.open() as file:
        assert file.read() == png(1)
    (problem,) = problems_of(load_rows, path, ["blip"], image_key="url")
    assert "has no pictures in 'url' (its columns are 'image', 'source', 'blip')" in problem
    assert "holds no pictures" in problems_of(load_rows, write(tmp_path / "b.parquet", [7]))[0]


def test_two_columns_of_a_name_are_refused(tmp_path):
    columns = {"image": [png(0)], "text": ["x"], "other": ["y"]}
    table = pa.table(columns).rename_columns(["image", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    (problem,) = problems_of(load_rows, tmp_path / "a.parquet")
    assert problem.endswith("a.parquet: has several columns 'text'; keep one of each")


@pytest.mark.parametrize("cell", ["a.png", [b"a"], {"x": b"a"}])
def test_a_column_whose_bytes_are_none_has_no_pictures(tmp_path, cell):
    path = write(tmp_path / "a.parquet", [{"bytes": cell}])
    assert "holds no pictures (its columns are 'image'" in problems_of(load_rows, path)[0]
    (problem,) = problems_of(load_rows, path, image_key="image")
    assert "has no pictures in 'image'" in problem


@pytest.mark.parametrize("labels", [[0, 0], ["0", "0"], [0.0, 0.0]])
def test_labels_are_concepts(tmp_path, labels):
    path = write(tmp_path / "a.parquet", [png(0), png(1)], text=["x", "y"], concept=labels)
    assert [row.concept for row in load_rows(path).rows] == ["0", "0"]


def test_faults_of_rows_and_files_are_lines(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [png(0), None, png(2)], text=["x", "y", "\0"])
    assert [problem.partition(".parquet:")[2] for problem in problems_of(load_rows, path)] == [
        "image[1]: holds no picture; make the archive again",
        "image[2]: 'text' holds NUL characters; correct the text; make the archive again",
    ]
    whole = write(path, [png(0), png(1), png(2)]).read_bytes()
    rows = load_rows(path)
    for damaged in (b"PAR1", whole[:-9], whole[:4] + bytes(60) + whole[64:]):
        path.write_bytes(damaged)
        assert "a.parquet: is no Parquet file, or is damaged" in problems_of(load_rows, path)[0]
    with pytest.raises(Exception, match=r"a\.parquet: cannot be read"):
        rows.rows[0].image.read()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'dopsd_jax[parquet]'" in problems_of(load_rows, path)[0]


def test_text_that_is_no_utf8_is_damage(tmp_path):
    texts = pa.array([b"a", b"\xe7"], pa.binary()).cast(pa.string(), safe=False)
    table = pa.table({"image": [png(0), png(1)], "caption": texts})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "is damaged ('utf-8' codec" in problems_of(load_rows, tmp_path / "a.parquet")[0]


def test_faults_are_not_read_to_the_end(tmp_path):
    table = pa.table({"image": [b""] * 3000, "caption": ["x"] * 3000})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "so many faults" in problems_of(load_rows, tmp_path / "a.parquet")[0]
