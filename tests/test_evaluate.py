"""The evaluation as a user runs it, on the miniature with a strong random adapter."""

import html
import importlib.util
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run_program
from PIL import Image

from dopsd_jax import evaluate
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.config.fields import declared
from dopsd_jax.evaluation import appearance, arms, gathering
from dopsd_jax.evaluation.arms import Tuned
from dopsd_jax.evaluation.drawing import Shot
from dopsd_jax.evaluation.gallery import Gallery
from dopsd_jax.evaluation.scorer import Case
from dopsd_jax.miniature import concepts, world
from dopsd_jax.miniature import world_scorers as scores
from dopsd_jax.random_model import write_random_model
from dopsd_jax.run import build, data_set
from dopsd_jax.run.workdir import open_workdir
from dopsd_jax.training.results import Results

COUNT, BATCH = 2, 4
SHORT = 2  # prompts with the word alone, and as many of ordinary things


def read_config(name):
    spec = importlib.util.spec_from_file_location("zimage_config", ROOT / "configs/zimage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(name)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    concept = world.random_concept(np.random.default_rng(3))
    folder = tmp_path_factory.mktemp("data") / "dax"
    return concepts.write_dataset(folder, concept, "dax", count=3)


OWN_SCORER = '''
"""A user's own scorer."""

import numpy as np


class Brightness:
    name, better, kinds, needs, identity = "brightness", "higher", (), (), "brightness-1"

    def __call__(self, images, cases):
        return [image.mean() / 255 for image in images]


not_a_scorer = 3
'''


@pytest.fixture(scope="module")
def run(data, random_model, lora_file, tmp_path_factory):
    """The program's output folder after a run with an adapter, and what it printed."""
    home = tmp_path_factory.mktemp("evaluation")
    (home / "mine.py").write_text(OWN_SCORER)
    names = ",".join(["mine:Brightness", *scores.scorers()])

    result = run_program(
        "evaluate", f"--config={ROOT}/configs/zimage.py:random", f"--config.model={random_model}",
        f"--config.data.path={data}", f"--lora={lora_file}", f"--out={home / 'out'}",
        f"--count={COUNT}", "--seeds=2", f"--batch={BATCH}", f"--scorers={names}",
        folder=home,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return home / "out", result.stdout


def test_the_table_the_numbers_and_the_page_agree(run, data):
    folder, printed = run
    content = json.loads((folder / "scores.json").read_text())
    arms_of = lambda name: set(content["scores"][name]["arms"])
    assert arms_of("concept IoU") == {"base", "teacher", "tuned"}
    assert arms_of("leaked concept") == {"base", "tuned"}
    assert content["facts"]["tuned"] and "jax" in content["versions"]
    assert content["config"].keys() == declared().keys()
    assert len(content["prompts"]) == 4 * COUNT + 2 * SHORT
    assert arms_of("composition kept") == {"tuned"}, "only open prompts are compared with the base"
    assert arms_of("place kept") == {"teacher", "tuned"}
    page = (folder / "evaluation.html").read_text()
    for name, score in content["scores"].items():
        for estimate in score["arms"].values():
            if abs(estimate["value"]) < 10:
                assert f"{estimate['value']:.3f} ± {estimate['half']:.3f}" in printed
                assert f"{estimate['value']:.3f} ± {estimate['half']:.3f}" in page
        for arm, values in score["values"].items():
            each = np.array(values)
            assert each.shape[1] == 2 and score["arms"][arm]["prompts"] == len(each)
            assert score["arms"][arm]["value"] == pytest.approx(each.mean()), name
        if "base" in score["values"]:
            gap = np.array(score["values"]["tuned"]) - score["values"]["base"]
            found = score["differences"]["tuned - base"]["value"]
            assert found == pytest.approx(gap.mean(), abs=1e-9)
    # Three models and the target; of other words there is no target and so no teacher.
    assert page.count("data:image") == COUNT * (4 + 2 * 4 + 2) + SHORT * (4 + 2)
    assert content["verdict"].endswith(".") and content["verdict"] in printed
    assert html.escape(content["verdict"]) in page
    assert "src=" not in page.replace('src="data:', "") and "<link" not in page
    assert (np.array(gap) != 0).any(), "the adapter changes nothing"


def test_scores_are_those_of_the_pictures_that_are_kept(run):
    folder, _ = run
    content = json.loads((folder / "scores.json").read_text())
    kept = {}
    for path in (folder / "pictures").iterdir():
        with Image.open(path) as image:
            about = image.text["model"], image.text["prompt"], int(image.text["seed"])
            kept[about] = np.asarray(image.convert("RGB"))
    assert len(kept) == 2 * (COUNT * (4 + 3 + 4) + SHORT * (2 + 1 + 2))
    for arm, values in content["scores"]["brightness"]["values"].items():
        for case, row in zip(content["prompts"], values, strict=True):
            for number, value in enumerate(row):
                image = kept[arm, case["prompt"], case["seed"] + 1_000_000 * number]
                assert value == pytest.approx(image.mean() / 255)


def test_a_real_data_set_is_asked_its_captions_and_the_users_prompts(random_model, tmp_path):
    """With a scorer of the user's, without a student; every row's class word is not needed."""
    (tmp_path / "mine.py").write_text(OWN_SCORER)
    (tmp_path / "prompts.txt").write_text("a [V] ship\na red hat\na [V] hat\n")
    result = run_program(
        "evaluate", f"--config={ROOT}/configs/zimage.py:random", f"--config.model={random_model}",
        "--config.data.buckets=64x64", f"--out={tmp_path / 'out'}", "--rows=1", "--seeds=1",
        f"--batch={BATCH}", f"--prompts={tmp_path / 'prompts.txt'}", 
        "--scorers=mine:Brightness,crispness,contrast", folder=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "1 training, 3 test; 1 pictures each of base, teacher" in result.stdout
    content = json.loads((tmp_path / "out/scores.json").read_text())
    assert [p["seed"] for p in content["prompts"]] == [30, 31, 32, 33]
    assert content["scores"]["brightness"]["arms"].keys() == {"base", "teacher"}
    assert content["scores"]["brightness"]["differences"]["teacher - base"]["prompts"] == 4


# --- what is kept


@pytest.fixture(scope="module")
def config(data, random_model):
    config = read_config("random")
    config.model, config.data.path = str(random_model), str(data)
    return config


@pytest.fixture(scope="module")
def cases(data):
    word, concept = concepts.read_concept(data / "concept.json")
    return scores.cases(concept, word, concepts=1, ordinary=1, others=1)


def make(config, student, folder):
    pipe, _ = build.open_pipeline(config, folder)
    return arms.make_arms(config, pipe, student, folder / "features", BATCH)


def test_a_second_call_draws_and_scores_only_what_is_missing(config, cases, lora_file, tmp_path):
    every = make(config, Tuned((LoraOption(lora_file),)), tmp_path)
    asked = []

    class Counting:
        name, better, kinds, needs, identity = "mean", "higher", (), (), "mean-1"

        def __call__(self, images, cases):
            asked.extend(cases)
            return [image.mean() for image in images]

    def evaluate():
        gallery = Gallery(tmp_path / "out")
        gathering.draw(every, cases, 1, gallery)
        return gathering.judge(Counting(), every, cases[:2], 1, gallery)

    first = evaluate()
    assert len(asked) == 6 and set(first.arms) == {"base", "teacher", "tuned"}
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/pictures").iterdir()}
    assert len(files) == 3 + 2 + 3
    student, teacher = (every[i].key(Shot(cases[0], 0)) for i in (2, 1))
    gallery = Gallery(tmp_path / "out")
    content = gallery.path(student).read_bytes()
    gallery.path(student).write_bytes(content[: len(content) // 2])
    gallery.path(teacher).unlink()
    with open(gallery.values.path, "a") as file:
        file.write('{"key": "cut of')
    again = evaluate()
    changed = {p for p, time in files.items() if p.stat().st_mtime_ns != time}
    assert changed == {gallery.path(student), gallery.path(teacher)}
    assert again == first and len(asked) == 6, "a value was asked for again"
    assert gallery.path(student).read_bytes() == content


def test_a_picture_has_another_key_for_whatever_it_depends_on(config, cases, lora_file, tmp_path):
    first = make(config, Tuned((LoraOption(lora_file),)), tmp_path)
    shots = [Shot(case, number) for case in cases for number in (0, 1)]
    keys = {arm.key(s) for arm in first for s in shots if arm.name != "teacher" or s.case.target
            is not None}  # fmt: skip
    assert len(keys) == 6 + 4 + 6
    other = write_random_model(tmp_path / "other", seed=1)
    whole = make(config, Tuned(model=other), tmp_path)
    shot = Shot(cases[0], 0)
    assert [arm.key(shot) for arm in whole[:2]] == [arm.key(shot) for arm in first[:2]]
    assert whole[2].key(shot) not in keys
    for several in ([0.5], [1.0, 1.0], [0.5, 1.0], [1.0, 0.5]):
        loras = tuple(LoraOption(lora_file, strength) for strength in several)
        found = make(config, Tuned(loras), tmp_path)[2].key(shot)
        assert found not in keys
        keys.add(found)
    gallery = Gallery(tmp_path / "out")
    gathering.draw(whole, cases[:1], 1, gallery)
    pictures = [gallery.picture(arm.key(shot)).astype(int) for arm in whole]
    assert np.abs(pictures[0] - pictures[2]).max() > 50
    config = config.copy_and_resolve_references()
    config.teacher.max_pixels //= 2
    changed = make(config, None, tmp_path)
    assert changed[0].key(shot) == first[0].key(shot)
    assert changed[1].key(shot) != first[1].key(shot)


# --- faults


def test_all_faults_are_told_together_and_nothing_is_drawn(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    concept = json.loads((data / "concept.json").read_text())
    (tmp_path / "data/concept.json").write_text(json.dumps(concept | {"texture": 9, "x": 1}))
    (tmp_path / "mine.py").write_text(OWN_SCORER)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": ""}\n{"prompt": "a", "rows": 1}\n')
    result = run_program(
        "evaluate", f"--config={ROOT}/configs/zimage.py:random",
        f"--config.data.path={tmp_path / 'data'}", f"--out={tmp_path / 'out'}",
        f"--lora={tmp_path / 'nothing.safetensors'}", f"--prompts={tmp_path / 'prompts.jsonl'}",
        "--scorers=mine:not_a_scorer,nowhere:x,sharpness", "--config.mesh.data=3",
        folder=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    problems = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for part in (
        "nothing.safetensors: no such file", "field texture is 9", "field x is unknown",
        "mine:not_a_scorer: is no scorer", "nowhere:x: cannot be imported",
        "'sharpness' is not one of", "prompts.jsonl:1: has no text", "'rows' is unknown",
        "config.mesh",
    ):  # fmt: skip
        assert any(part in problem for problem in problems), part
    assert len(problems) == 9 and not list((tmp_path / "out/pictures").iterdir())


def test_rows_are_pictures_whatever_a_run_makes_of_them(config):
    varied = config.copy_and_resolve_references()
    varied.data.flip, varied.data.crops, varied.data.folder_repeats = True, 3, True
    with varied.ignore_type():
        varied.data.resolution = [64, 128]
    plain = evaluate.unvaried(varied)
    assert plain.data.resolution == 128 and data_set.picture_views(plain) == data_set.views_of()
    assert not plain.data.folder_repeats and varied.data.flip


def test_a_scorer_without_work_is_left_out_or_if_it_was_named_refused(monkeypatch, capsys):
    made = [make() for make in appearance.scorers().values()]
    case = lambda kind: Case(kind, "a", "a", 64, 64, 0)
    give = lambda name, value: monkeypatch.setattr(evaluate, name, SimpleNamespace(value=value))
    give("SCORERS", None)
    give("SEEDS", 2)
    assert evaluate.fitting(made, [case("ordinary")]) == made
    assert evaluate.fitting(made, [case("test")]) == made[:2]
    assert "composition kept is left out: it judges none of these" in capsys.readouterr().out
    give("SEEDS", 1)
    assert evaluate.fitting(made, [case("ordinary")]) == made[:2]
    give("SCORERS", ["composition"])
    with pytest.raises(UserError, match="composition kept needs --seeds=2 or more"):
        evaluate.fitting(made, [case("ordinary")])


def test_the_student_of_a_run_is_its_newest_result(config, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        arms.of_run(str(tmp_path), config)
    open_workdir(tmp_path, config.to_dict(), {})
    with pytest.raises(UserError, match="has no LoRA file"):
        arms.of_run(str(tmp_path), config)
    (tmp_path / "lora").mkdir()
    for step in (500, 1500, 90):
        (tmp_path / f"lora/step_{step}.safetensors").touch()
    (tmp_path / "lora/step_9999.safetensors.partial").touch()
    newest = tmp_path / "lora/step_1500.safetensors"
    with pytest.raises(UserError, match=r"1500.*has no digest"):
        arms.of_run(str(tmp_path), config)
    Results(tmp_path, config).record([newest])
    assert arms.of_run(str(tmp_path), config) == Tuned((LoraOption(newest),))
    newest.write_bytes(b"altered")
    with pytest.raises(UserError, match="was changed or damaged; start the training again"):
        arms.of_run(str(tmp_path), config)
    other = config.copy_and_resolve_references()
    other.model, other.train = "elsewhere", "full"
    with pytest.raises(UserError) as error:
        arms.of_run(str(tmp_path), other)
    assert len(error.value.problems) == 2
    assert all("or name its result with --lora or" in problem for problem in error.value.problems)
    with pytest.raises(UserError, match="copy its lora/"):
        arms.of_run("gs://bucket/run", config)


@pytest.mark.parametrize(
    ("values", "fault"), [([1.0], "finite number for each"), ([1.0, float("nan")], "nan")]
)
def test_a_scorer_that_gives_no_numbers_is_named(config, cases, tmp_path, values, fault):
    class Broken:
        name, better, kinds, needs, identity = "broken", "higher", ("concept",), (), "1"

        def __call__(self, images, cases):
            return values

    every = make(config, None, tmp_path)[:1]
    gallery = Gallery(tmp_path / "out")
    for number in (0, 1):
        shot = Shot(cases[0], number)
        gallery.put(every[0].key(shot), cases[0].target, shot, "base", 0)
    with pytest.raises(UserError, match=f"scorer broken.*{fault}"):
        gathering.judge(Broken(), every, cases, 2, gallery)


@pytest.mark.parametrize(
    "line", ["[]", "3", '{"key": 1, "value": 2}', '{"key": "a", "value": "2"}', '{"key": "a"}',
             '{"key": "a", "value": true}', '{"key": "a", "value": NaN}', "x"],
)  # fmt: skip
def test_a_line_that_is_no_value_is_told(tmp_path, line):
    (tmp_path / "values.jsonl").write_text(f'{{"key": "a", "value": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"values\.jsonl:2: "):
        Gallery(tmp_path)
