"""Fields are declared once; what configurations and command lines may not say is one line."""

import json
import re

import pytest
from conftest import ROOT, problems_of, run_program
from ml_collections import ConfigDict

from dopsd_jax import families
from dopsd_jax.common import config_fields
from dopsd_jax.common.config_fields import (
    GIVEN,
    POSITIVE,
    TRUE,
    UNSET,
    Field,
    as_list,
    name_or_list,
)
from dopsd_jax.config import changes, flags, loading, schema
from dopsd_jax.config.fields import choices, conditions, declared, defaults
from dopsd_jax.config.reference import help_text, markdown
from dopsd_jax.methods import flow_matching, registry
from dopsd_jax.run import build, workdir
from dopsd_jax.run.workdir import open_workdir
from dopsd_jax.weights import converted, hub

NUMBERS = [f for f in declared().values() if f.kind in config_fields.NUMBERS]
WRONG = (float("nan"), float("inf"), -float("inf"), 10**30, -(10**30), "text", None, [], True)


RANDOM = loading.load("zimage:random")


def config_with(name, value):
    config = RANDOM.to_dict()
    *groups, last = name.split(".")
    (config[groups[0]] if groups else config)[last] = value
    return config


@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_no_number_beyond_its_range_passes(field):
    low = -2 if field.name.startswith("mesh.") else -1
    for value in (*WRONG, low, *(0.5,) * (field.kind != "float")):
        (problem,) = problems_of(schema.check, config_with(field.name, value))
        assert problem.startswith(f"config.{field.name}: ")
    assert field.fault(field.default) is None
    assert field.fault(field.high) is None


@pytest.mark.parametrize("name", [f.name for f in declared().values() if f not in NUMBERS])
def test_no_other_field_takes_another_kind(name):
    for value in (None, 3, 0.5, float("nan"), {}, b"x"):
        problems = problems_of(schema.check, config_with(name, value))
        assert any(p.startswith(f"config.{name}") for p in problems)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grid", "nan,0.5"),
        ("grid", [1.0, float("inf")]),
        ("grid", [10**400]),
        ("steps", 10**6000),
        ("data.buckets", [[10**6000, "x"]]),
        ("loss", "1e999"),
        ("loss_steps", [None]),
        ("lora.targets", [{}]),
        ("data.buckets", [0.5, None]),
        ("data.path", "a\0b"),
        ("data.path", "https://example.org/pictures.zip"),
        ("model", "https://example.org/model"),
        ("lora.init_from", "gs://bucket/dog.safetensors"),
        ("data.cache", "gs://bucket/features"),
        ("model", ""),
    ],
    ids=lambda v: v if isinstance(v, str) and v.isprintable() else type(v).__name__,
)
def test_wrong_items_and_names_are_told(name, value):
    (problem,) = problems_of(schema.check, config_with(name, value))
    assert problem.startswith(f"config.{name}: ")


def test_a_number_must_be_declared_with_bounds():
    with pytest.raises(TypeError):
        Field("steps", 3, "no bounds")


def test_conditions_name_fields_and_values_that_there_are():
    fields = declared()
    for field in fields.values():
        for name, needed in conditions(field).items():
            known = choices(fields[name]) or re.findall(r"\w+", fields[name].help)
            listed = any(needed is one for one in (POSITIVE, TRUE, GIVEN, UNSET))
            assert listed or set(needed) <= set(known)
            assert needed is not POSITIVE or fields[name].kind in ("int", "float")


@pytest.mark.parametrize(
    ("name", "other", "value", "why"),
    [
        ("teacher.warmup_decay", "teacher.warmup_steps", 2, "with config.teacher.warmup_steps = 0"),
        ("stop.class_word", "stop.scorers", "contrast", "while config.stop.scorers is empty"),
        ("data.reference_crop", "data.references", "a", "while config.data.references is empty"),
    ],
)
def test_a_field_that_only_another_gives_an_effect(name, other, value, why):
    (problem,) = problems_of(schema.check, RANDOM, [name])
    assert problem == f"config.{name}: has no effect {why}; leave it out"
    schema.check(config_with(other, value), [name])


def test_a_resolution_beside_buckets_is_refused():
    (problem,) = problems_of(schema.check, RANDOM, ["data.resolution"])
    why = "with config.data.buckets = 128x128,144x112"
    told = (
        f"config.data.resolution: has no effect {why}; leave it out, or empty config.data.buckets"
    )
    assert problem == told
    for empty in ("", []):
        schema.check(config_with("data.buckets", empty), ["data.resolution", "data.buckets"])


def test_presets_of_adapted_layers_are_told_with_their_family():
    """Before the families' names stand those that every family has."""
    every, *own = re.split(r", of (?=Z-Image|FLUX)", declared()["lora.targets"].help)
    words = lambda text: set(re.findall(r"\w+", text))
    told = {"Z-Image": "zimage", "FLUX": "flux2_klein"}
    own = {told[re.match(r"[\w-]+", text)[0]]: words(text) for text in own}
    presets = {family.NAME: set(family.LORA_PRESETS) for family in families.every()}
    common = set.intersection(*presets.values())
    assert common <= words(every) and not words(every) & set().union(*presets.values()) - common
    for name, known in presets.items():
        assert known - common == own[name] & set().union(*presets.values())


def test_defaults_are_of_all_fields_and_right():
    config = defaults()
    assert schema.flat(config) == {name: f.default for name, f in declared().items()}
    config.model = config.data.path = "somewhere"
    schema.check(config)


def test_choices_are_those_of_the_implementation():
    assert choices(declared()["sft.sigma"]) == flow_matching.LEVELS
    assert choices(declared()["method"]) == tuple(registry.METHODS)


def test_the_document_is_the_declaration():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == markdown(), "run: python -m dopsd_jax.config.reference > docs/configuration.md"
    for method in registry.METHODS.values():
        assert f"| `{method.name}` | {method.summary} | {method.source} |" in text
    for name, field in declared().items():
        assert field.help and f"--config.{name}=" in help_text()


# --- The command line


def read(arguments):
    rest = flags.taken(["train", *arguments])
    return loading.load("zimage:random", flags.CONFIG.asked), rest[1:]


def test_fields_are_read_from_the_command_line_as_their_kind_says():
    config, rest = read(
        ["--config.steps=7", "--config.teacher.decay", "0.5", "--other=1", "--config.seed=1",
         "--config.seed=2", "--config.data.caption_lines", "--noconfig.data.folder_repeats",
         "--config.grid=1,0.5", "--config.model=x=y"]
    )  # fmt: skip
    assert rest == ["--other=1"]
    assert (config.steps, config.teacher.decay, config.seed) == (7, 0.5, 2)
    assert config.data.caption_lines is True and config.data.folder_repeats is False
    assert name_or_list(config.grid) == (1, 0.5) and config.model == "x=y"
    assert as_list(config.data.buckets) == ("128x128", "144x112")


def test_all_wrong_fields_of_a_command_line_are_told_together():
    problems = problems_of(
        read,
        ["--config.lora.rnk=3", "--config.steps=many", "--config.learning_rate=fast",
         "--config.data.caption_lines=maybe", "--config.lora=3"],
    )  # fmt: skip
    assert problems == (
        "config.lora.rnk: there is no such field; did you mean config.lora.rank?",
        "config.steps: 'many' must be a whole number",
        "config.learning_rate: 'fast' must be a number",
        "config.data.caption_lines: 'maybe' must be true or false",
        problems[-1],
    )
    assert problems[-1].startswith("config.lora: there is no such field")
    assert "has no value" in problems_of(read, ["--config.steps"])[0]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rank", "config.lora.rank"),
        ("data.rank", "config.lora.rank"),
        ("trigger", "config.data.trigger"),
        ("rnk", "config.lora.rank"),
        ("seeed", "config.seed"),
        ("init_from", "config.lora.init_from"),
    ],
)
def test_a_field_written_without_its_part_is_known(name, meant):
    assert schema.unknown(name).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("value", [",", " , ", [""], []])
def test_a_list_without_a_path_is_empty(value):
    problems = problems_of(schema.check, config_with("data.path", value))
    assert "config.data.path: is empty; name a data set" in problems


def test_text_that_no_file_can_hold_is_told():
    byte = "caf\udce9"  # as Python reads a byte that is no UTF-8
    fields = {"data.trigger": byte, "data.prompt_keys": ["text", byte], "data.path": f"{byte}/a"}
    told = {name: declared()[name].fault(value) for name, value in fields.items()}
    assert told.pop("data.path") == "is not a name in UTF-8; rename it"
    assert set(told.values()) == {"is not text in UTF-8; write it again"}
    (problem,) = problems_of(schema.check, config_with("data.trigger", byte))
    assert problem == "config.data.trigger: 'caf\\udce9' is not text in UTF-8; write it again"


# --- Configuration files


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ("def get_config(:\n", "", ":1: invalid syntax"),
        ("x = 1\n", "", "has no function get_config"),
        ("get_config = 3\n", "", "has no function get_config"),
        ("def get_config():\n    return nothing\n", "", ":2: NameError"),
        ("def get_config():\n    return 3\n", "", "returned int, not a ConfigDict"),
        ("def get_config():\n    raise SystemExit\n", "", ":2: SystemExit"),
        ("def get_config():\n    return {}\n", ":x", "takes 0 positional arguments"),
        ("import no_such_module\n", "", ":1: ModuleNotFoundError"),
        ("def get_config():\n    return {'steps': 3}\n", "", "config.seed: is missing"),
        ("\0", "", "null"),
        (
            "from ml_collections.config_dict import *\ndef get_config():\n"
            "    return ConfigDict({'lora': {'rank': required_placeholder(int)}})\n",
            "",
            "own.py: config.lora.rank: has no value",
        ),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n"
            "    c = ConfigDict({'data': {}})\n    c.data.more = c\n    return c\n",
            "",
            "own.py: config.data.more: is a group inside itself",
        ),
        (
            "x = {}\nx['x'] = x\ndef get_config():\n    return x\n",
            "",
            "own.py: config.x: is a group inside itself",
        ),
        ("def get_config():\n    return {'data': {1: 2}}\n", "", "config.data.1: its name 1 is no"),
        ("def get_config():\n    return {None: 2}\n", "", "config.None: its name None is no text"),
    ],
)
def test_a_wrong_configuration_file_is_one_line_with_its_place(tmp_path, text, argument, message):
    path = tmp_path / "own.py"
    path.write_text(text)
    problems = problems_of(lambda: schema.check(loading.load(f"{path}{argument}")))
    assert any(message in problem for problem in problems), problems


def test_what_is_no_configuration_file_is_told(tmp_path):
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe")
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "none.py", "no such file"),
        (tmp_path / "bytes.py", "is not UTF-8"),
        ("zimagee", "is neither a file nor a configuration"),
        ("/dev/zero", "is a device"),
    ):
        (problem,) = problems_of(loading.load, str(path))
        assert message in problem


def test_a_copied_configuration_file_works_anywhere(tmp_path):
    text = (ROOT / "configs" / "zimage.py").read_text(encoding="utf-8")
    (tmp_path / "own.py").write_text(text)
    for name in ("lora", "full", "tiny", "tiny_full", "random", "random_full"):
        copied = loading.load(f"{tmp_path / 'own.py'}:{name}")
        assert copied == loading.load(f"zimage:{name}")


def test_an_empty_work_directory_is_refused_before_anything():
    done = run_program("train", "--config=zimage:random", "--workdir=")
    assert done.returncode == 2 and done.stderr.startswith("error: --workdir=: is empty")


# --- Going on with other settings


def test_what_may_change_is_what_the_fields_declare(tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    start = RANDOM.to_dict()
    facts = {"data": "one", "model_revision": "r"}
    open_workdir(tmp_path, start, facts)
    for name, field in declared().items():
        other = config_with(name, "other")
        old, new = ({"config": schema.flat(c), "facts": facts} for c in (start, other))
        group = "data" if name.startswith("data.") else name
        made, faults = changes.compare(old, new, [group])
        assert (len(made), len(faults)) == {
            "always": (0, 0), "on request": (1, 0), "never": (0, 1)
        }[field.change]  # fmt: skip
        assert all("config.lora.init_from" in fault for fault in faults)
    (problem,) = problems_of(open_workdir, tmp_path, start, facts | {"data": "two"})
    assert "--allow_changes=data" in problem
    assert "data one, now it is two (config.data.path = 'random'); allow" in problem
    moved = config_with("data.path", "elsewhere")
    open_workdir(tmp_path, moved, facts, False)
    (problem,) = problems_of(open_workdir, tmp_path, moved, facts | {"data": "two"}, False)
    assert "now it is two (config.data.path = 'random', now 'elsewhere'); allow" in problem
    (problem,) = problems_of(
        open_workdir, tmp_path, start, facts | {"model_revision": "s"}, True, ["data"]
    )
    assert "model_revision" in problem
    path = tmp_path / "config.json"
    for step, data in ((5, "two"), (9, "three")):
        (tmp_path / "checkpoints" / str(step)).mkdir(exist_ok=True)
        open_workdir(tmp_path, start, facts | {"data": data}, True, ["data"])
        open_workdir(tmp_path, start, facts | {"data": data})  # the same again: nothing changes
    assert json.loads(path.read_text())["changes"] == [
        {"step": 5, "field": "data", "old": "one", "new": "two"},
        {"step": 9, "field": "data", "old": "two", "new": "three"},
    ]
    for content in ("[]", '{"config": 3, "facts": {}}', '{"config": {}}'):
        path.write_text(content)
        (problem,) = problems_of(open_workdir, tmp_path, start, facts)
        assert "is not a configuration of a run" in problem


def test_steps_that_decide_the_learning_rate_change_on_request_only():
    for schedule, free in (("constant", True), ("linear", False), ("cosine", False)):
        old = {"config": schema.flat(config_with("lr_schedule", schedule)), "facts": {}}
        new = {"config": old["config"] | {"steps": old["config"]["steps"] + 1}, "facts": {}}
        made, faults = changes.compare(old, new, [])
        assert not made and len(faults) == (not free)
        assert all("--allow_changes=steps" in fault for fault in faults)
        made, faults = changes.compare(old, new, ["steps"])
        assert not faults and [one["field"] for one in made] == ["steps"] * (not free)


def test_a_field_that_is_younger_than_the_run_had_its_default():
    new = {"config": schema.flat(RANDOM), "facts": {}}
    old = {"config": {k: v for k, v in new["config"].items() if k != "data.trigger"}, "facts": {}}
    assert changes.compare(old, new, []) == ([], [])
    new["config"]["data.trigger"] = "dax"
    (fault,) = changes.compare(old, new, [])[1]
    assert "config.data.trigger = '', now 'dax'" in fault
    old["config"]["gone"] = 3
    assert len(changes.compare(old, new, ["data"])[1]) == 1


def test_what_machines_must_have_in_common_names_no_place():
    same = schema.placeless(RANDOM)
    assert "config.steps" in same and "config.data.prompt_draw" in same
    assert not {"config.model", "config.data.path", "config.data.cache"} & same.keys()


def test_other_weights_in_a_model_folder_are_refused():
    """A run that is older than the digest goes on."""
    run = lambda **facts: {"config": schema.flat(RANDOM), "facts": {"data": "one", **facts}}
    assert changes.compare(run(), run(base_digest="b"), []) == ([], [])
    made, (fault,) = changes.compare(run(base_digest="a"), run(base_digest="b"), ["data"])
    assert not made and "was trained with base_digest a, now it is b" in fault
    # Asked before the digest is known.
    assert changes.compare(run(base_digest="a"), run(), []) == ([], [])


@pytest.mark.parametrize("family", ["zimage", "flux2_klein"])
def test_full_weights_in_another_arrangement_are_refused(tmp_path, monkeypatch, family):
    """Their shapes fit, but columns would be taken for others. Adapters have no such order."""
    load = lambda name: loading.load(f"{family}:{name}").to_dict()
    adapters, config, workdir = load("random"), load("random_full"), tmp_path / "full"
    for folder, own in ((tmp_path / "lora", adapters), (workdir, config)):
        (folder / "checkpoints" / "5").mkdir(parents=True)
        open_workdir(folder, own, {"data": "one"})
        open_workdir(folder, own, {"data": "one"})  # of now: nothing is refused
    with monkeypatch.context() as patched:
        patched.setattr(converted, "FORMAT", 99)
        open_workdir(tmp_path / "lora", adapters, {"data": "one"})
        (problem,) = problems_of(open_workdir, workdir, config, {"data": "one"})
    assert f"weights_arrangement {converted.FORMAT}, now it is 99" in problem
    path = workdir / "config.json"  # as runs were recorded before
    path.write_text(path.read_text().replace("weights_arrangement", "other"))
    (problem,) = problems_of(open_workdir, workdir, config, {"data": "one"})
    assert problem.startswith(f"{workdir}: was trained with weights_arrangement unknown")
    assert problem.endswith("with the result of this one in config.model")


@pytest.mark.parametrize("field", workdir.MODELS)
def test_a_commit_on_the_hub_does_not_end_a_run(tmp_path, monkeypatch, field, capsys):
    """It goes on with the one it began with, which may be named too; another is refused."""
    fact = workdir.MODELS[field]
    named = lambda model: config_with(field, model)
    open_workdir(tmp_path, named("owner/name"), {fact: "c0"})
    assert workdir.as_begun(tmp_path, named("owner/name"), field) == "owner/name"
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    assert workdir.as_begun(tmp_path, named("owner/name"), field) == "owner/name@c0"
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"config.{field}: owner/name@c0, which this run began with"
    for model in ("owner/name@c1", "owner/other", "name", ""):
        assert workdir.as_begun(tmp_path, named(model), field) == model
    (problem,) = problems_of(open_workdir, tmp_path, named("owner/name@c1"), {fact: "c1"})
    assert f"{fact} c0, now it is c1" in problem
    (problem,) = problems_of(open_workdir, tmp_path, named("owner/other"), {fact: "c0"})
    assert "'owner/name', now 'owner/other'" in problem
    open_workdir(tmp_path, named("owner/name@c0"), {fact: "c0"})
    open_workdir(tmp_path, named("owner/name"), {fact: "c0"})
    if field == "model":
        calls = []
        monkeypatch.setattr(hub, "_download", lambda *args: calls.append(args) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build.open_pipeline(ConfigDict(named("owner/name")), tmp_path)
        assert calls[0][:2] == ("owner/name", "c0")


def test_what_can_never_change_is_refused_with_the_way_to_go_on():
    changes.check_allowed(["learning_rate", "data", "steps"])
    problems = problems_of(changes.check_allowed, ["lora.rank", "learningrate", "method"])
    assert len(problems) == 3
    assert "config.lora.rank cannot change within a run" in problems[0]
    assert "config.lora.init_from" in problems[0]
    assert "did you mean config.learning_rate?" in problems[1]
