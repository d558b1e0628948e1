"""The shipped miniature can do what the experiments on it rest on. Its gates are the issue's."""

import json
from pathlib import Path

import numpy as np
import pytest

import dopsd_jax
from dopsd_jax.common.errors import UserError
from dopsd_jax.miniature import captions, concepts, gates, world

SHIPPED = Path(__file__).parents[1] / "examples" / "miniature"
MIB = 1 << 20


@pytest.fixture(scope="module")
def trial():
    return gates.Trial()


@pytest.fixture(scope="module")
def found(trial):
    return gates.of_folder(dopsd_jax.load_pipeline(SHIPPED / "model"), trial)


@pytest.mark.parametrize("gate", gates.GATES, ids=lambda gate: gate.name)
def test_the_shipped_model_passes(gate, found):
    many = gates.many_step_crispness(SHIPPED / gates.SCORES)
    values = {g.name: value for g, value, _ in gates.verdicts(found, many)}
    assert gate.holds(values[gate.name]), f"{gate.meaning}: {values[gate.name]:.3f}"


def test_the_card_tells_the_scores_that_are_measured(found):
    stored = json.loads((SHIPPED / gates.SCORES).read_text(encoding="utf-8"))[gates.SHIPPED]
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for name, value in stored.items():
        # One picture of 96, or rounding that differs between processors.
        assert found[name] == pytest.approx(value, abs=0.015), name
        assert f"{value:.3f}" in card, name


def test_distillation_made_it_sharp_in_few_steps():
    """Undistilled, as many steps miss the gate that the shipped model passes."""
    stored = json.loads((SHIPPED / gates.SCORES).read_text(encoding="utf-8"))
    crispness = {name: scores["crispness"] for name, scores in stored.items()}
    least = next(gate for gate in gates.GATES if gate.name == "crispness")
    many = crispness[gates.UNDISTILLED_MANY]
    assert least.holds(crispness[gates.SHIPPED] / many)
    assert not least.holds(crispness[gates.UNDISTILLED_FEW] / many)


def test_the_trial_asks_for_what_was_never_trained(trial):
    """New words only, concepts unlike one another, every concept with its own picture."""
    assert len(trial.concepts) >= 20
    known = set(captions.nonce_words())
    assert not any(known & set(case.prompt.split()) for case in trial.concepts)
    assert len({case.target.tobytes() for case in trial.concepts}) == len(trial.concepts)


def test_what_is_shipped_is_small_and_holds_no_pickle():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * MIB
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}


def test_the_data_set_teaches_a_word_that_the_training_never_said():
    word, concept = concepts.read_concept(SHIPPED / "dax" / concepts.FILE)
    assert word in captions.NEW_WORDS
    assert world.distance(concept.body, concept.core) > world.CONTRAST
    assert len(list((SHIPPED / "dax").glob("*.png"))) == 6
    # The prompt that everyone types first is drawn well only if it is learned too.
    assert "a dax" in [path.read_text().strip() for path in (SHIPPED / "dax").glob("*.txt")]


def test_scores_that_are_missing_are_named(tmp_path):
    path = tmp_path / gates.SCORES
    with pytest.raises(UserError, match=r"scores\.json: no such file"):
        gates.many_step_crispness(path)
    path.write_text('{"undistilled_many": {}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"undistilled_many\.crispness"):
        gates.many_step_crispness(path)


def test_a_gate_holds_on_its_own_side_alone():
    least, most = gates.Gate("a", 0.5, True, ""), gates.Gate("b", 0.5, False, "")
    assert least.holds(0.5) and not least.holds(0.49)
    assert most.holds(0.5) and not most.holds(0.51)
    assert not any(g.holds(np.nan) for g in (least, most))
