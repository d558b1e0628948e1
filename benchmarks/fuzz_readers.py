"""Every reader of a file that a user or another program may have damaged, with a good file.

`fuzz.py` damages the files; see there.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from fuzz_damage import seal_part, seal_png, seal_tar
from PIL import Image

from dopsd_jax import families
from dopsd_jax.common.file_digests import file_digests
from dopsd_jax.config.loading import load
from dopsd_jax.config.schema import flat
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.conversion.inspection import inspect
from dopsd_jax.data import prepared_parts as parts
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.data.images import inspect_image, open_image
from dopsd_jax.data.picture_index import PictureIndex
from dopsd_jax.data.prepared import MASKS, Prepared
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.sources.array_record import write_array_record
from dopsd_jax.evaluation.arms import of_run
from dopsd_jax.evaluation.gallery import Gallery
from dopsd_jax.evaluation.prompts import class_names, read_prompts
from dopsd_jax.evaluation.torch_scorers import PICTURES, read_pictures
from dopsd_jax.families.flux2_klein import random
from dopsd_jax.families.zimage.networks import VLM, ZIMAGE
from dopsd_jax.miniature.concepts import read_concept, write_concept
from dopsd_jax.miniature.saved import load_tree, save_tree
from dopsd_jax.miniature.world import random_concept
from dopsd_jax.random_model import write_random_model
from dopsd_jax.reporting.metrics import MetricsWriter, read_metrics
from dopsd_jax.reporting.pictures import GridRow, sample_path, save_grid
from dopsd_jax.reporting.run_page import write_report
from dopsd_jax.run import lock
from dopsd_jax.run.workdir import open_workdir
from dopsd_jax.training.checkpoint import Checkpoints
from dopsd_jax.training.ranking import Ranking
from dopsd_jax.training.results import Results
from dopsd_jax.weights import converted, hub
from dopsd_jax.weights.lora_dialects import layers_of
from dopsd_jax.weights.lora_files import LoraModule, read_lora
from dopsd_jax.weights.lora_write import write_lora
from dopsd_jax.weights.model_folder import check_assets
from dopsd_jax.weights.stored import open_stored, read_config

CAPTIONS = {"short_en": "a red cube", "detailed_en": "a red cube on é table", "h*w": "40*48"}


class Reader(NamedTuple):
    """A file that is damaged, and what reads it.

    kind: of its content: json, lines (of JSON), safetensors or bytes. seal: makes checksums right
    again, so that damage behind them is met too.
    """

    path: Path
    read: Callable[[], object]
    kind: str
    seal: Callable[[bytes], bytes] | None = None


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader by name, each with a good file of its own below `folder`."""
    model = write_random_model(folder / "model")
    import_model(model, folder / "converted")
    found = weight_readers(folder, model)
    for of in (flux2_readers, data_readers, prepared_readers, run_readers):
        place = folder / of.__name__
        place.mkdir()
        found |= of(place)
    return found


def weight_readers(folder: Path, model: Path) -> dict[str, Reader]:
    """The readers of models, weights and LoRA files."""
    transformer, vlm = ZIMAGE["transformer"], model / "vlm"
    made = folder / "converted" / "transformer"
    config, _ = read_config(model / "transformer" / "config.json", transformer)
    layers = layers_of(transformer, config)
    modules = {
        path: LoraModule(
            np.ones((2, t.width), np.float32), np.ones((t.rows[0], 2), np.float32), 2.0
        )
        for path, t in list(layers.split.items())[:6]
    }
    lora, peft = folder / "lora.safetensors", folder / "peft"
    write_lora(lora, modules, layers)
    write_lora(peft, modules, layers, "Q")
    preprocessor = vlm / "preprocessor_config.json"
    clip = {"size": {"shortest_edge": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / PICTURES).write_text(json.dumps(clip))

    def components(network, path):
        return lambda: open_stored(path, network)

    found = {
        f"{name} config": Reader(
            model / name / "config.json", components(network, model / name), "json"
        )
        for name, network in (*ZIMAGE.items(), ("vlm", VLM))
    }
    family = families.load("zimage")
    pipeline = lambda: family.Pipeline(family, model)
    (weights,) = (model / "transformer").glob("*.safetensors")
    return found | {
        "safetensors": Reader(weights, components(transformer, weights.parent), "safetensors"),
        "inspect": Reader(weights, lambda: list(inspect(weights)), "safetensors"),
        "lora": Reader(lora, lambda: read_lora(lora, layers), "safetensors"),
        "lora inspect": Reader(lora, lambda: list(inspect(lora)), "safetensors"),
        "peft": Reader(peft / "adapter_config.json", lambda: read_lora(peft, layers), "json"),
        "manifest": Reader(made / converted.MANIFEST, components(transformer, made), "json"),
        "converted config": Reader(made / "config.json", components(transformer, made), "json"),
        "model manifest": Reader(
            folder / "converted" / hub.MODEL_MANIFEST,
            lambda: (families.of_folder(folder / "converted"), hub.resolve(folder / "converted")),
            "json",
        ),
        "model index": Reader(
            model / "model_index.json", lambda: families.of_folder(model), "json"
        ),
        "scheduler": Reader(
            model / "scheduler" / "scheduler_config.json", lambda: pipeline().scheduler, "json"
        ),
        "tokenizer": Reader(
            model / "tokenizer" / "tokenizer_config.json", lambda: check_assets(model), "json"
        ),
        "preprocessor": Reader(preprocessor, lambda: pipeline().image_settings({}), "json"),
        "clip's pictures": Reader(folder / PICTURES, lambda: read_pictures(folder), "json"),
    }


def flux2_readers(folder: Path) -> dict[str, Reader]:
    """The readers of the other family's model."""
    family = families.load("flux2_klein")
    model = random.write_random_model(folder / "model")
    found = {}
    for name in ("transformer", "vae"):
        read = lambda name=name: open_stored(model / name, family.NETWORKS[name])
        found[f"flux2 {name} config"] = Reader(model / name / "config.json", read, "json")
    scheduler = model / "scheduler" / "scheduler_config.json"
    read = lambda: family.Pipeline(family, model).scheduler
    return found | {"flux2 scheduler": Reader(scheduler, read, "json")}


def picture(kind: str = "PNG") -> bytes:
    """A small picture file of a kind that Pillow knows."""
    ramp = np.arange(48 * 40 * 3, dtype=np.uint32).reshape(40, 48, 3) // 7 % 251
    content = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).save(content, kind)
    return content.getvalue()


def data_readers(folder: Path) -> dict[str, Reader]:
    """The readers of pictures, captions, tables, archives and cached features."""
    places = {
        name: folder / name for name in ("tables", "listed", "text", "json", "edits", "pictures")
    }
    for name, place in places.items():
        place.mkdir()
        if name != "pictures":
            (place / "a.png").write_bytes(picture())
    row = {"local_path_list": ["a.png"], **CAPTIONS}
    lines = "".join(json.dumps(row | {"class_name": f"c{n}"}) + "\n" for n in range(3))
    tables = {
        "rows.jsonl": lines,
        "rows.json": json.dumps([row, row]),
        "named.json": json.dumps({"a.png": "a cube", "a": {"caption": "x"}}),
        "rows.csv": 'file_name, caption\na.png,"a red, small cube"\na.png,b\n',
    }
    for name, text in tables.items():
        (places["tables"] / name).write_text(text)
    (places["listed"] / "metadata.jsonl").write_text(lines)
    edit = {"source_images": ["a.png"], "control_path_0": "a.png", "image": "a.png", **CAPTIONS}
    edits = "".join(
        json.dumps(own) + "\n" for own in (edit, row | {"local_path_list": ["a.png"] * 3})
    )
    (places["edits"] / "edits.jsonl").write_text(edits)
    (places["text"] / "a.txt").write_text("a red cube\nund ein Häuschen\n")
    (places["json"] / "a.json").write_text(json.dumps(CAPTIONS | {"tags": [1]}))
    sample = {"png": picture(), "txt": b"a red cube", "json": json.dumps(CAPTIONS).encode()}
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(2):
            for suffix, content in sample.items():
                member = tarfile.TarInfo(f"s{number}.{suffix}")
                member.size, member.pax_headers = len(content), {"comment": "é"}
                archive.addfile(member, io.BytesIO(content))
    write_array_record(folder / "a.array_record", [(CAPTIONS, picture())] * 3)
    rows_of_parquet = [{"image": {"bytes": picture(), "path": "a.png"}, "caption": "a cube"}] * 3
    pq.write_table(pa.Table.from_pylist(rows_of_parquet), folder / "a.parquet", row_group_size=2)

    def rows(path, **options):
        def read():
            found = load_rows(path, **options).rows
            class_names([row.where for row in found])
            for picture in (p for row in found for p in (row.image, *row.references)):
                inspect_image(picture)

        return read

    seals = {"PNG": seal_png}
    found = {}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        path = places["pictures"] / kind
        path.write_bytes(picture(kind))
        read = lambda path=path: (open_image(path), inspect_image(path, verify=False))
        found[f"picture {kind}"] = Reader(path, read, "bytes", seals.get(kind))
    kinds = {".jsonl": "lines", ".json": "json", ".csv": "bytes"}
    for name in tables:
        path = places["tables"] / name
        found[name] = Reader(path, rows(path), kinds[path.suffix])
    cache, key = FeatureCache(folder / "cache", report=lambda line: None), "k" * 64
    arrays = {"text": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.array(3, np.int32)}
    cache.put(key, arrays)
    index = PictureIndex(cache)

    def cached():
        cache.shapes(key)
        entry = cache.get(key)
        if entry is not None:
            np.testing.assert_equal(entry, arrays)

    def indexed():
        later = mock.patch("time.time", lambda: 1e12)
        with ThreadPoolExecutor(1) as pool, PictureIndex(cache) as own, later:
            own.look([places["pictures"] / "PNG.good"], inspect_image, (), pool)

    (places["pictures"] / "PNG.good").write_bytes(picture())
    indexed()
    return found | {
        "metadata": Reader(
            places["listed"] / "metadata.jsonl", rows(places["listed"], data_root=folder), "lines"
        ),
        "edits": Reader(
            places["edits"] / "edits.jsonl",
            rows(places["edits"] / "edits.jsonl", references=["auto"]),
            "lines",
        ),
        "sidecar": Reader(places["text"] / "a.txt", rows(places["text"]), "bytes"),
        "sidecar lines": Reader(
            places["text"] / "a.txt", rows(places["text"], caption_lines=True), "bytes"
        ),
        "sidecar json": Reader(
            places["json"] / "a.json", rows(places["json"], caption_extension=".json"), "json"
        ),
        "tar": Reader(folder / "a.tar", rows(folder / "a.tar"), "bytes", seal_tar),
        "array_record": Reader(folder / "a.array_record", rows(folder / "a.array_record"), "bytes"),
        "parquet": Reader(folder / "a.parquet", rows(folder / "a.parquet"), "bytes"),
        "cached features": Reader(cache.path(key), cached, "safetensors"),
        "cached index": Reader(cache.path(index.key), indexed, "safetensors"),
    }


def prepared_readers(folder: Path) -> dict[str, Reader]:
    """The readers of a prepared data set."""
    manifest = parts.Manifest(2, 1, ("short_en",), "f" * 64, {MASKS: ["files", 8]})
    parts.write_manifest(epath.Path(folder), manifest)
    made = [{"text": np.ones((3, 4), np.float32)}, {"latent": np.ones((2, 2, 3), np.float32)}]
    for number in range(2):
        content, mask = picture(), io.BytesIO()
        Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6)).save(mask, "PNG")
        mask = mask.getvalue()
        row = {
            "captions": [["short_en", "a cube"]], "picture": "a.png", "digest": "0" * 64,
            "notes": ["x"], "size": [48, 40], "bucket": [48, 40],
            "references": [["1" * 64, [48, 40]]],
            "shown": [[0, len(content), zlib.crc32(content)]] * 2,
            "mask": ["2" * 64, len(content), len(mask), zlib.crc32(mask)],
        }  # fmt: skip
        path, order = folder / parts.part_name(number), [(0, role, made[role]) for role in (0, 1)]
        layouts = [[parts.layout_of(own) for own in made]]
        files = content + mask
        parts.write_part(epath.Path(path), manifest.identity, layouts, order, [row], files)

    def read():
        found = Prepared(str(folder))
        found.check({MASKS: ["files", 8]}, {MASKS: "masks"})
        for number in range(len(found.rows)):
            (
                found.shapes(0),
                found.load((number, 0)),
                found.mask(number),
                [(found.picture(row), found.edited(row)) for row in found.shown],
            )

    return {
        "prepared manifest": Reader(folder / parts.MANIFEST, read, "json"),
        "prepared part": Reader(path, read, "safetensors", seal_part),
    }


def run_readers(folder: Path) -> dict[str, Reader]:
    """The readers of what a run and an evaluation keep, and of what they are given."""
    config, facts = load("zimage:random"), {"data": "d" * 64}
    workdir, step = epath.Path(folder), folder / "checkpoints" / "2"
    changed = [{"step": 2, "field": "learning_rate", "old": 1, "new": 2}]
    content = {"config": flat(config), "facts": facts, "versions": {}, "changes": changed}
    (folder / "config.json").write_text(json.dumps(content))
    with MetricsWriter(folder) as writer:
        for number in range(1, 4):
            record = {"step": number, "loss": 0.5, "loss_per_step": [0.5, None], "seconds": 1.5}
            writer.write(record | {"gap": 1e-3, "lr": 0.1, "images_per_second": 2})
    scores = {"rows": [{"model": "base", "crispness": 0.5}], "note": "a note"}
    (folder / "scores.json").write_text(json.dumps(scores))
    grid = sample_path(folder, 2)
    image = np.zeros((8, 8, 3), np.uint8)
    save_grid(grid, ["base", "tuned"], [GridRow("a cube", [image, image])], title="x", cell=64)
    step.mkdir(parents=True)
    (step / "array").write_bytes(b"12345678")
    digests = {"step": 2, "processes": 1, "files": file_digests(epath.Path(step), ["array"])}
    (step / "digests.0.json").write_text(json.dumps(digests))
    (folder / "lora").mkdir()
    delivered = [workdir / "lora" / "step_2.safetensors"]
    delivered[0].write_bytes(b"12345678")
    results = Results(workdir, flat(config))
    results.record(delivered)
    Ranking(folder, 0, 0.0, 2).add(2, {"heldout_gap": 0.5}, write=True)
    (folder / "values.jsonl").write_text('{"key": "a", "value": 0.5}\n{"key": "b", "value": 1}\n')
    tests = [{"prompt": "a [V]", "row": 0, "class_name": "cube"}, {"prompt": "b"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(test) + "\n" for test in tests))
    (folder / "prompts.txt").write_text("a red cube\n\na blue é\n")
    write_concept(folder / "concept.json", "dax", random_concept(np.random.default_rng(0)))
    owner = {"host": "h", "process": 1, "since": "now", "place": "h", "started": "1", "what": "x"}
    (folder / lock.FILE).write_text(json.dumps(owner))
    tree = {"w": np.ones((2, 3), np.float32), "n": np.array(3, np.int32)}
    save_tree(folder / "tree.safetensors", tree, {"step": 1})
    saved = Checkpoints(folder / "checkpoints", 1)

    def locked():
        with (
            mock.patch.object(lock, "WATCH_SECONDS", 0.0),
            lock.exclusive(folder, "fuzzing", say=lambda line: None),
        ):
            pass

    def proven():
        return [saved._faults(step) for step in saved.steps]

    report = lambda: write_report(folder)
    return {
        "run config": Reader(
            folder / "config.json",
            lambda: (report(), of_run(str(folder), config), open_workdir(workdir, config, facts)),
            "json",
        ),
        "metrics": Reader(folder / "metrics.jsonl", report, "lines"),
        "metrics bytes": Reader(
            folder / "metrics.jsonl", lambda: read_metrics(folder / "metrics.jsonl"), "bytes"
        ),
        "run scores": Reader(folder / "scores.json", report, "json"),
        "grid": Reader(Path(grid), report, "bytes", seal_png),
        "results": Reader(folder / "results.json", lambda: results.faults(delivered), "json"),
        "ranking": Reader(
            folder / "ranking.json", lambda: Ranking(folder, 1, 0.0, 2).lines(), "json"
        ),
        "digests": Reader(step / "digests.0.json", proven, "json"),
        "lock": Reader(folder / lock.FILE, locked, "json"),
        "values": Reader(folder / "values.jsonl", lambda: Gallery(folder), "lines"),
        "prompts": Reader(
            folder / "prompts.jsonl", lambda: read_prompts(folder / "prompts.jsonl"), "lines"
        ),
        "prompts text": Reader(
            folder / "prompts.txt", lambda: read_prompts(folder / "prompts.txt"), "bytes"
        ),
        "concept": Reader(
            folder / "concept.json", lambda: read_concept(folder / "concept.json"), "json"
        ),
        "tree": Reader(
            folder / "tree.safetensors",
            lambda: load_tree(folder / "tree.safetensors", tree),
            "safetensors",
        ),
    }
