"""Every method as a configuration names it: what it asks for, what it refuses, and that it runs."""

import json
import os
import runpy
import shutil
import subprocess
import sys

import jax
import methods_step
import numpy as np
import pytest
from conftest import ROOT, problems_of, relative_error, run_program
from ml_collections import ConfigDict
from PIL import Image

from dopsd_jax.conditioning.encoding import class_prompt
from dopsd_jax.conditioning.features import Features
from dopsd_jax.config import schema
from dopsd_jax.config.fields import declared, defaults
from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.families.base import STUDENT
from dopsd_jax.methods import registry
from dopsd_jax.random_model import Size, write_random_model
from dopsd_jax.random_model.synthetic import write_folder
from dopsd_jax.run import build, data_set
from dopsd_jax.weights.safetensors_io import TensorFiles

# What is compiled here runs a few times only.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FAST = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
GET_CONFIG = runpy.run_path(str(ROOT / "configs/zimage.py"))["get_config"]


def config_of(**fields):
    """The tiny configuration with other fields, named with __ for a dot."""
    config = GET_CONFIG("random")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


# --- Configurations


@pytest.mark.parametrize(
    ("fields", "asked", "message"),
    [
        ({"method": "sft"}, "teacher.decay", "teacher.decay: has no effect with config.method"),
        ({"method": "sft"}, "loss", "loss: has no effect with config.method = sft"),
        ({"method": "dopsd"}, "sft.samples", "sft.samples: has no effect"),
        ({"method": "pso"}, "dreambooth.weight", "dreambooth.weight: has no effect"),
        ({"method": "pso"}, "teacher.weights", "teacher.weights: has no effect"),
        ({}, "teacher.prompt_key", "has no effect with config.teacher.context = vlm"),
        ({"method": "dreambooth"}, "", "config.dreambooth.class_word: is empty"),
        ({"method": "sft", "offload": "teacher"}, "", "config.offload: names the teacher"),
        ({"method": "pso", "export_weights": "teacher"}, "", "which keeps the start only"),
        (
            {"teacher.weights": "frozen", "export_weights": "teacher"},
            "",
            "which stays as it begins with config.teacher.weights = frozen",
        ),
        (
            {"teacher.decay": 1.0, "export_weights": "teacher"},
            "",
            "which stays as it begins with config.teacher.decay = 1.0",
        ),
        ({"teacher__context": "prompt"}, "", "config.teacher.prompt_key: is empty"),
        ({"method": "sft", "sft__sigma": "beta"}, "", "'beta' is not one of logit_normal"),
        ({"method": "pso", "pso__beta": -1.0}, "", "config.pso.beta: -1.0 must be at least 0"),
    ],
)
def test_what_a_method_cannot_use_is_refused(fields, asked, message):
    (problem,) = problems_of(schema.check, config_of(**fields), [asked] if asked else [])
    assert message in problem


@pytest.mark.parametrize(
    ("fields", "still"),
    [
        ({"teacher.warmup_steps": 3}, ""),
        (
            {"teacher.warmup_steps": 3, "teacher.warmup_decay": 1.0},
            "warmup_decay = 1.0 and config.",
        ),
        ({"teacher.warmup_steps": 30, "teacher.warmup_decay": 1.0, "teacher.decay": 0.9}, "= 1.0;"),
        ({"teacher.weights": "frozen"}, "config.teacher.weights = frozen;"),
    ],
)
def test_a_teacher_that_moves_in_its_first_steps_only_is_exported(fields, still):
    config = config_of(**{"teacher.decay": 1.0, "export_weights": "teacher", **fields})
    assert config.steps == 30
    if still:
        (problem,) = problems_of(schema.check, config)
        assert "which stays as it begins with config.teacher." in problem and still in problem
    else:
        schema.check(config)


def test_every_field_of_a_method_is_known_and_used_by_some():
    for method in registry.METHODS.values():
        config = config_of(method=method.name, dreambooth__class_word="dog")
        asked = [f.name for f in method.fields if not f.when]  # others need more than a method
        assert set(asked) <= declared().keys()
        schema.check(config, asked)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, None),
        ({"teacher.weights": "live"}, "config.teacher.weights = live"),
        ({"teacher.decay": 0.9}, "config.teacher.decay = 0.9"),
        ({"teacher.decay": 0.999}, None),
        ({"teacher.decay": 0.9, "teacher.weights": "frozen"}, None),
        ({"teacher.weights": "live", "method": "offpolicy"}, None),
        ({"teacher.weights": "live", "method": "sft"}, None),
    ],
)
def test_a_teacher_that_follows_the_student_closely_is_warned_of(fields, said):
    config = defaults()
    config.update_from_flattened_dict(fields)
    found = registry.notes(config)
    assert [note.split(":")[1].strip() for note in found] == ([said] if said else [])


def test_only_what_a_method_compares_with_is_kept():
    weights = lambda **fields: registry.teacher(config_of(**fields)).weights
    assert weights(method="sft") == "live"
    assert weights(method="pso") == weights(method="dreambooth") == "frozen"
    for method in ("dopsd", "sft_teacher", "offpolicy"):
        for kept in ("ema", "frozen", "live"):
            assert weights(method=method, teacher__weights=kept) == kept


# --- Data


CAPTIONS = {"short_en": "a [V] thing", "detailed_en": "a [V] thing, large and blue, on a table"}


def write_rows(folder, *captions):
    folder.mkdir()
    lines = []
    for i, own in enumerate(captions):
        Image.new("RGB", (96, 96), (80 * i, 10, 200)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image_path": f"{i}.png", **own}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


def open_features(model, path, workdir, **fields):
    fields = {"model": str(model), "data__path": path, "data__buckets": "96x96", **fields}
    config = config_of(**fields)
    schema.check(config)
    pipe, _ = build.open_pipeline(config, workdir)
    dataset = data_set.open_data(config, workdir, pipe)
    features = Features(pipe, dataset, config, data_set.cache_folder(config, workdir))
    features.prepare()
    return features


def batch_of(features, rows, caption):
    shape = features.dataset.shape(0)
    index = BatchIndex(0, shape, np.array(rows), ("-",) * len(rows), np.array([caption] * 2))
    return features.batch(index, 2)


def test_latents_and_class_prompts_are_encoded_once_and_need_no_vision_model(
    random_model, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(random_model, model, ignore=shutil.ignore_patterns("vlm"))
    path = write_rows(tmp_path / "rows", CAPTIONS, CAPTIONS)
    assert "teacher.vlm" in problems_of(open_features, model, path, tmp_path)[0]
    options = {"method": "dreambooth", "dreambooth__class_word": "dog"}
    options["dreambooth__concept_word"] = "[V] thing"
    features = open_features(model, path, tmp_path, **options)
    batch = batch_of(features, [1, 0], 0)
    assert batch.contexts.teacher is None
    assert batch.target.shape == (2, 1, 12, 12, 16) and batch.target.dtype == np.float32
    for place, row in enumerate([1, 0]):
        expected = features.pipe.encode_image(features.image(row)[None])
        np.testing.assert_allclose(batch.target[place], expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(batch.target[0], batch.target[1])
    length, found = batch.prior.lengths[0, 0], batch.prior.features[0, 0]
    np.testing.assert_allclose(
        found[:length], features.pipe.features(STUDENT, "a dog")["features"], rtol=1e-5, atol=1e-5
    )
    assert class_prompt(CAPTIONS["detailed_en"], features.store.config.dreambooth).startswith(
        "a dog, large"
    )
    # A second time nothing is encoded: neither encoder is even loaded.
    again = open_features(model, path, tmp_path, **options)
    jax.tree.map(np.testing.assert_array_equal, batch_of(again, [1, 0], 0), batch)
    assert not {"text_encoder", "vlm", "vae"} & again.pipe.__dict__.keys()
    options["dreambooth__concept_word"] = "<dog>"
    problems = problems_of(open_features, model, path, tmp_path, **options)
    assert (
        len(problems) == 4 and "rows.jsonl:1: its caption 'short_en' has no '<dog>'" in problems[0]
    )


def test_a_teacher_is_told_another_caption_of_the_row(random_model, tmp_path):
    path = write_rows(tmp_path / "rows", CAPTIONS, {**CAPTIONS, "short_en": "a [V]"})
    prompt = {"teacher__context": "prompt", "teacher__prompt_key": "detailed_en"}
    features = open_features(random_model, path, tmp_path, **prompt)
    assert features.dataset.prompt_keys == ("short_en",)
    student, teacher = batch_of(features, [0, 1], 0).contexts
    told = features.pipe.features(STUDENT, CAPTIONS["detailed_en"])["features"]
    assert (teacher.lengths == len(told)).all() and student.lengths[0, 0] < len(told)
    np.testing.assert_allclose(teacher.features[1, 0, : len(told)], told, rtol=1e-5, atol=1e-5)
    # Told its own, it has nothing to tell.
    own = open_features(random_model, path, tmp_path, data__prompt_keys="detailed_en", **prompt)
    student, teacher = batch_of(own, [0, 1], 0).contexts
    jax.tree.map(np.testing.assert_array_equal, student, teacher)


def test_the_concepts_word_is_not_looked_for_inside_of_others():
    put = lambda text, word: class_prompt(
        text, ConfigDict({"concept_word": word, "class_word": "dog"})
    )
    assert put("a dax, two daxes", "dax") == "a dog, two daxes"
    assert put("two [V]s", "[V]") == "two dogs"
    assert put("\u4e00\u53ea[V]\u72d7", "[V]") == "\u4e00\u53eadog\u72d7"
    assert put("a [V] dog", "[V] dog") == put("a [V] Dog", "[V]") == "a dog"
    assert put("a [V] dogfish", "[V]") == "a dog dogfish"


@pytest.mark.slow
def test_a_prepared_data_set_tells_the_same(random_model, tmp_path):
    """Prepared for a teacher that is told a caption, it holds no pictures for one."""
    model, set_ = random_model, str(tmp_path / "set")
    path = write_rows(tmp_path / "rows", CAPTIONS, {**CAPTIONS, "short_en": "a [V]"})
    prompt = {"teacher__context": "prompt", "teacher__prompt_key": "detailed_en"}
    flags = [f"--config.{k.replace('__', '.')}={v}" for k, v in prompt.items()]
    done = run_program(
        "prepare", f"--config={ROOT}/configs/zimage.py:random", f"--config.data.path={path}",
        f"--config.model={model}", "--config.data.buckets=96x96", "--batch=1",
        f"--workdir={tmp_path}", f"--out={set_}", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = (open_features(model, p, tmp_path, **prompt) for p in (set_, path))
    assert ours.dataset.prompt_keys == theirs.dataset.prompt_keys == ("short_en",)
    jax.tree.map(np.testing.assert_array_equal, *(batch_of(f, [0, 1], 0) for f in (ours, theirs)))
    assert "without pictures for a teacher" in problems_of(open_features, model, set_, tmp_path)[0]
    (problem,) = problems_of(open_features, model, set_, tmp_path, method="sft")
    assert "holds no latents of pictures" in problem


def test_a_row_without_the_teachers_caption_is_named(tmp_path):
    prompt = {"teacher__context": "prompt", "teacher__prompt_key": "detailed_en"}
    read = lambda path, **more: data_set.open_rows(
        config_of(data__path=path, **prompt, **more), tmp_path
    )
    path = write_rows(tmp_path / "rows", CAPTIONS, {"short_en": "a [V]"}, {"short_en": "b"})
    for more in ({}, {"data__prompt_keys": "short_en,detailed_en"}):
        (problem,) = problems_of(read, path, **more)
        assert "caption 'detailed_en' is missing in lines 2, 3 (2 of 3 rows)" in problem
        assert "teacher.prompt_key" in problem
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "has only the key 'caption'" in problems_of(read, str(folder))[0]
    config = config_of(data__path="x", **prompt)
    (problem,) = problems_of(data_set.trained_keys, config, ("detailed_en",))
    assert "is the only caption key" in problem
    config = config_of(data__path="x", data__prompt_keys="short_en,detailed_en", **prompt)
    (note,) = registry.notes(config)
    assert "config.data.prompt_keys names the teacher's captions, 'detailed_en'" in note
    assert not registry.notes(config_of(data__path="x", data__prompt_keys="short_en", **prompt))


# --- Steps and runs


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    out = tmp_path_factory.mktemp("steps") / "steps.npz"
    command = [sys.executable, methods_step.__file__, out]
    done = subprocess.run(command, env=FAST, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return np.load(out)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_step_is_the_same_on_four_devices_as_on_one(steps):
    """Start and class pictures, noise and noise levels are drawn on the devices, and by them."""
    for what in ("loss", "loss_per_step", "gap", "grad_norm", "anchor_loss", "student"):
        four, one = (steps[f"{mesh}/{what}"] for mesh in ("four", "one"))
        assert relative_error(four, one) < 1e-5, what


LOW = {
    "steps": 4,
    "checkpoint_every": 2,
    "sample_every": 0,
    "sample_rows": 1,
    "data.buckets": "96x96",
    "learning_rate": 3e-3,
    "grid": "1,0.5",
    "sft.samples": 2,
    "lora.rank": 4,
    "lora.targets": ["layers.*.attention.to_q"],  # every adapter takes time to compile
}
OWN = {"teacher.context": "prompt", "teacher.prompt_key": "caption", "data.prompt_keys": "caption"}
RUNS = {
    "sft": {"sft.sigma": "nodes"},
    "sft_teacher": {"teacher.decay": 0.9},
    "offpolicy": {"offpolicy.states": "targets", "teacher.decay": 0.999},
    "pso": {},
    "dreambooth": {
        "dreambooth.concept_word": "a",
        "dreambooth.class_word": "the",
        "lora.kind": "lokr",
    },
    "dopsd": {**OWN, "teacher.weights": "live"},
}
RESUMED = "dreambooth"  # with LoKr; test_train.py has LoRA


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with work directories in which `train` ran for each method, on a model of one layer.

    In `resumed` one of them goes on from its first checkpoint.
    """
    folder, jobs = tmp_path_factory.mktemp("runs"), []
    model = write_random_model(folder / "model", size=Size(layers=1, refiner_layers=1))
    common = {"model": str(model), "data.path": str(write_folder(folder / "data", count=2))}
    common |= {**LOW, "data.cache": str(folder / "cache")}
    for method, fields in RUNS.items():
        jobs.append([method, {**common, **fields, "method": method}])
    jobs.append(["resumed", {**common, **RUNS[RESUMED], "method": RESUMED}])
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, ROOT / "tests/methods_train.py", folder / "jobs.json", RESUMED]
    done = subprocess.run(command, env=FAST, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "resuming at step 2" in done.stdout
    return folder


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in RUNS if method != "dopsd"])
def test_every_method_trains(runs, method):
    workdir = runs / method
    found = records(workdir)
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert all(np.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in found)
    assert all(len(record["loss_per_step"]) == 2 for record in found)
    assert (workdir / "lora" / "step_4.safetensors").exists()
    assert (workdir / "report.html").exists()


@pytest.mark.slow
def test_told_the_students_prompt_a_live_teacher_teaches_nothing(runs):
    for record in records(runs / "dopsd"):
        assert record["loss"] < 1e-10 and record["gap"] < 1e-5


@pytest.mark.slow
def test_another_method_and_another_adapter_resume_bit_for_bit(runs):
    whole, parts = runs / RESUMED, runs / "resumed"
    clock = ("seconds", "images_per_second", "input_seconds")
    strip = lambda rows: [{k: v for k, v in r.items() if k not in clock} for r in rows]
    assert strip(records(parts)) == strip(records(whole))
    read = lambda workdir: TensorFiles.open(workdir / "lora" / "step_4.safetensors")
    one, two = read(whole), read(parts)
    assert one.infos.keys() == two.infos.keys() and all("lokr" in name for name in one.infos)
    for name in one.infos:
        np.testing.assert_array_equal(one.read(name), two.read(name), err_msg=name)
