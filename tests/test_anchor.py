"""The on-policy anchor: laws of its step, of its prompts, and of how many there are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_error
from test_dopsd import GRID, SHAPE, toy_denoiser, world

from dopsd_jax import dopsd
from dopsd_jax.common.errors import UserError
from dopsd_jax.conditioning import anchors
from dopsd_jax.config import schema
from dopsd_jax.config.loading import load
from dopsd_jax.data.table import DataRow
from dopsd_jax.methods import anchor, registry
from dopsd_jax.methods.flow_matching import start_noise
from dopsd_jax.methods.method import Teacher
from dopsd_jax.training import state, train_step

CONCEPT = {"anchor.share": "0.25", "anchor.concept_word": "dax", "anchor.class_word": "dog"}


def config(**fields):
    return load("zimage:random", {"anchor.share": "0.25"} | fields)


@pytest.mark.parametrize(
    ("size", "accumulate", "share", "devices", "expected"),
    [
        (6, 1, 0.25, 1, (1, 2)),  # a quarter of eight images
        (6, 1, 0.5, 1, (1, 6)),
        (1, 4, 0.1, 1, (1, 1)),  # at least one
        (2, 2, 0.6, 1, (3, 2)),  # no micro-batch is larger than those of the rows
        (8, 2, 0.25, 4, (1, 8)),
        (32, 1, 0.1, 8, (1, 8)),
    ],
)
def test_anchors_come_in_micro_batches_that_devices_can_share(
    size, accumulate, share, devices, expected
):
    given = {"batch_size": size, "accumulate": accumulate, "anchor": {"share": share}}
    assert anchor.micro_batches(given, devices) == expected
    count, own = expected
    assert own % devices == 0 and own <= size
    assert count * own >= size * accumulate * share / (1 - share) - 1e-9


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"anchor.share": "0"}, ""),
        ({}, "off"),
        ({"lora.init_from": "x.safetensors"}, "copy"),
        ({"train": "full"}, "copy"),
        ({"train": "full", "anchor.teacher": "teacher"}, "teacher"),
        ({"train": "full", "teacher.weights": "frozen"}, "teacher"),
        ({"train": "full", "method": "pso"}, "teacher"),
        ({"train": "full", "method": "sft"}, "copy"),
    ],
)
def test_a_copy_of_the_start_is_kept_only_where_nothing_else_has_it(fields, where):
    own = config(**fields)
    assert registry.start(own) == where


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"anchor.prompts": "class"}, "anchor.class_word: is empty; name what the concept is"),
        ({"anchor.prompts": "new_words"}, "anchor.concept_word: is empty, and so is"),
        (
            {"anchor.prompts": ""},
            "anchor.prompts: is empty; name general, class, new_words, edits, or a",
        ),
        ({"anchor.share": "1"}, "anchor.share: 1.0 must be at most 0.9"),
        ({"anchor.prompts": "edits"}, "edits are instructions, and without config.anchor.edit an"),
        (
            {"anchor.teacher": "teacher", "method": "sft"},
            "anchor.teacher: names the teacher, which has no weights of its own with config.method",
        ),
        ({"method": "sft", "loss": "velocity"}, None),  # of the anchors
    ],
)
def test_what_does_not_go_together_is_told(fields, message):
    if message is None:
        schema.check(config(**fields), fields)
        return
    with pytest.raises(UserError, match=message):
        schema.check(config(**fields), fields)


def test_a_step_passes_the_network_for_each_anchor_as_for_a_row_and_its_start():
    """Beside an image of the rows: of six there are two anchors, and at a half six."""
    for share, beside in (("0.25", 1 / 3), ("0.5", 1)):
        own = config(**{"anchor.share": share, "batch_size": "6", "loss_steps": "0,1"})
        rows, held = registry.passes(own, GRID)
        assert (held.backward, held.forward, held.captions) == pytest.approx(
            (2 * beside, 4 * beside, beside)
        )
        assert rows.backward == 2
    assert registry.passes(config(**{"anchor.share": "0"}), GRID)[1] is None


def test_fields_of_anchors_mean_nothing_without_them():
    given = {"anchor.prompts": "class"}
    with pytest.raises(UserError, match=r"anchor.prompts: has no effect with config.anchor.share"):
        schema.check(load("zimage:random", given), given)


# --- the step

LATENT = SHAPE
ROWS = 2  # micro-batches


def pieces(start="off", share=0.25, weights="ema", count=1):
    base, adapters, _, contexts, _ = world()
    net, teacher = toy_denoiser(), Teacher(weights, decay=0.5)

    def rows(student, teacher, base, contexts, noise, key):
        nodes = dopsd.make_nodes(GRID, "x0", "all", key)
        return dopsd.loss_and_gradient(net, student, teacher, base, contexts, noise, nodes)

    def held(student, start, base, context, noise, key):
        return rows(student, start, base, dopsd.Contexts(context, context), noise, key)

    tx = optax.sgd(1.0)
    step = train_step.make_step(
        rows, tx, teacher, lambda _: 1.0, 0,
        start=start, anchor=train_step.Anchor(held, share) if share else None,
    )  # fmt: skip
    batch = jax.tree.map(lambda x: jnp.stack([x] * ROWS), contexts)
    prompts = jax.random.normal(jax.random.key(9), (count, 2, 3))
    return step, tx, teacher, base, adapters, batch, prompts


def move(start="off", share=0.25, student=None, with_anchors=True, asked=None, count=1):
    """(what one step of rate 1 takes away, metrics); `asked`: a teacher that is not the student."""
    step, tx, teacher, base, adapters, batch, prompts = pieces(start, share, count=count)
    adapters = adapters if student is None else student
    begun = state.create(adapters, teacher, tx, start == "copy")
    begun = begun if asked is None else begun._replace(teacher=asked)
    given = prompts if with_anchors else None
    new, metrics = step(begun, base, batch, 0, given, latent=LATENT)
    return jax.tree.map(lambda a, b: np.asarray(a - b), adapters, new.student), metrics


def test_the_gradient_is_the_weighted_mean_of_rows_and_anchors():
    rows, _ = move(share=0.25, with_anchors=False)
    quarter, half = move(share=0.25)[0], move(share=0.5)[0]
    # Two shares give the gradient of the anchors twice.
    first = jax.tree.map(lambda g, r: (g - 0.75 * r) / 0.25, quarter, rows)
    second = jax.tree.map(lambda g, r: (g - 0.5 * r) / 0.5, half, rows)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.abs(a).max() > 1e-3 and relative_error(a, b) < 1e-4


@pytest.mark.parametrize(("start", "count"), [("off", 1), ("off", 2), ("teacher", 1)])
def test_the_anchors_gradient_is_that_of_the_method_with_the_same_prompt_and_the_start(
    start, count
):
    """Their micro-batches are those after the rows', and have their noise; their mean counts."""
    rows, _ = move(share=0.5, with_anchors=False, asked=world()[2])
    both, metrics = move(start, share=0.5, asked=world()[2], count=count)
    *_, base, adapters, _, prompts = pieces(count=count)
    held = world()[2] if start == "teacher" else jax.tree.map(jnp.zeros_like, adapters)

    @jax.jit
    def alone(number, prompts):
        noise_key, _ = jax.random.split(jax.random.fold_in(state.step_key(0, 0), number))
        noise = start_noise(noise_key, (2, *LATENT[1:]))
        context = dopsd.Contexts(prompts, prompts)
        nodes = dopsd.make_nodes(GRID, "x0", "all", noise_key)
        own = adapters, held, base, context, noise, nodes
        return dopsd.loss_and_gradient(toy_denoiser(), *own)

    each = [alone(ROWS + i, own) for i, own in enumerate(prompts)]
    losses, expected = jax.tree.map(lambda *own: sum(own) / count, *each)
    for b, r, e in zip(*map(jax.tree.leaves, (both, rows, expected)), strict=True):
        assert np.abs(e).max() > 1e-3 and relative_error((b - 0.5 * r) / 0.5, e) < 1e-5
    assert relative_error(metrics["anchor_loss"], losses.total) < 1e-6


def test_at_the_start_nothing_pulls():
    _, adapters, *_ = world()
    off = jax.tree.map(jnp.zeros_like, adapters)
    for start, student in (("off", off), ("copy", adapters)):
        rows, _ = move(share=0.25, student=student, with_anchors=False)
        both, metrics = move(start, share=0.25, student=student)
        assert float(metrics["anchor_gap"]) == float(metrics["anchor_loss"]) == 0
        for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(rows), strict=True):
            np.testing.assert_allclose(a, 0.75 * b, rtol=1e-6, atol=1e-8)


def test_the_start_stays_where_it_was():
    step, tx, teacher, base, adapters, batch, prompts = pieces("copy")
    now = state.create(adapters, teacher, tx, keep_start=True)
    for n in range(2):
        now, metrics = step(now, base, batch, n, prompts, latent=LATENT)
    assert float(metrics["anchor_gap"]) > 1e-3
    for kept, first in zip(jax.tree.leaves(now.start), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_array_equal(kept, first)


def test_without_anchors_the_state_is_what_it_was():
    _, tx, teacher, _, adapters, *_ = pieces(share=0)
    assert state.create(adapters, teacher, tx).start is None


# --- the prompts


def rows(*texts):
    return [DataRow(None, (("text", text),), f"row {i}") for i, text in enumerate(texts)]


def chosen(kinds, *texts, **fields):
    own = load("zimage:random", CONCEPT | {"anchor.prompts": kinds} | fields)
    return anchors.choose(own, rows(*texts), ("text",))


def test_the_class_and_new_words_take_the_place_of_the_concepts_word():
    found = chosen("class", "a dax on grass", "the dax, daxes")
    assert [p.text for p in found] == ["a dog on grass", "the dog, daxes"]
    found = chosen("new_words", "a dax on grass", "the dax, daxes")
    assert len(found) > 200 and not any("dax " in p.text for p in found)
    words = {p.text.split()[1] for p in found if p.text.endswith("on grass")}
    assert len(words) > 100 and all(w.isalpha() for w in words)
    assert found == chosen("new_words", "a dax on grass", "the dax, daxes")


def test_new_words_have_several_forms_and_are_never_the_concepts_own():
    found = anchors.new_words(256, 0)
    assert len(set(found)) > 230 and min(map(len, found)) <= 3 and max(map(len, found)) >= 7
    assert {text[-1] in "aeiou" for text in found} == {True, False}
    own = found[0]
    assert own not in anchors.new_words(256, 0, own.upper())


def test_captions_without_the_word_are_told_all_at_once():
    with pytest.raises(UserError) as caught:
        chosen("class", "a dax", "a cat", "a hat")
    assert [p.split(":")[0] for p in caught.value.problems] == ["row 1", "row 2"]


def test_a_file_of_prompts_is_read_by_lines_and_each_text_counts_once(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one thing\n\n two things \none thing\n")
    found = chosen(f"{path},class", "a dax")
    assert [(p.where, p.text) for p in found][:2] == [
        (f"{path}:1", "one thing"), (f"{path}:3", "two things"),
    ]  # fmt: skip
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=f"anchor.prompts {path}: "):
        chosen(str(path))
    with pytest.raises(
        UserError,
        match=r"no such file; config.anchor.prompts takes general, class, new_words, edits, or",
    ):
        chosen(str(tmp_path / "none.txt"))


class Turns(anchors.Anchors):
    """Anchors with nothing but their prompts."""

    def __init__(self, micro, *counts):
        self.micro, self.seed = micro, 5
        ends = np.cumsum(counts)
        self.kinds = [np.arange(e - n, e) for n, e in zip(counts, ends, strict=True)]


def test_kinds_take_turns_and_every_prompt_comes_before_one_comes_again():
    turns = Turns(anchor.Micro(2, 3), 3, 9)
    found = [n for step in range(6) for n in turns.numbers(step)]
    first, second = found[::2], found[1::2]
    assert all(n < 3 for n in first) and all(n >= 3 for n in second)
    assert [sorted(first[i : i + 3]) for i in range(0, 18, 3)] == [[0, 1, 2]] * 6
    assert [sorted(second[i : i + 9]) for i in (0, 9)] == [list(range(3, 12))] * 2
    assert second[:9] != second[9:]  # every round has its own order
    assert turns.numbers(4) == found[24:30]  # of the step alone
    alike = [n for step in range(9) for n in Turns(anchor.Micro(1, 2), 9, 9).numbers(step)]
    assert alike[::2] != [n - 9 for n in alike[1::2]]  # and every kind


def test_the_digest_tells_other_prompts(tmp_path):
    sets = [chosen("class", "a dax"), chosen("class", "the dax")]
    digests = []
    for prompts in sets:
        own = Turns(anchor.Micro(1, 1), len(prompts))
        own.prompts = anchors.prompt_set(prompts)
        digests.append(own.digest())
    assert len(set(digests)) == 2


def test_the_general_prompts_are_there():
    assert len(chosen("general")) == 500
