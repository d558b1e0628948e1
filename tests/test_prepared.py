"""A prepared data set trains as the data it was made from, and nothing damaged is read."""

import io
import json
import os
import shutil
import zlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import RANDOM_CONFIG, left_by_killed, problems_of, run_program
from etils import epath
from PIL import Image
from test_processes import free_port, start

from dopsd_jax.common.errors import UserError
from dopsd_jax.conditioning.encoding import STUDENT, TEACHER, Encoder
from dopsd_jax.config.fields import defaults
from dopsd_jax.data import prepared_parts as parts
from dopsd_jax.data.buckets import make_buckets
from dopsd_jax.data.measure import measure
from dopsd_jax.data.prepared import Prepared
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.views import views_of
from dopsd_jax.families.pipeline import pipeline
from dopsd_jax.random_model.synthetic import write_folder
from dopsd_jax.run import data_set

SETTINGS = {"buckets": [[64, 64]], "dtype": "float32"}
CHANNELS = 6
CELLS = np.arange(64, dtype=np.uint8).reshape(8, 8)  # of the mask of row 0


def features(row, caption, role, dtype):
    """A text of its own length; for the teacher also two arrays as a picture's latents are."""
    length, rng = 3 + row + 2 * caption + 7 * role, np.random.default_rng([row, caption, role])
    shapes = {"text": (length, CHANNELS)}
    shapes |= {"first": (2 + row % 2, 4, 3), "second": (1, 2, 3)} if role == TEACHER else {}
    types = {"text": dtype, "first": np.float32, "second": np.float32}
    return {name: rng.normal(size=shape).astype(types[name]) for name, shape in shapes.items()}


def png(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def longest(prepared, role):
    return max(shapes["text"][0] for shapes in prepared.shapes(role))


def test_a_prepared_set_is_found_in_the_home_folder(tmp_path, monkeypatch):
    """A shell expands no ~ in --config.data.path=~/features."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "features")
    assert parts.names_prepared("~/features") and not parts.names_prepared("~/other")
    assert len(Prepared("~/features").rows) == 5


def test_ways_of_reading_rows_are_those_that_the_data_were_prepared_with():
    config = defaults()
    config.data.trigger, config.data.folder_repeats = "dax", True
    assert data_set.reading(config) == {"trigger": "dax", "folder_repeats": True}
    of = lambda **made: SimpleNamespace(folder="set", manifest=SimpleNamespace(settings=made))
    data_set.check_reading(config, of(reading=data_set.reading(config)))
    data_set.check_reading(config, of())  # an older set does not say
    data_set.check_reading(defaults(), of(reading=data_set.reading(config)))
    first, second = problems_of(data_set.check_reading, config, of(reading={"trigger": "ohwx"}))
    assert "config.data.folder_repeats: has no effect on prepared data" in first
    assert "config.data.trigger" in second and "was prepared with ohwx; leave it out" in second


def write(
    folder, rows=5, rows_per_part=2, dtype=np.float32, keys=("short_en", "detailed_en"), wrong=None,
    asked=None, masked=False,
):  # fmt: skip
    """A small prepared data set; its pictures are those of rows 0 and 3.

    `wrong`: a row whose captions have other keys. `asked`: the manifest's keys, if not all.
    `masked`: row 0 has a mask.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS | ({"masks": ["files", 8]} if masked else {})
    manifest = parts.Manifest(rows, rows_per_part, asked or keys, "f" * 64, settings)
    parts.write_manifest(folder, manifest)
    for number in range(manifest.parts):
        records, made, pictures = [], [], b""
        for row in manifest.rows_of(number):
            shown = []
            if row in (0, 3):
                content = png(Image.new("RGB", (64, 64), (row, 0, 0)))
                shown = [[len(pictures), len(content), zlib.crc32(content)]]
                pictures += content
            records.append({
                "captions": [[key + "x" * (row == wrong), f"{key} {row}"] for key in keys],
                "picture": f"{row}.png",
                "digest": f"{row:064x}", "notes": [], "size": [64 + row, 64], "bucket": [64, 64],
                "references": [], "shown": shown,
            })  # fmt: skip
            if masked and row == 0:
                content = png(Image.fromarray(CELLS))
                place = [len(pictures), len(content), zlib.crc32(content)]
                records[-1]["mask"] = ["a" * 64, *place]
                pictures += content
            made += [[features(row, i, role, dtype) for role in (0, 1)] for i in (0, 1)]
        layouts = [[parts.layout_of(one) for one in pair] for pair in made]
        order = [(i, role, made[i][role]) for role in (1, 0) for i in range(len(made))]
        path = folder / parts.part_name(number)
        parts.write_part(path, manifest.identity, layouts, order, records, pictures)
    return folder


@pytest.mark.parametrize("dtype", [np.float32, jax.numpy.bfloat16])
def test_every_feature_comes_back(tmp_path, dtype):
    prepared = Prepared(write(tmp_path / "set", dtype=dtype))
    for row in range(5):
        for caption in range(2):
            for role, found in enumerate(prepared.load((row, caption))):
                expected = features(row, caption, role, dtype)
                assert found.keys() == expected.keys()
                jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (longest(prepared, STUDENT), longest(prepared, TEACHER)) == (9, 16)
    assert {shapes["first"] for shapes in prepared.shapes(TEACHER)} == {(2, 4, 3), (3, 4, 3)}
    assert [row.captions[1][1] for row in prepared.rows] == [f"detailed_en {i}" for i in range(5)]
    assert prepared.rows[4].where.endswith("set:4")
    assert [info.width for info in prepared.infos] == [64, 65, 66, 67, 68]
    assert prepared.shown == [0, 3] and prepared.picture(3)[5, 5].tolist() == [3, 0, 0]


def test_some_of_the_prompt_keys(tmp_path):
    folder = write(tmp_path / "set")
    prepared = Prepared(folder, ["detailed_en"])
    assert prepared.rows[2].captions == (("detailed_en", "detailed_en 2"),)
    expected = features(2, 1, TEACHER, np.float32)
    jax.tree.map(np.testing.assert_array_equal, prepared.load((2, 0))[1], expected)
    assert longest(prepared, STUDENT) == 9
    assert longest(Prepared(folder, ["short_en"]), STUDENT) == 7
    asked = {"required": "y", "keys_field": "data.caption_key"}
    first, second = problems_of(lambda: Prepared(folder, ["short_en", "x"], **asked))
    assert first.startswith("data.caption_key x: ") and second.startswith("teacher.prompt_key y: ")
    assert "was prepared with short_en, detailed_en only" in first and "only" in second


def test_a_row_without_the_captions_of_the_set_is_told(tmp_path):
    folder = write(tmp_path / "set", wrong=3)
    (problem,) = problems_of(Prepared, str(folder))
    assert f"{parts.part_name(1)}: row 3 lacks captions" in problem


def test_missing_and_foreign_parts_are_told(tmp_path):
    folder = write(tmp_path / "set")
    (folder / parts.part_name(1)).unlink()
    assert "of 3 parts some are missing (1); run" in problems_of(Prepared, folder)[0]
    other = write(tmp_path / "other", keys=("short_en", "medium_en"))
    shutil.copy(other / parts.part_name(1), folder)
    assert "belongs to another preparation" in problems_of(Prepared, folder)[0]
    folder = write(tmp_path / "set")
    shutil.copy(folder / parts.part_name(2), folder / parts.part_name(0))
    assert "holds other rows" in problems_of(Prepared, folder)[0]
    prepared = Prepared(write(tmp_path / "set"))
    prepared.check(SETTINGS, {})
    problems = problems_of(
        prepared.check, {"buckets": [], "dtype": "bfloat16"}, {"buckets": "B", "dtype": "D"}
    )
    assert len(problems) == 2 and "with D float32, now it is bfloat16" in problems[1]


def test_no_damage_passes(tmp_path):
    """Every byte of a part is covered: by its header's checks, or by a checksum."""
    folder = write(tmp_path / "set", rows=1, masked=True)
    path = folder / parts.part_name(0)
    whole = path.read_bytes()
    everything = lambda p: [p.load((0, 0)), p.load((0, 1)), p.picture(0), p.mask(0)]
    expected = everything(Prepared(folder))
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole), 150, replace=False):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            found = everything(Prepared(folder))
        except UserError:
            continue
        jax.tree.map(np.testing.assert_array_equal, found, expected)  # padding of the header
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert problems_of(lambda: everything(Prepared(folder))), cut


def forge(path, name, old, new):
    """Writes a part with other bytes in one of its arrays, and with the checksum of these."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    place = {key: slice(*(start + n for n in value["data_offsets"]))
             for key, value in header.items() if key != "__metadata__"}  # fmt: skip
    array = bytes(content[place[name]])
    assert old in array and len(old) == len(new)
    content[place[name]] = array.replace(old, new, 1)
    total = 0
    for key in ("index", "crc32", "layouts", "rows"):
        total = zlib.crc32(content[place[key]], total)
    content[place["whole"]] = np.int64(total).tobytes()
    path.write_bytes(content)


def test_a_part_is_not_read_before_its_sizes_are_looked_at(tmp_path, monkeypatch):
    folder = write(tmp_path / "set")
    monkeypatch.setattr(parts, "MAX_SMALL", 100)
    assert "is larger than" in problems_of(Prepared, folder)[0]


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("rows", b'"notes": []', b'"notes": 3 ', "a row is no row"),
        ("rows", b'"notes": []', b'"notes": [[', "a row is no row"),
        ("rows", b"short_en 0", b"\\ud800en 0", "a row is no row"),
        ("rows", b"[64, 64]", b"[64, 4e]", "a row is no row"),
        ("rows", b'"mask": ["a', b'"mask": ["x', "a row is no row"),
        ("rows", b'"mask"', b'"msak"', "a row is no row"),
        ("layouts", b'"F32"', b'"F99"', "a layout is none"),
        ("layouts", b"[[[", b"3,[", "a layout is none"),
        ("layouts", b"[[[", b"{[[", "a layout is none"),
        ("index", bytes(8), b"\xff" * 7 + b"\x7f", "its index points outside"),
    ],
)
def test_what_no_checksum_tells_is_told(tmp_path, name, old, new, told):
    folder = write(tmp_path / "set", rows=1, masked=True)
    forge(folder / parts.part_name(0), name, old, new)
    assert told in problems_of(Prepared, folder)[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"format": 1}', b'{"format": 2, "rows": -1}', b"{" * 9, b"\xff\xfe",
     b"[" * 10**5],
)  # fmt: skip
def test_a_damaged_manifest_is_told(tmp_path, content):
    folder = write(tmp_path / "set")
    (folder / parts.MANIFEST).write_bytes(content)
    assert "prepared.json: " in problems_of(Prepared, folder)[0]


def test_special_files_and_endless_numbers_are_refused_at_once(tmp_path):
    folder = write(tmp_path / "set")
    (folder / parts.part_name(1)).unlink()
    os.mkfifo(folder / parts.part_name(1))
    assert "is a device or a pipe" in problems_of(Prepared, folder)[0]
    manifest = json.loads((folder / parts.MANIFEST).read_text()) | {"rows": 10**39}
    (folder / parts.MANIFEST).write_text(json.dumps(manifest))
    assert "some are missing (3, 4, 5" in problems_of(Prepared, folder)[0]


def test_a_write_that_is_stopped_leaves_no_part(tmp_path):
    folder = write(tmp_path / "set", rows=2)
    path = folder / parts.part_name(0)
    old = path.read_bytes()

    feature = {"text": np.zeros((3, CHANNELS), np.float32)}

    def stopped():
        yield 0, 0, feature
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.write_part(path, "i", [[parts.layout_of(feature)] * 2], stopped(), [], b"")
    assert path.read_bytes() == old
    assert sorted(p.name for p in folder.iterdir()) == [path.name, parts.MANIFEST]


def test_prepared_data_in_a_store(bucket, tmp_path):
    remote, local = Prepared(write(f"{bucket}/set")), Prepared(write(tmp_path / "set"))
    jax.tree.map(np.testing.assert_array_equal, remote.load((4, 1)), local.load((4, 1)))
    np.testing.assert_array_equal(remote.picture(3), local.picture(3))
    assert len(list(epath.Path(f"{bucket}/set").iterdir())) == 4  # nothing half-written


# --- with the encoders


def test_batches_give_what_single_captions_give(random_model, tmp_path):
    dataset = measure(load_rows(write_folder(tmp_path / "set", count=5)), make_buckets(128)[:2])
    pipe = pipeline(random_model)
    config = defaults()
    config.teacher.min_pixels, config.teacher.max_pixels = 64 * 64, 128 * 128
    encoder = Encoder(pipe, dataset, config)
    wanted = dict.fromkeys(dataset.captions(), (STUDENT, TEACHER))
    encode = lambda batch: {(c, role): f for c, role, f in encoder.encode(wanted, batch)}
    one, some = encode(1), encode(3)
    assert one.keys() == some.keys() and len(one) == 10
    shapes = encoder.shapes(wanted)
    for key, found in some.items():
        assert parts.layout_of(found) == parts.layout_of(shapes[key])
        np.testing.assert_allclose(found["features"], one[key]["features"], rtol=1e-5, atol=1e-5)
    for (row, _), role in one:
        if role == STUDENT:
            text = dataset.rows[row].captions[0][1]
            expected = pipe.features(STUDENT, text)["features"]
            np.testing.assert_array_equal(one[(row, 0), role]["features"], expected)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_prepared_on_many_devices_and_processes_then_trained_without_encoders(random_run, tmp_path):
    """One caption a device, so that the features are bit for bit those that a run itself makes."""
    out, work = tmp_path / "set", tmp_path / "work"
    work.mkdir()
    for name in ("random_model", "random_data"):
        shutil.copytree(random_run / name, work / name)
    common = (*RANDOM_CONFIG, f"--workdir={work}", f"--out={out}", "--batch=1", "--rows_per_part=5")
    two_devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    first = run_program("prepare", *common, "--shard=0", "--shards=2", XLA_FLAGS=two_devices)
    assert first.returncode == 0, first.stderr
    assert "encoding on 2 devices" in first.stdout
    assert sorted(p.name for p in out.iterdir()) == [parts.part_name(0), parts.MANIFEST]
    left_by_killed(out / parts.part_name(1)).write_text("left by one that was killed")
    port = free_port()
    both = [start(["-m", "dopsd_jax.prepare", *common], i, port) for i in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "shard 0 of 2: 1 of 2 parts, 1 done" in said[0][0] and "encoding" not in said[0][0]
    assert "shard 1 of 2: 1 of 2 parts, 0 done" in said[1][0]
    assert "encoding 6/6" in said[1][0]
    assert sorted(p.name for p in out.iterdir()) == [
        parts.part_name(0), parts.part_name(1), parts.MANIFEST,
    ]  # fmt: skip

    shutil.rmtree(work / "random_data")
    shutil.rmtree(work / "features")
    for encoder in ("vlm", "text_encoder"):
        for weights in (work / "random_model" / encoder).glob("*.safetensors"):
            weights.unlink()
        shutil.rmtree(work / "random_model" / encoder)
    run = run_program(
        "train", *RANDOM_CONFIG, f"--config.model={work}/random_model", f"--config.data.path={out}",
        f"--workdir={tmp_path}/run", "--config.steps=2",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    read = lambda folder: [
        json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    own, whole = read(tmp_path / "run"), read(random_run)
    assert len(own) == 2 <= len(whole)
    for ours, theirs in zip(own, whole[:2], strict=True):
        assert {k: ours[k] for k in ("loss", "gap", "grad_norm")} == {
            k: theirs[k] for k in ("loss", "gap", "grad_norm")
        }
    facts = [
        json.loads((d / "config.json").read_text())["facts"] for d in (tmp_path / "run", random_run)
    ]
    assert facts[0]["data"] == facts[1]["data"]
    picture = "samples/step_000002.png"
    assert (tmp_path / "run" / picture).exists()


def test_faults_that_are_mended_do_not_ask_for_another_folder(random_model, tmp_path):
    """Nothing was made of the data as they were; where something was, they must be the same."""
    data, out = write_folder(tmp_path / "data", count=2), tmp_path / "set"
    caption = next(data.glob("*.txt"))
    common = (
        *RANDOM_CONFIG, f"--config.model={random_model}", f"--config.data.path={data}",
        f"--workdir={tmp_path}", f"--out={out}",
    )  # fmt: skip
    caption.write_text("word " * 2000)
    done = run_program("prepare", *common)
    assert done.returncode == 2 and "shorten it" in done.stderr
    caption.write_text("a shorter one")
    other = out / f"{parts.LOCK}1-of-2.json"  # of a shard that may be about to write
    other.touch()
    done = run_program("prepare", *common)
    assert done.returncode == 2 and "was begun with other captions" in done.stderr
    other.unlink()
    done = run_program("prepare", *common)
    assert done.returncode == 0, done.stderr
    caption.write_text("another")
    done = run_program("prepare", *common)
    assert done.returncode == 2 and "was begun with other captions" in done.stderr


def test_all_captions_that_are_too_long_are_named_at_once(random_model, tmp_path):
    folder = write_folder(tmp_path / "set", count=5)
    for path in sorted(folder.glob("*.txt"))[:4]:
        path.write_text("The image shows a hand thrown mug with a speckled glaze. " * 200)
    dataset = measure(load_rows(folder, views=views_of(1, True)), make_buckets(128)[:2])
    encoder = Encoder(pipeline(random_model), dataset, defaults())
    problems = problems_of(encoder.shapes, dict.fromkeys(dataset.captions(), (STUDENT,)))
    assert len(problems) == 4 and all("tokens with its template" in p for p in problems)
    assert len({p.partition(": ")[0] for p in problems}) == 4
