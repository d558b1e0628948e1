"""The page of the experiment says what the records say: verdicts, pairs, and what was not run."""

from pathlib import Path

import jax
import numpy as np
import paper_arms
import paper_claims
import paper_page
import paper_records
import paper_run
import paper_styles
import pytest

RATE = paper_arms.RATES["lora"][0]


def record(arm, concept, seed, iou, crispness=0.8, retention=0.9, train="lora", rate=RATE):
    """A run that goes to its scores on a straight line; the base's crispness is 0.8."""
    at = lambda share: {
        "concept IoU": 0.1 + share * (iou - 0.1),
        "concept crispness": 0.8 + share * (crispness - 0.8),
        "named shape": 0.9 + share * (retention - 0.9),
        "retention": 0.9 + share * (retention - 0.9),
        "ordinary crispness": 0.9,
    }
    curve = {str(n): at(n / paper_arms.STEPS) for n in (0, *paper_arms.LOOKS)}
    return {
        "arm": arm, "train": train, "rate": rate, "kind": "alone", "concept": concept, "seed": seed,
        "curve": curve, "teacher": {"concept IoU": 0.9, "concept crispness": 0.8},
        "cpu_seconds": 10.0,
    }  # fmt: skip


def runs(arm, iou, spread=0.01, **scores):
    """Four concepts, two seeds; concepts differ by `spread` more or less."""
    return [
        record(arm, c, s, iou + spread * (c - 1.5), **scores) for c in range(4) for s in range(2)
    ]


def test_verdicts_follow_from_the_intervals_of_paired_differences():
    many = [
        *runs("dopsd", 0.8),
        *runs("sft", 0.6, crispness=0.6),
        *runs("pso", 0.79, spread=-0.01),
        *runs("dreambooth", 0.9, retention=0.5),
    ]
    records = paper_records.Records(many)
    table = paper_claims.table(records)
    verdict = lambda start: next(row for row in table if row.startswith(f"| {start}")).split("|")[
        -2
    ]
    assert "**reproduced**" in verdict("D-OPSD learns the concept better than SFT |")
    assert "**reproduced**" in verdict("D-OPSD keeps the quality that SFT loses |")
    assert "open" in verdict("PSO comes closer")
    assert "not run" in verdict("D-OPSD learns the concept better than SFT on teacher samples")
    assert "not testable" in verdict("The method works on FLUX.2-klein")
    swapped = [{**r, "arm": {"dopsd": "sft", "sft": "dopsd"}.get(r["arm"], r["arm"])} for r in many]
    table = paper_claims.table(paper_records.Records(swapped))
    assert "**contradicted**" in verdict("D-OPSD learns the concept better than SFT |")


def test_differences_are_paired_by_concept():
    """Concepts differ widely, the arms by the same in each: the difference is sure."""
    records = paper_records.Records([*runs("dopsd", 0.7, 0.1), *runs("sft", 0.65, 0.1)])
    one, two = (records.arm(name, "lora", RATE) for name in ("dopsd", "sft"))
    found = one.less(two, "concept IoU")
    assert found.value == pytest.approx(0.05) and found.half == pytest.approx(0, abs=1e-9)
    assert one.final("concept IoU").half > 0.1


def test_only_runs_that_both_have_are_compared():
    few = [r for r in runs("sft", 0.65) if r["seed"] == 0]
    records = paper_records.Records([*runs("dopsd", 0.7), *few])
    one, two = (records.arm(name, "lora", RATE) for name in ("dopsd", "sft"))
    assert one.less(two, "concept IoU").value == pytest.approx(0.05)
    assert (one.count, two.count) == (8, 4)


def test_equal_scores_are_read_off_the_lines_between_steps():
    records = paper_records.Records(runs("sft", 0.7, 0, crispness=0.6))
    arm = records.arm("sft", "lora", RATE)
    assert arm.when(0.4, "concept crispness") == pytest.approx(np.mean([1, 0.75]))
    assert arm.when(0.9, "concept crispness") is None


def test_a_run_has_a_key_of_its_own():
    keys = [arm.key(*run) for arm in paper_arms.arms() for run in arm.runs]
    assert len(set(keys)) == len(keys)


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b', encoding="utf-8")
    assert paper_records.read(path) == [{"key": "a"}]
    assert paper_records.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("records", [[], runs("dopsd", 0.8)])
def test_the_page_says_what_was_not_run(records):
    page, records = paper_page, paper_records.Records(records)
    parts = [
        *page._methods(records, "lora"), *page._ablations(records), *page._sequences(records),
        *page._styles(records), *page._equal(records, "lora"), *page._targets(records),
        *paper_claims.goals(records), *paper_claims.beside(records),
    ]  # fmt: skip
    assert any("not run" in part for part in parts)


@pytest.mark.parametrize("kind", paper_arms.STYLE_CAPTIONS)
@pytest.mark.parametrize("style", range(paper_arms.STYLE_COUNT))
def test_captions_of_a_style_never_name_it(style, kind):
    rng, shown = np.random.default_rng(0), paper_styles.scenes(style, 20, 0)
    said = [paper_styles.caption(scene, kind, rng) for scene in shown]
    named = {"flat", "outlined", "outline", "shaded", "softly", "plain", "gradient", "lined"}
    assert not named & {word for text in said for word in text.split()}
    places = {"left", "right", "top", "bottom", "middle", "centre"}
    told = [bool(places & set(text.split())) for text in said]
    assert all(told) if kind == "whole" else not any(told)
    asked = paper_styles.scenes(style, 20, 1)
    assert {(s.finish, s.ground_texture) for s in (*shown, *asked)} == {paper_styles.STYLES[style]}
    assert shown != asked


def test_a_style_is_judged_by_its_own_scores():
    def style(arm, number, fid):
        score = {"FID": fid + number, "crispness": 0.8, "retention": 0.9}
        return {
            "arm": arm, "train": "full", "rate": paper_arms.STYLE_RATE, "kind": "whole",
            "concept": number, "seed": 0, "cpu_seconds": 1.0, "teacher": score,
            "curve": {"0": score, str(paper_arms.STYLE_STEPS): score},
        }  # fmt: skip

    many = [style(arm, n, fid) for arm, fid in (("dopsd", 4.0), ("sft", 8.0)) for n in range(4)]
    records = paper_records.Records(many)
    row = next(r for r in paper_claims.table(records) if r.startswith("| Style: D-OPSD comes cl"))
    assert "+4.000" in row and "**reproduced**" in row
    rows = paper_page._styles(records)
    assert any(r.startswith("| whole | sft | 4 | 9.500") for r in rows)
    assert records.arm("sft", "full", paper_arms.STYLE_RATE) is None


def test_crispness_of_the_teachers_estimates_is_relative_to_the_base():
    targets = {"on-policy": [{"sigma": 1.0, "concept IoU": 0.5, "concept crispness": 0.4}]}
    told = {"arm": "dopsd", "train": "lora", "rate": 0.0, "kind": "states", "targets": targets}
    many = [*runs("dopsd", 0.7), *({**told, "concept": c, "seed": 0} for c in range(4))]
    ((name, sigma, concept, crisp),) = paper_records.Records(many).targets()
    assert (name, sigma, concept.value) == ("on-policy", 1.0, pytest.approx(0.5))
    assert crisp.value == pytest.approx(0.5)


@pytest.mark.slow
def test_a_run_goes_through_the_programs_of_today(tmp_path, monkeypatch):
    """All but the numbers: its step is traced and not compiled."""
    seen = []

    def only_traced(bench, config, pipe):
        step = make(bench, config, pipe)

        def trace(rate, seed, now, *rest):
            seen.append(jax.eval_shape(step, rate, seed, now, *rest)[1])
            return now, {"loss": 0.0}

        return trace

    make = paper_run.Bench._step
    monkeypatch.setattr(paper_run.Bench, "_step", only_traced)
    bench, arm = paper_run.Bench(tmp_path), paper_arms.Arm("dopsd", "lora", RATE)
    anchors = Path(__file__).with_name("data") / "anchors.txt"
    lesson = bench.lesson(0)
    for more in ({}, {"anchor.share": 0.25, "anchor.prompts": str(anchors)}):
        config = bench.config(lesson.path, arm.fields(lesson.word) | {"steps": 1} | more)
        bench.train(config, 0, bench.start(config, 0), {})
    assert [("anchor_gap" in metrics) for metrics in seen] == [False, True]
