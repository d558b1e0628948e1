"""The page is whole by itself, says what is there, and says what is not."""

import json
import math
import os
import re
import shlex

import numpy as np
import pytest
from conftest import run_program
from page_checks import Page, points

from dopsd_jax.common.errors import UserError
from dopsd_jax.config import schema
from dopsd_jax.config.fields import defaults
from dopsd_jax.methods.method import TO_NOISED, TO_TEACHER
from dopsd_jax.reporting import run_account
from dopsd_jax.reporting.charts import Series, chart, number
from dopsd_jax.reporting.metrics import MetricsWriter
from dopsd_jax.reporting.pictures import TRAINING, GridRow, sample_path, save_grid
from dopsd_jax.reporting.run_page import ROUNDS, write_report


def steps_of(page):
    return [int(item["data-step"]) for item in page.all("li") if "data-step" in item]


def record(step, **others):
    loss = 1 / step
    return {
        "step": step, "loss": loss, "loss_per_step": [loss, None, 2 * loss], "gap": math.sqrt(loss),
        "grad_norm": 1.0, "lr": 1e-4, "seconds": 2.0, "images_per_second": 4.0, **others,
    }  # fmt: skip


def run(workdir, steps, grids=(), config=None, caption="a fox", **others):
    with MetricsWriter(workdir) as writer:
        for step in range(1, steps + 1):
            writer.write(record(step, **others))
    for step in grids:
        images = [np.full((6, 4, 3), shade % 256, np.uint8) for shade in (90, step)]
        save_grid(
            sample_path(workdir, step), ["base", "tuned"], [GridRow(caption, images)], cell=16
        )
    if config is not None:
        (workdir / "config.json").write_text(json.dumps(config))
    path = write_report(workdir)
    assert path == workdir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_run_shows_curves_samples_and_settings(tmp_path):
    config = {"config": {"steps": 20, "lora.rank": 64}, "versions": {"jax": "0.10.2"}}
    page = run(tmp_path, 12, grids=[0, 10, 5], config=config)
    text = " ".join(page.text)
    assert "12 of 20" in text and "0.08333" in text and "24 s" in text
    # Of loss_per_step two are trained; a constant learning rate is a number and no curve.
    assert len(page.all("svg")) == 5 and len(points(page)) == 6
    assert steps_of(page) == [0, 5, 10]
    (slider,) = page.all("input")
    assert slider["max"] == "2" and page.by_id("picker").get("hidden", "no") is None
    assert "draws 4 x 6 pixels" in text  # all are small and alike
    assert all(word in text for word in ("lora.rank", "64", "jax", "0.10.2", "a fox"))


def test_the_pictures_of_a_step_are_told_apart_and_those_of_all_stand_once(tmp_path):
    page = run(tmp_path, 10, grids=[0, 5, 10])
    found = [(f["data-part"], f.get("data-step")) for f in page.all("figure") if "data-part" in f]
    assert found == [("base", None), *(("tuned", step) for step in ("0", "5", "10"))]
    alts = [image["alt"] for image in page.all("img")]
    assert alts == ["base: a fox", *(f"tuned, step {step}: a fox" for step in (0, 5, 10))]


@pytest.mark.parametrize(
    ("config", "kind"),
    [({}, "LoRA"), ({"lora.kind": "lokr"}, "LoKr"), ({"train": "full"}, "Fine-tuned model")],
)
def test_a_page_says_what_was_trained(tmp_path, config, kind):
    page = run(tmp_path, 1, config={"config": config})
    assert page.inside("p", "header")[0] == kind


def test_an_editor_is_drawn_with_by_a_picture(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "step_5.safetensors").write_bytes(b"")
    config = {"model": "a", "data.references": "before", "data.path": "after"}
    *_, draw = run(tmp_path, 5, config={"config": config}).inside("code", "section")
    assert "--reference" in shlex.split(draw) and "a after" not in draw


def test_each_step_is_tied_to_its_file(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "step_011.safetensors").write_bytes(b"")  # of no run
    ranking = {"best": 10, "checkpoints": [{"step": 10, "heldout_gap": 1}]}
    (tmp_path / "ranking.json").write_text(json.dumps(ranking))
    for name in ("step_5", "step_10", "best"):
        (tmp_path / "lora" / f"{name}.safetensors").write_bytes(b"")
        page = run(tmp_path, 10, grids=[0, 5, 10], config={"config": {"model": "a b"}})
        newest = str(tmp_path / "lora" / f"{name}.safetensors")
        *_, result, draw = page.inside("code", "section")
        assert result == newest
        assert shlex.split(draw)[:8] == [
            "python", "-m", "dopsd_jax.sample", "--model", "a b", "--lora", newest, "--prompt"
        ]  # fmt: skip
    files = {item["data-step"]: item.get("data-file") for item in page.all("li")}
    assert files == {
        "0": None,
        "5": str(tmp_path / "lora" / "step_5.safetensors"),
        "10": str(tmp_path / "lora" / "step_10.safetensors"),
    }


def test_small_pictures_are_embedded_without_losses_and_enlarged_by_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), np.uint8)
    large = np.kron(pixels[1], np.ones((8, 8, 1), np.uint8))
    save_grid(sample_path(tmp_path, 0), ["base", "tuned"], [GridRow("", [pixels[0], large])])
    page = Page(write_report(tmp_path).read_text())
    small, big = page.all("img")
    assert small["class"] == "pixels" and "class" not in big
    assert (np.asarray(page.picture(small)) == pixels[0]).all()
    assert page.picture(big).size == (240, 320)  # the grid's cell


def test_training_pictures_are_shown(tmp_path):
    images = [np.full((9, 9, 3), 40 * n, np.uint8) for n in range(5)]
    save_grid(tmp_path / TRAINING, [""] * 6, [GridRow("", [*images, None])], cell=160)
    page = Page(write_report(tmp_path).read_text())
    assert [i["alt"] for i in page.all("img")] == [f"training picture {n}" for n in range(1, 6)]


def test_only_settings_that_differ_from_the_defaults_are_open(tmp_path):
    config = schema.flat(defaults()) | {"steps": 7, "method": "sft", "unknown": ""}
    page = run(tmp_path, 1, config={"config": json.loads(json.dumps(config))})
    usual = str(schema.flat(defaults())["steps"])
    names = page.inside("th", "tbody", but="details")
    cells = page.inside("td", "tbody", but="details")
    assert dict(zip(names, zip(cells[::2], cells[1::2], strict=True), strict=True)) == {
        "steps": ("7", usual), "method": ("sft", "dopsd"), "unknown": ("(empty)", "(none)")
    }  # fmt: skip
    assert len(page.inside("th", "details")) >= len(config)


def test_title_date_and_command_are_those_of_the_run(tmp_path):
    command = "python -m dopsd_jax.train --config 'a b.py'"
    settings = {"data.trigger": "", "data.path": ["photos/mila", "x"], "method": "dopsd"}
    content = {"config": settings, "started": "2030-01-02", "command": command}
    page = run(tmp_path, 1, config=content)
    assert page.inside("h1", "header") == ["mila"] and page.inside("code", "section") == [command]
    assert "2030-01-02" in "".join(page.text) and "method dopsd" in "".join(page.text)
    settings["data.trigger"] = "ohwx"
    assert run(tmp_path, 1, config=content).inside("h1", "header") == ["ohwx"]


def test_without_scores_the_gap_is_the_verdict(tmp_path):
    said = run(tmp_path, 40).inside("p", "header")[-1]
    ends = (1, 2, 3, 4), (37, 38, 39, 40)
    first, last = (np.mean([1 / math.sqrt(step) for step in steps]) for steps in ends)
    assert f"fell: {number(first)} at the start, {number(last)} now." in said
    rising = [{"gap": 1.0}, {"gap": None}, {"gap": 2.0, "anchor_gap": 0.25}]
    said = run_account.sentence(rising, TO_TEACHER)
    assert said.startswith("The gap (student and teacher) did not fall: 1 at")
    assert "; on ordinary prompts the student is 0.25 from the start." in said
    assert run_account.sentence(rising[:2], TO_TEACHER) == ""
    # The gap to noised pictures depends on the noise that was drawn.
    assert run_account.sentence(rising, TO_NOISED).startswith("On ordinary prompts the student is")


def test_a_short_velocity_is_no_haze_where_noised_pictures_are_fitted(tmp_path):
    for method, shown in (("sft", 0), ("dopsd", 1)):
        page = run(tmp_path, 3, config={"config": {"method": method}}, norm_ratio=0.7)
        assert len(page.all("aside")) == shown


def test_warnings_and_incidents_are_shown_where_there_are_any(tmp_path):
    assert not run(tmp_path, 3, norm_ratio=0.95).all("aside")
    ranking = {"best": 2, "checkpoints": [{"step": 2, "heldout_gap": 1}, {"step": 3}]}
    (tmp_path / "ranking.json").write_text(json.dumps(ranking))
    (tmp_path / "incidents").mkdir()
    incident = {"why": "the loss <is> a spike", "samples": [{"image": "a.png"}, 3, {"image": "b"}]}
    (tmp_path / "incidents" / "step_3.json").write_text(json.dumps(incident))
    page = run(tmp_path, 3, norm_ratio=0.5, spike=True, nonfinite=["loss"])
    lines = page.inside("li", "aside")
    assert len(lines) == 4 and "3 steps were not finite" in lines[0] and "3 steps" in lines[1]
    assert "0.50 as long" in lines[2] and "not the best, which is that of step 2" in lines[3]
    assert page.inside("td", "aside") == ["the loss <is> a spike", "a.png, b"]
    (tmp_path / "incidents" / "step_3.json").write_text("[")
    with pytest.raises(UserError, match=r"step_3\.json: not valid JSON"):
        write_report(tmp_path)


def test_nothing_outside_the_page_is_needed(tmp_path):
    page = run(tmp_path, 3, grids=[0])
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("href", "srcset", "data", "xlink:href"):
            assert name not in attrs
        assert attrs.get("src", "data:").startswith("data:")
    raw = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import|import\(|fetch\(", raw)
    assert "prefers-color-scheme: dark" in raw


def test_every_text_is_escaped(tmp_path):
    evil = '</script><script>alert(1)</script><b title="&amp;">'
    workdir = tmp_path / "<u>&run"
    workdir.mkdir()
    page = run(workdir, 2, grids=[1], config={evil: {evil: evil}, "loose": [evil]}, caption=evil)
    assert len(page.all("script")) == 1 and not page.all("u")
    assert not any("title" in attrs for _, attrs in page.tags)
    text = "".join(page.text)
    assert text.count(evil) >= 4 and "<u>&run" in text


def test_the_verdict_stands_before_the_scores(tmp_path):
    rows = [{"model": "base", "identity": 0.1}, {"model": "tuned", "identity": 0.7}]
    for said in ("Learned <it>.", 3, "", None):
        scores = {"verdict": said, "note": "n", "rows": rows}
        (tmp_path / "scores.json").write_text(json.dumps(scores))
        text = run(tmp_path, 0).text
        assert ("Learned <it>." in text) == (said == "Learned <it>.")
        assert "Learned <it>." not in text[text.index("0.700") :]


def test_letters_that_cannot_be_encoded_do_not_spoil_the_page(tmp_path):
    page = run(tmp_path, 1, grids=[0], caption="half a pair \ud83e here")
    assert any("half a pair ? here" in text for text in page.text)


def test_no_steps_and_no_files_are_said_to_be_missing(tmp_path):
    page = Page(write_report(tmp_path).read_text())
    text = " ".join(page.text)
    assert "No step has been recorded yet" in text and "No samples have been drawn yet" in text
    assert (
        "no config.json" in text and text.count("nothing was recorded") == 6
    )  # of each curve that all runs have
    assert not page.all("svg") and not page.all("img") and not page.all("input")


def test_one_step_is_a_point_and_not_a_curve(tmp_path):
    page = run(tmp_path, 1, grids=[0])
    assert not page.all("polyline") and len(page.all("circle")) == 7
    assert " ".join(page.text).count("one step so far") == 6
    assert not page.all("input")  # nothing to slide


def test_values_that_are_not_finite_break_the_curve_and_are_counted(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 10):
            writer.write(record(step, loss=float("nan") if step == 4 else 1.0))
    page = Page(write_report(tmp_path).read_text())
    assert sum("1 value was not finite" in t for t in page.text) == 1
    first, second = points(page)[:2]
    assert len(first) == 3 and len(second) == 5
    missing = chart("Loss", "", [Series("Loss", [1, 2], [None, None])])
    assert "nothing was recorded" in missing and "2 values were not finite" in missing


def test_broken_pictures_are_named_and_the_rest_is_shown(tmp_path):
    run(tmp_path, 2, grids=[0, 1])
    sample_path(tmp_path, 1).write_bytes(b"not a picture")
    page = Page(write_report(tmp_path).read_text())
    assert [image["alt"] for image in page.all("img")] == ["base: a fox", "tuned: a fox"]
    assert any("step_000001.png cannot be read" in text for text in page.text)
    sample_path(tmp_path, 1).unlink()
    os.mkfifo(sample_path(tmp_path, 1))  # opened, it would wait for a writer
    page = Page(write_report(tmp_path).read_text())
    assert any("cannot be read (is a device or a pipe" in text for text in page.text)


def test_what_lies_behind_the_last_step_is_of_before_the_run_went_back(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "incidents").mkdir()
    for name in ("step_3", "step_9", "best"):
        (tmp_path / "lora" / f"{name}.safetensors").write_bytes(b"")
    for step in (2, 9):
        (tmp_path / "incidents" / f"step_{step}.json").write_text("{}")
    ranking = {"best": 9, "checkpoints": [{"step": 3, "heldout_gap": 2.5}, {"step": 9}]}
    (tmp_path / "ranking.json").write_text(json.dumps(ranking))
    page = run(tmp_path, 4, grids=[0, 3, 9])
    text = " ".join(page.text)
    assert steps_of(page) == [0, 3] and "2.5" in text
    assert "The file: step 3" in text and "incidents: 1" in text and "step_9" not in text
    run(tmp_path, 9, grids=[9])
    assert "The file: the best checkpoint, step 9" in (tmp_path / "report.html").read_text()


def test_a_best_file_without_its_ranking_is_not_called_the_best(tmp_path):
    (tmp_path / "lora").mkdir()
    for name in ("step_5", "best"):
        (tmp_path / "lora" / f"{name}.safetensors").write_bytes(b"")
    page = run(tmp_path, 5)
    assert "The file: step 5" in page.text


def test_broken_files_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON .* restore or remove it"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: holds no JSON object"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


def test_many_rounds_are_thinned_and_that_is_said(tmp_path):
    page = run(tmp_path, 10 * (ROUNDS + 5), grids=range(0, 10 * (ROUNDS + 6), 10))
    steps = steps_of(page)
    assert len(set(steps)) == ROUNDS and steps[0] == 0 and steps[-1] == 10 * (ROUNDS + 5)
    assert any("6 further rounds" in text for text in page.text)


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run(tmp_path, 2)
    before = (tmp_path / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_step_that_compiles_does_not_squeeze_the_throughput(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 9):
            writer.write(record(step, images_per_second=0.01 if step == 1 else 4.0 + step % 2))
    page = Page(write_report(tmp_path).read_text())
    assert len(points(page)[-1]) == 7
    facts = dict(zip(page.inside("dt", "dl"), page.inside("dd", "dl"), strict=True))
    assert facts["images/s, median"] == "4"
    assert any("without step 1, which compiles" in text for text in page.text)


def test_metrics_that_are_no_numbers_are_gaps_and_not_faults(tmp_path):
    values = [
        "Infinity",
        "-Infinity",
        "NaN",
        "1e400",
        "1e308",
        "-1e308",
        "null",
        '"x"',
        "[]",
        "9" * 400,
    ]
    lines = [
        f'{{"step": {step}, "loss": {value}, "loss_per_step": [{value}, 1.0], "lr": {value}}}'
        for step, value in enumerate(values, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = Page(write_report(tmp_path).read_text())
    assert any("were not finite and are left out" in text for text in page.text)
    assert not any("inf" in text or "nan" in text for text in page.text)


@pytest.mark.parametrize(
    "line", ["{", "[]", "7", '{"step": true}', '{"step": -1}', '{"step": 1e3}', "[" * 10**5]
)
def test_lines_that_are_no_records_are_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is not a JSON object with a step"):
        write_report(tmp_path)


def test_changes_on_the_way_are_shown(tmp_path):
    change = {"step": 40, "field": "learning_rate", "old": 0.1, "new": "<b>"}
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "changes": [change, 3]}))
    text = write_report(tmp_path).read_text()
    assert "Changed on the way" in text
    assert Page(text).inside("td", "section") == ["learning_rate", "0.1", "<b>"]


def test_the_program_writes_the_page_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    done = run_program("report", tmp_path / "run")
    assert done.returncode == 0 and done.stdout == f"report: {tmp_path / 'run' / 'report.html'}\n"
    (tmp_path / "empty").mkdir()
    for name, said in (("empty", "holds no run"), ("nowhere", "is not a folder")):
        done = run_program("report", tmp_path / name)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
