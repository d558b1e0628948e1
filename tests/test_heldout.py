"""Knowing when to stop: pictures that are not trained on, the ranking, the end of a run."""

import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import RANDOM_CONFIG, problems_of, relative_error, run_program
from etils import epath
from PIL import Image
from test_dopsd import GRID, SHAPE, toy_denoiser, world

from dopsd_jax import dopsd
from dopsd_jax.conditioning.features import Features
from dopsd_jax.config import schema
from dopsd_jax.config.fields import defaults
from dopsd_jax.data import holdout
from dopsd_jax.data.buckets import Bucket, Shape
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.images import ImageInfo
from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.data.picture_index import Infos
from dopsd_jax.data.table import Table
from dopsd_jax.evaluation import checkpoint_scores
from dopsd_jax.methods.flow_matching import start_noise
from dopsd_jax.parallel import multihost, sharding
from dopsd_jax.run import build, heldout
from dopsd_jax.training import train_step
from dopsd_jax.training.ranking import ANCHOR_GAP, BEST, FILE, GAP, Order, Ranking, copy_best
from dopsd_jax.training.state import TrainState


def dataset(digests):
    """Rows by digest; every second one has another shape."""
    infos = Infos()
    for digest in digests:
        infos.append(ImageInfo(64, 64, digest.encode().hex().ljust(64, "0"), ()))
    shapes = [Shape(Bucket(64, 64 + 16 * (i % 2))) for i in range(len(digests))]
    by_shape = {}
    for row, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(row)
    return SimpleNamespace(
        infos=infos,
        rows_by_shape=lambda: {shape: np.array(ids) for shape, ids in by_shape.items()},
    )


def numbers(rows_by_shape):
    return {row for ids in rows_by_shape.values() for row in ids.tolist()}


def test_the_split_is_of_pictures_and_does_not_depend_on_the_order_of_rows():
    digests = list("abcdeabc")
    trained, held = holdout.split(dataset(digests), 2, seed=1)
    assert numbers(trained) | numbers(held) == set(range(8))
    assert not numbers(trained) & numbers(held)
    chosen = {digests[row] for row in numbers(held)}
    assert len(chosen) == 2 and not chosen & {digests[row] for row in numbers(trained)}
    _, other = holdout.split(dataset(digests[::-1]), 2, seed=1)
    assert {digests[::-1][row] for row in numbers(other)} == chosen
    choices = {frozenset(numbers(holdout.split(dataset(digests), 2, s)[1])) for s in range(8)}
    assert len(choices) > 1
    assert holdout.split(dataset(digests), 0, 1)[1] == {}


HELD = {Shape(Bucket(64, 64)): np.array([1, 3, 4, 5, 7]), Shape(Bucket(64, 80)): np.array([6])}


def held_batches(size):
    """Batches of `HELD`; each row has a caption that is not trained, and two that are."""
    table = Table(("long", "short"))
    for n in range(8):
        table.append(f"{n}.png", [("long", "none"), ("short", "first"), ("short", "second")])
    return holdout.batches(Dataset(table, Infos(), (), ("short",), ()), HELD, size)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_held_row_counts_once_with_its_first_caption(size):
    """However the batches are filled up."""
    found, counted = held_batches(size), Counter()
    for n, (index, count) in enumerate(zip(found, holdout.counts(found), strict=True)):
        assert index.n == n and len(index.rows) == size
        assert index.captions.tolist() == [1] * size and index.prompt_keys == ("short",) * size
        assert set(index.rows) <= set(HELD[index.shape]) and np.mean(index.weights) == 1
        for row, weight in zip(index.rows.tolist(), index.weights, strict=True):
            counted[row] += count * weight / size
    assert counted == pytest.approx(dict.fromkeys([1, 3, 4, 5, 6, 7], 1.0))


@pytest.mark.parametrize("masks", [(), ("", "x")])
def test_a_row_counts_as_its_batch_says(masks):
    """In each of its places, and with a mask too."""
    own = SimpleNamespace(
        dataset=SimpleNamespace(masks=masks, buckets=[Bucket(64, 48)] * 2),
        needs=SimpleNamespace(target=False, prior=False),
        contexts=lambda captions, given: None,
        pipe=SimpleNamespace(latent_shape=lambda height, width: (height // 8, width // 8, 4)),
        store=SimpleNamespace(mask=lambda row: np.array([[255] * 4 + [0] * 4] * 6, np.uint8)),
        floor=0.0,
    )
    own.regions = functools.partial(Features.regions, own)
    index = BatchIndex(0, None, np.array([0, 1]), ("-",) * 2, np.array([0, 0]))
    plain = own.regions([0, 1]) if masks else np.ones((2, 6, 8, 1))
    found = Features.batch(own, replace(index, weights=(0.5, 1.5)), 2).region
    np.testing.assert_array_equal(found[:, 0], plain * np.reshape([0.5, 1.5], (2, 1, 1, 1)))
    assert (Features.batch(own, index, 2).region is None) == (not masks)
    part = replace(index, weights=(0.5, 1.5)).part(np.array([1]), 1)
    assert part.weights == (1.5,)


def test_the_gap_is_the_root_of_the_mean_over_all_held_rows():
    """A row's square is its number here."""
    config, seen = defaults(), []
    config.batch_size = 2

    def gap(state, base, batch, key, latent):
        rows, weights = (np.asarray(x[0]) for x in batch)
        seen.append((state, base, jax.random.key_data(key).tolist(), latent))
        return np.mean(rows * weights)

    own = SimpleNamespace(
        config=config,
        batches=held_batches(2),
        mesh=sharding.make_mesh({"data": 1}, jax.devices()[:1]),
        pipe=SimpleNamespace(
            split=(0, 1, "base"), latent_shape=lambda height, width: (height // 8, width // 8, 4)
        ),
        features=SimpleNamespace(
            batch=lambda index, n: tuple(
                np.array(x, float).reshape(n, -1) for x in (index.rows, index.weights)
            )
        ),
        plan=SimpleNamespace(gap=gap),
    )
    found = [heldout.Heldout._gap(own, state) for state in ("one", "other")]
    assert found == pytest.approx([np.mean([1, 3, 4, 5, 7, 6]) ** 0.5] * 2)
    states, bases, keys, latents = zip(*seen, strict=True)
    assert states == ("one",) * 4 + ("other",) * 4 and set(bases) == {"base"}
    assert keys[:4] == keys[4:] and len({*map(tuple, keys)}) == 4  # for every checkpoint the same
    assert latents[:4] == ((2, 8, 8, 4),) * 3 + ((2, 10, 8, 4),)


@pytest.mark.parametrize("weights", ["live", "ema"])
def test_the_gap_of_a_batch_is_that_of_the_method(weights):
    """With the noise of its key; nothing is learned."""
    base, student, other, contexts, _ = world()

    def method(student, teacher, base, contexts, noise, key):
        nodes = dopsd.make_nodes(GRID, "x0", "all", key)
        own = student, teacher, base, contexts, noise, nodes
        return dopsd.loss_and_gradient(toy_denoiser(), *own)

    kept, key = None if weights == "live" else other, jax.random.key(4)
    gap = train_step.make_gap(method, start_noise)
    batch = jax.tree.map(lambda x: x[None], contexts)
    found = gap(TrainState(5, student, kept, None), base, batch, key, latent=SHAPE)
    noise = start_noise(jax.random.split(key)[0], SHAPE)
    teacher = student if kept is None else kept
    losses, _ = jax.jit(method)(student, teacher, base, contexts, noise, key)
    assert relative_error(found, losses.mse.mean()) < 1e-6


def test_processes_have_all_compiled_the_gap_before_one_begins(monkeypatch):
    """Else the first waits in a collective operation for those that compile, and gives up."""
    base, student, other, contexts, _ = world()
    met = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "gather", lambda value: met.append(value) or [value] * 2)

    def method(student, teacher, base, contexts, noise, key):
        assert not met, "they met before they compiled"
        nodes = dopsd.make_nodes(GRID, "x0", "all", key)
        own = student, teacher, base, contexts, noise, nodes
        return dopsd.loss_and_gradient(toy_denoiser(), *own)

    gap, state = train_step.make_gap(method, start_noise), TrainState(5, student, other, None)
    batch = jax.tree.map(lambda x: x[None], contexts)
    for key in jax.random.split(jax.random.key(4)):
        assert gap(state, base, batch, key, latent=SHAPE) > 0
        assert len(met) == 1


def test_the_gap_is_of_all_nodes_where_steps_draw_some(monkeypatch):
    """Every checkpoint is judged with the same random numbers: at the same few nodes, then."""
    seen, config = [], defaults()
    function = lambda config, net, schedule: seen.append(config.loss_steps)
    monkeypatch.setattr(build.registry, "loss_function", function)
    for asked in ("all", "random:1", (0, 2)):
        config.loss_steps = asked
        build.make_gap(config, None, None)
        assert config.loss_steps == asked
    assert seen == ["all", "all", (0, 2)]


@pytest.mark.parametrize(("export", "scored"), [("student", 1.0), ("teacher", 2.0)])
def test_what_is_exported_is_scored(export, scored):
    seen, judged, config = {}, [], defaults()
    config.export_weights = export
    own = SimpleNamespace(
        config=config,
        anchor_gaps=[],
        judge=lambda weights: judged.append(weights) or {},
        ranking=SimpleNamespace(add=lambda step, found, write: seen.update(found), best=0),
        say=lambda line: None,
        _gap=lambda state: state.student,
    )
    heldout.Heldout.score(own, 5, TrainState(5, 1.0, 2.0, None), [])
    assert seen == {GAP: scored} and judged == [scored]
    for gap in (1.0, 3.0, float("nan")):  # of steps; their mean, since the last checkpoint
        heldout.Heldout.look(own, {"anchor_gap": gap})
    heldout.Heldout.score(own, 6, TrainState(6, 1.0, 2.0, None), [])
    assert seen == {GAP: scored, ANCHOR_GAP: 2.0} and own.anchor_gaps == []


def test_a_picture_must_be_left_to_train_on():
    (problem,) = problems_of(holdout.split, dataset("aab"), 2, 0)
    assert "2 pictures, and the data set has 2; name fewer" in problem


def ranked(folder, gaps, patience=2, tolerance=0.1):
    ranking = Ranking(folder, patience, tolerance, 0)
    for step, gap in enumerate(gaps, 1):
        ranking.add(step, {GAP: gap}, write=True)
    return ranking


@pytest.mark.parametrize(
    ("gaps", "over", "best"),
    [
        ([1, 0.8, 0.6], False, 3),
        ([1, 0.8, 0.79], False, 3),  # lower, but by less than a tenth
        ([1, 0.8, 0.79, 0.78], True, 4),
        ([1, 0.8, 0.9, 0.7], False, 4),
        ([1, 2, 3], True, 1),
        ([float("nan"), float("nan")], True, None),
        ([float("nan"), 1], False, 2),
    ],
)
def test_a_run_is_over_after_so_many_checkpoints_that_are_no_better(tmp_path, gaps, over, best):
    ranking = ranked(tmp_path, gaps)
    assert ranking.over() == over and ranking.best == best
    assert not ranked(tmp_path, gaps, patience=0).over()


def test_a_score_of_which_more_is_better_ranks_too(tmp_path):
    """Also one that is below zero, and one that a checkpoint lacks."""
    order = Order("CLIP-S", higher=True)
    ranking = Ranking(tmp_path, 2, 0.1, 0, order)
    for step, (gap, clip) in enumerate([(1, -0.2), (2, 0.3), (0.5, 0.31), (0.1, None)], 1):
        ranking.add(step, {GAP: gap} | ({} if clip is None else {"CLIP-S": clip}), write=True)
    assert ranking.best == 3
    assert ranking.over()  # 0.31 is more than 0.3, but not by a tenth
    assert "step 3: CLIP-S 0.31, held-out gap 0.5  <- best" in ranking.lines()[0]
    assert "step 4: CLIP-S not finite, held-out gap 0.1" in ranking.lines()[-1]
    content = json.loads((tmp_path / FILE).read_text())
    assert content["ranked_by"] == {"score": "CLIP-S", "better": "higher"}
    assert Ranking(tmp_path, 2, 0.1, 4).best == 4


def test_a_run_that_goes_on_forgets_later_scores(tmp_path):
    ranked(tmp_path, [3, 2, 1])
    again = Ranking(tmp_path, 0, 0, 2)
    assert again.best == 2 and again.knows(2) and not again.knows(3)
    (tmp_path / FILE).write_text('{"checkpoints": [{"step": "1"}]}')
    (problem,) = problems_of(Ranking, tmp_path, 0, 0, 2)
    assert "is damaged; remove it" in problem


def test_checkpoints_that_were_not_asked_for_a_score_do_not_end_the_run(tmp_path):
    """It ranks only since the run goes on; two of its own that are no better do."""
    ranked(tmp_path, [3, 3, 3])
    clip = Ranking(tmp_path, 2, 0.1, 3, Order("CLIP-S", higher=True))
    assert not clip.over()
    for step, (value, over) in enumerate([(0.3, False), (0.2, False), (0.3, True)], 4):
        clip.add(step, {GAP: 3, "CLIP-S": value}, write=True)
        assert clip.over() == over
    assert Ranking(tmp_path, 2, 0.1, 6, Order("CLIP-S", higher=True)).over()


def test_checkpoints_of_stopped_runs_do_not_end_a_run(tmp_path):
    """Three preemptions in a row are no plateau."""
    own = Ranking(tmp_path, 3, 0.1, 0, every=100)
    for step in (100, 105, 110, 115, 200, 300):
        own.add(step, {GAP: 1.0}, write=True)
        assert not own.over()
    own.add(400, {GAP: 1.0}, write=True)
    assert own.over()


def test_the_best_file_is_that_of_the_best_checkpoint_after_a_kill(tmp_path):
    """Killed between the two writes, or after the best one was forgotten."""
    files = [epath.Path(tmp_path) / f"step_{n}.safetensors" for n in (1, 2)]
    for n, file in enumerate(files):
        file.write_bytes(bytes([n]))
    for file in (files[0], files[1], files[1], files[0]):
        best = copy_best(file)
        assert best.name == BEST and best.read_bytes() == file.read_bytes()


def test_gaps_on_other_pictures_are_forgotten(tmp_path):
    trained, held = holdout.split(dataset("abcde"), 2, seed=1)
    own, other = (holdout.digest(dataset("abcde"), rows) for rows in (held, trained))
    assert own != other
    Ranking(tmp_path, 0, 0, 0, pictures=own).add(1, {GAP: 1}, write=True)
    assert Ranking(tmp_path, 0, 0, 1, pictures=own).best == 1
    moved = Ranking(tmp_path, 0, 0, 1, pictures=other)
    assert moved.best is None
    content = json.loads((tmp_path / FILE).read_text())
    del content["pictures"]  # as it was written before
    (tmp_path / FILE).write_text(json.dumps(content))
    assert Ranking(tmp_path, 0, 0, 1, pictures=other).best == 1


def test_the_best_checkpoint_is_copied_and_a_run_ends_at_the_plateau(tmp_path):
    scorers = "--config.stop.scorers=contrast,crispness"
    held = (*RANDOM_CONFIG, "--config.data.holdout=1", scorers, f"--workdir={tmp_path}")
    stopping = ("--config.stop.patience=1", "--config.stop.tolerance=1")
    first = run_program("train", *held, *stopping, "--config.checkpoint_every=1")
    assert first.returncode == 0, first.stderr
    assert "ended at step 2: the gap on held-out pictures has not fallen" in first.stdout
    found = json.loads((tmp_path / FILE).read_text())
    assert [entry["step"] for entry in found["checkpoints"]] == [1, 2]
    again = run_program("train", *held, *stopping, "--config.checkpoint_every=1")
    assert again.returncode == 0 and "ended at step 2" in again.stdout, again.stderr
    # Without the limit it goes on, and what it had scored stays.
    whole = run_program("train", *held, "--config.checkpoint_every=1")
    assert whole.returncode == 0, whole.stderr
    ranking = json.loads((tmp_path / FILE).read_text())
    assert [entry["step"] for entry in ranking["checkpoints"]] == [1, 2, 3, 4]
    assert ranking["checkpoints"][:2] == found["checkpoints"]
    gaps = {entry["step"]: entry[GAP] for entry in ranking["checkpoints"]}
    assert ranking["best"] == min(gaps, key=gaps.get) and len(set(gaps.values())) == 4
    for name in ("contrast", "crispness"):
        values = [entry[name] for entry in ranking["checkpoints"]]
        assert len(set(values)) == 4 and min(values) > 0
    lora = Path(tmp_path, "lora")
    best = (lora / f"step_{ranking['best']}.safetensors").read_bytes()
    assert (lora / BEST).read_bytes() == best
    assert f"best: {lora / BEST}" in whole.stdout
    report = (tmp_path / "report.html").read_text()
    assert f"lowest at step {ranking['best']}" in report and "contrast</th>" in report
    # Another run, in one go, scores the same.
    other = tmp_path / "other"
    one = run_program("train", *held[:-1], f"--workdir={other}", "--config.checkpoint_every=1")
    assert one.returncode == 0, one.stderr
    assert json.loads((other / FILE).read_text()) == ranking
    # The finished run exports the teacher: scores of the student are none of its, nor is its file.
    teacher = run_program(
        "train", *held, "--config.checkpoint_every=1", "--config.export_weights=teacher"
    )
    assert teacher.returncode == 0, teacher.stderr
    found = json.loads((tmp_path / FILE).read_text())
    assert [entry["step"] for entry in found["checkpoints"]] == [4] and found["best"] == 4
    files = [(folder / "step_4.safetensors").read_bytes() for folder in (lora, other / "lora")]
    assert (lora / BEST).read_bytes() == files[0] != files[1]


@pytest.mark.parametrize("program", ["train", "check"])
def test_stopping_needs_pictures_to_stop_by(tmp_path, program):
    result = run_program(
        program, *RANDOM_CONFIG, "--config.stop.patience=3", f"--workdir={tmp_path}"
    )
    assert result.returncode != 0 and "config.data.holdout is 0" in result.stderr


def test_scorers_that_do_not_fit_the_rows_are_told_by_a_check_too(tmp_path):
    (tmp_path / "own.py").write_text(
        "class Judge:\n    name, better, identity = 'own', 'higher', 'own'\n"
        "    kinds, needs = (), ('prompt',)\n"
        "    def __call__(self, images, cases):\n        return [1.0] * len(images)\n"
    )
    for n in range(3):
        Image.new("RGB", (96, 96), (n, 0, 9)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("a [V] dog")
    words = "--config.stop.scorers=own:Judge", "--config.data.holdout=1", f"--workdir={tmp_path}/w"
    result = run_program(
        "check", *RANDOM_CONFIG, f"--config.data.path={tmp_path}", *words, folder=tmp_path
    )
    assert result.returncode == 2 and "set config.stop.class_word" in result.stderr


def test_scorers_need_pictures_and_what_ranks_must_be_one_of_them():
    config = defaults()
    config.stop.scorers, config.stop.rank_by = "crispness", "contrast"
    few, other = problems_of(heldout.check, config)
    assert few.startswith("config.stop.scorers:") and "config.data.holdout is 0" in few
    assert other.startswith("config.stop.rank_by: 'contrast' is not one of gap, crispness;")
    config.data.holdout, config.stop.rank_by = 2, "crispness"
    heldout.check(config)
    found = checkpoint_scores.find_scorers(config)
    assert checkpoint_scores.order_of(config, found) == Order("crispness", True)


def test_unknown_scorers_are_told_before_anything_is_loaded():
    config = defaults()
    config.stop.scorers = "sharpness,nowhere:x,lpips,composition"
    problems = problems_of(checkpoint_scores.find_scorers, config)
    assert problems[0].startswith("config.stop.scorers: 'sharpness' is not one of crispness,")
    assert problems[1].startswith("config.stop.scorers=nowhere:x: cannot be imported")
    assert "config.stop.lpips_weights" in problems[2] and len(problems) == 3
    config.stop.scorers = "composition"
    (problem,) = problems_of(checkpoint_scores.find_scorers, config)
    assert "composition kept does not judge pictures one by one" in problem


def test_weights_of_a_scorer_that_is_not_asked_have_no_effect():
    config = defaults()
    config.model = config.data.path = "somewhere"
    config.stop.scorers, config.stop.clip = "crispness,dino", "/models/clip"
    (problem,) = problems_of(schema.check, config, ["stop.clip", "stop.dino"])
    assert problem.startswith("config.stop.clip: has no effect with config.stop.scorers = crisp")
    config.stop.scorers = ["clip", "dino"]
    schema.check(config, ["stop.clip"])
