"""The page of the experiment says what the records say: verdicts, pairs, and what was not run."""

from pathlib import Path

import jax
import numpy as np
import paper_arms
import paper_claims
import paper_exam
import paper_naming
import paper_page
import paper_records
import paper_run
import pytest
from paper_arms import Arm
from paper_records import CRISP, IDENTITY, MEASURES, RETENTION
from PIL import Image

from dopsd_jax.conditioning.anchors import new_words
from dopsd_jax.conditioning.encoding import STUDENT, TEACHER
from dopsd_jax.miniature import families, optimizer
from dopsd_jax.miniature.captions import NEW_WORDS
from dopsd_jax.miniature.world_scorers import other_words

RATE = paper_arms.RATES["lora"][0]


def record(name, concept, seed, identity, crispness=1.0, retention=0.9, **more):
    """A run that goes to its scores on a straight line."""
    before, after = dict.fromkeys(MEASURES, 0.9), dict.fromkeys(MEASURES, 0.9)
    before |= {IDENTITY: 0.1, CRISP: 1.0}
    after |= {IDENTITY: identity, CRISP: crispness, RETENTION: retention}
    arm = Arm(name, **{"train": "lora", "rate": RATE, **more})
    at = lambda share: {k: before[k] + share * (after[k] - before[k]) for k in before}
    curve = {str(n): at(n / arm.steps) for n in (0, *arm.looks)}
    return {
        **vars(arm), "concept": concept, "seed": seed, "curve": curve, "cpu_seconds": 10.0,
        "teacher": {IDENTITY: 0.9, CRISP: 1.1},
    }  # fmt: skip


def runs(name, identity, spread=0.01, **scores):
    """Four concepts, two seeds; concepts differ by `spread` more or less."""
    each = [(c, s, identity + spread * (c - 1.5)) for c in range(4) for s in range(2)]
    return [record(name, c, s, found, **scores) for c, s, found in each]


def verdict(many, start):
    table = paper_claims.table(paper_records.Records(many))
    return next(row for row in table if row.startswith(f"| {start}")).split("|")[-2]


def test_verdicts_follow_from_the_intervals_of_paired_differences():
    many = [
        *runs("dopsd", 0.8),
        *runs("sft", 0.6, crispness=0.6),
        *runs("pso", 0.79, spread=-0.01),
        *runs("dreambooth", 0.9, retention=0.5),
    ]
    assert "**reproduced**" in verdict(many, "D-OPSD learns the concept better than SFT |")
    assert "**reproduced**" in verdict(many, "D-OPSD keeps the quality that SFT loses |")
    assert "open" in verdict(many, "PSO comes closer")
    assert "not run" in verdict(many, "D-OPSD learns the concept better than SFT on teacher")
    assert "not testable" in verdict(many, "Four times the work")
    assert "one run" in verdict(many, "The method works on FLUX.2-klein")
    swapped = [{**r, "name": {"dopsd": "sft", "sft": "dopsd"}.get(r["name"], r["name"])}
               for r in many]  # fmt: skip
    assert "**contradicted**" in verdict(swapped, "D-OPSD learns the concept better than SFT |")


def test_runs_of_other_captions_and_students_do_not_speak_for_a_claim():
    other = runs("sft", 0.2, captions="whole") + runs("sft", 0.2, student="endpoint")
    many = [*runs("dopsd", 0.6), *runs("sft", 0.8), *other]
    assert "**contradicted**" in verdict(many, "D-OPSD learns the concept better than SFT |")


def test_differences_are_paired_by_concept():
    """Concepts differ widely, the arms by the same in each: the difference is sure."""
    records = paper_records.Records([*runs("dopsd", 0.7, 0.1), *runs("sft", 0.65, 0.1)])
    one, two = records.arm("dopsd"), records.arm("sft")
    found = one.less(two, IDENTITY)
    assert found.value == pytest.approx(0.05) and found.half == pytest.approx(0, abs=1e-9)
    assert one.final(IDENTITY).half > 0.1


def test_only_runs_that_both_have_are_compared():
    few = [r for r in runs("sft", 0.65) if r["seed"] == 0]
    records = paper_records.Records([*runs("dopsd", 0.7), *few])
    one, two = records.arm("dopsd"), records.arm("sft")
    assert one.less(two, IDENTITY).value == pytest.approx(0.05)
    assert (one.count, two.count) == (8, 4)


def test_leak_is_asked_on_words_that_no_anchor_holds():
    held = set(new_words(256, paper_run.load_config({}).seed))
    for number in paper_arms.SEQUENCE:
        word = NEW_WORDS[number]
        assert not held & {*other_words(word, paper_exam.PROMPTS["others"]), word}


def test_equal_scores_are_read_off_the_lines_between_steps():
    arm = paper_records.Records(runs("sft", 0.7, 0, crispness=0.6)).arm("sft")
    first, last = (paper_arms.LOOKS[i] / paper_arms.STEPS for i in (0, -1))
    level = 0.1 + 0.6 * (first + last) / 2  # halfway between the first look and the last
    assert arm.when(level, CRISP) == pytest.approx(1 - 0.4 * (first + last) / 2)
    assert arm.when(0.11, CRISP) == pytest.approx(1 - 0.4 * first)  # passed before the first
    assert arm.when(0.9, CRISP) is None


def test_an_arm_reaches_the_mean_that_it_ends_with():
    """However the mean of these scores is rounded."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        many = runs("sft", 0.7)
        for one in many:
            one["curve"][str(paper_arms.STEPS)][IDENTITY] = 0.7 + 0.2 * rng.random()
        arm = paper_records.Records(many).arm("sft")
        assert arm.when(arm.final(IDENTITY).value, CRISP) == pytest.approx(arm.final(CRISP).value)


def test_goals_are_met_or_missed_by_what_was_found():
    goal = lambda many: paper_claims.goals(paper_records.Records(many))[0]
    own = runs("dopsd", 0.7)
    assert ": met (+0.300" in goal(own + runs("sft", 0.7, crispness=0.7))
    assert "**missed** (+0.200" in goal(own + runs("sft", 0.7, crispness=0.8))


def test_a_run_has_a_key_of_its_own():
    keys = [arm.key(*run) for arm in paper_arms.arms() for run in arm.runs]
    assert len(set(keys)) == len(keys)


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b', encoding="utf-8")
    assert paper_records.read(path) == [{"key": "a"}]
    assert paper_records.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("many", [[], runs("dopsd", 0.8)])
def test_the_page_says_what_was_not_run(many):
    page, records = paper_page, paper_records.Records(many)
    parts = [
        page.methods(records, "lora", paper_arms.METHODS), page.worlds(records),
        page.students(records), page.ablations(records), page.anchors(records),
        page.long(records), page.sequences(records), page.targets(records), page.words(records),
    ]  # fmt: skip
    for part in parts:
        assert any("not run" in line for line in part)


def test_words_that_change_little_are_told():
    found = {"open": {"two new words": {"mean": 1.5, "least": 0.25}}}
    records = paper_records.Records([{"student": "shipped", "kind": "words", "words": found}])
    assert paper_page.words(records)[-1] == "| shipped | open | two new words | 1.50 | 0.25 |"


def test_what_a_sequence_keeps_is_relative_to_what_each_run_had_learned():
    scores = lambda identity: {**dict.fromkeys(MEASURES, 0.5), "identity": identity}
    rounds = [[scores(0.8)], [scores(0.6), scores(0.9)]]
    run = {"name": "dopsd", "kind": "sequence", "rate": 0.001, "rounds": rounds}
    run |= {"student": "shipped", "base": [scores(0.1)]}
    (line,) = [row for row in paper_page.sequences(paper_records.Records([run]))
               if row.startswith("| shipped | dopsd")]  # fmt: skip
    assert [cell.strip() for cell in line.split("|")[5:8]] == ["0.850", "0.750", "0.750"]


def test_anchors_of_a_sequence_hold_the_captions_of_what_was_learned(tmp_path):
    bench = paper_run.Bench(tmp_path)
    files = bench._prompts([bench.lesson(0), bench.lesson(1)]).split(",")
    told = Path(files[1]).read_text(encoding="utf-8").splitlines()
    assert Path(files[0]) == paper_run.ORDINARY
    assert told == [*bench.lesson(0).captions(), *bench.lesson(1).captions()]
    assert len(told) == 2 * paper_arms.PICTURES


def test_open_captions_are_the_word_alone(tmp_path):
    bench = paper_run.Bench(tmp_path)
    lesson = bench.lesson(0)
    folder = lesson.path(paper_arms.OPEN)
    texts = {file.read_text(encoding="utf-8") for file in folder.glob("*.txt")}
    assert texts == {f"a {lesson.word}\n"}
    assert len({file.read_bytes() for file in folder.glob("*.png")}) == paper_arms.PICTURES
    assert all(len(text.split()) > 5 for text in lesson.captions())


@pytest.mark.slow
def test_the_exam_scores_a_model_and_its_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_exam, "PROMPTS", dict.fromkeys(paper_exam.PROMPTS, 2))
    monkeypatch.setattr(paper_exam, "TOGETHER", 4)
    bench = paper_run.Bench(tmp_path)
    lesson = bench.lesson(0)
    config = bench.arm_config(Arm("dopsd", "lora", RATE), lesson)
    exam, base, teacher = bench.exam(lesson, config)
    assert set(MEASURES) <= base.keys() and {IDENTITY, CRISP, "copied"} <= teacher.keys()
    assert base["composition kept"] == pytest.approx(1) and base["place kept"] == 1
    assert base["retention"] == 1 and teacher[IDENTITY] > base[IDENTITY] + 0.2
    student = exam(bench.start(config, 3), STUDENT)  # adapters that have learned nothing yet
    assert student == pytest.approx(base)
    assert len(exam.last) == 5 and exam(bench.start(config, 3), TEACHER) == pytest.approx(teacher)


@pytest.mark.slow
def test_a_run_goes_through_the_programs_of_today(tmp_path, monkeypatch):
    """All but the numbers: its step is traced and not compiled."""
    seen = []

    def only_traced(bench, config, pipe):
        step = make(bench, config, pipe)

        def trace(rate, seed, now, *rest):
            seen.append((jax.eval_shape(step, rate, seed, now, *rest)[1], now.start is not None))
            return now, {"loss": 0.0}

        return trace

    make = paper_run.Bench._step
    monkeypatch.setattr(paper_run.Bench, "_step", only_traced)
    bench, lesson = paper_run.Bench(tmp_path), paper_run.Lesson(0, tmp_path)
    for name, more in (("dopsd", {}), ("sft + anchor", {"lora.init_from": "the last result"})):
        config = bench.arm_config(Arm(name, "lora", RATE), lesson, steps=1, **more)
        bench.train(config, 0, bench.start(config, 0), {})
    assert [("anchor_gap" in metrics) for metrics, _ in seen] == [False, True]
    assert [start for _, start in seen] == [False, True]  # what anchors hold a later run to


def test_the_figure_of_pictures_is_not_drawn_anew_from_some_of_them(tmp_path, capsys):
    import paper_figures

    kept, strips = tmp_path / "pictures.png", tmp_path / "strips"
    strips.mkdir()
    strip = np.zeros((64, 6 * 64, 3), np.uint8)
    names = [
        a if isinstance(a, str) else a.key(0, 0).replace("|", " ")
        for a in paper_figures.STRIPS.values()
    ]
    assert not paper_figures._pictures(strips, kept)
    for name in names[:-1]:
        Image.fromarray(strip).save(strips / f"{name}.png")
    kept.write_bytes(b"drawn before")
    assert paper_figures._pictures(strips, kept) and kept.read_bytes() == b"drawn before"
    assert "left as it is" in capsys.readouterr().out
    Image.fromarray(strip).save(strips / f"{names[-1]}.png")
    assert paper_figures._pictures(strips, kept)
    with Image.open(kept) as drawn:
        assert drawn.height > 9 * 64


def test_only_the_text_encoder_learns_words():
    family = families.family("zimage")
    _, shipped = optimizer.flat(family.start(0))
    stage = paper_naming.stage(family, shipped, 100)
    gradient = jax.tree.map(np.ones_like, stage.start)
    updates, _ = stage.tx.update(gradient, stage.tx.init(stage.start), stage.start)
    moved = {name.partition(".")[0] for name, update in updates.items() if np.any(update)}
    assert moved == {"text", "head"}
    assert stage.shown(stage.start).keys() == shipped.keys()  # the head is not kept


def test_captions_of_both_forms_take_turns(tmp_path):
    lesson = paper_run.Lesson(0, tmp_path)
    read = lambda told: [p.read_text() for p in sorted(lesson.path(told).glob("*.txt"))]
    both, alone, whole = map(read, (paper_arms.BOTH, paper_arms.OPEN, paper_arms.WHOLE))
    assert both == [(alone, whole)[i % 2][i] for i in range(paper_arms.PICTURES)]
    assert lesson.path(paper_arms.BOTH) == tmp_path / "concept_0_both"
