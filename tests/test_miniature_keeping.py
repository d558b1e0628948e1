"""The stage that keeps arrangements: it asks for the model's own choice, and for nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from miniature_helpers import moving, texts_of

from dopsd_jax.miniature import captions, few_steps, keeping, optimizer, pool, render, world
from dopsd_jax.miniature.flux2_klein import configs, pairs
from dopsd_jax.miniature.flux2_klein.family import Miniature

SMALL = Miniature(configs.Size(heads=1, double_layers=1, single_layers=1, text_dim=24))
PLACES, GROUNDS = list(world.PLACES), list(world.GROUNDS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return texts_of(SMALL, tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def few():
    return moving(SMALL)


class Chooser:
    """Draws a thing at the place, and on the ground, that the noise's first values tell."""

    encode = staticmethod(lambda images: np.zeros((len(images), *SMALL.latent), np.float32))

    def __init__(self, texts):
        self.texts, self.asked = texts, []

    def latents(self, parameters, prompts, images, noise, grid, guidance):
        assert images is None and grid == SMALL.grid and guidance == 1
        self.asked += prompts
        return noise

    def decode(self, latents):
        thing = world.Thing(shape=0, colour=0, size=0, place=0, texture=0)
        things = [dataclasses.replace(thing, place=int(p)) for p in chosen(latents, PLACES)]
        grounds = map(int, chosen(latents, GROUNDS))
        scenes = [world.Scene((t,), 0, g, 0) for t, g in zip(things, grounds, strict=True)]
        return render.render(world.compose(scenes, None))


def chosen(noise, names):
    channel = int(names is GROUNDS)
    return np.abs(1e3 * noise[:, 0, 0, channel]).astype(int) % len(names)


@pytest.fixture(scope="module", autouse=True)
def small_pools():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "POOL", 64)
        patch.setattr(pairs, "PAIRS", 32)
        patch.setattr(keeping, "CHOSEN", 80)
        yield


@pytest.fixture(scope="module")
def source(texts, few):
    places = keeping.Chosen(SMALL, Chooser(texts), few)
    return places, places.scenes(0, 0, Chooser.encode)


def test_what_is_told_is_what_was_chosen(source):
    places, found = source
    assert places.sampler.asked == found.prompts
    assert not any(captions.says_place(prompt) for prompt in found.prompts)
    each = zip(
        found.said, found.prompts, chosen(found.noise, PLACES), chosen(found.noise, GROUNDS),
        strict=True,
    )  # fmt: skip
    grounds = 0
    for text, prompt, place, ground in each:
        assert any(words in text for words in captions.PLACE_WORDS[PLACES[place]])
        if captions.says_ground(prompt):
            assert "".join(captions.around_place(text)) == prompt
        elif captions.says_ground(text):
            grounds += 1
            assert GROUNDS[ground] in text
    assert grounds > len(found.prompts) / 4
    short = np.mean([len(prompt.split()) <= 3 for prompt in found.prompts])
    assert 0.3 < short < 0.9


def test_a_caption_is_completed_in_the_order_of_the_grammar():
    rng = np.random.default_rng(0)
    said = keeping.say(("a big dax", " in flat style"), 0, 1, rng)
    assert captions.says_place(said) and captions.says_ground(said)
    assert said.startswith("a big dax ") and said.endswith(" in flat style")
    assert not captions.says_ground(keeping.say(("a dax", ""), 0, None, rng))
    known = keeping.say(("a dax", " against navy"), 0, 1, rng)
    assert known.endswith(" against navy") and known.count("against") == 1


def test_student_and_teacher_differ_in_what_they_are_told_alone(source, texts):
    places, found = source
    kept, *own = places.batches(found, texts, np.random.default_rng(1), 8, 16)
    assert list(places.kinds) == [keeping.KEPT, *SMALL.kinds]
    assert sum(places.kinds.values()) == pytest.approx(1)
    assert not np.array_equal(kept.told.ids, kept.away.ids)
    assert len(kept.told.references) == len(kept.away.references) == 1
    assert len(own) == len(SMALL.kinds)
    for batch in own:
        assert batch.away is batch.told
    shown_thing = [
        texts.tokenizer.decode(ids) for ids in own[1].told.ids[: len(own[1].told.ids) // 2]
    ]
    assert all(captions.says_place(text) and captions.says_ground(text) for text in shown_thing)


def test_what_was_found_is_kept_and_what_is_not_told_is_learned(source, texts, few):
    """The loss is 0 where both are told the same, and its gradient is not where they are not."""
    places, found = source
    kept, *own = places.batches(found, texts, np.random.default_rng(1), 8, 16)
    loss = jax.jit(jax.value_and_grad(keeping.loss(SMALL, few)))
    keys = lambda batch: jax.random.split(jax.random.key(0), len(batch.latents))
    assert loss(few, own[1], keys(own[1]))[0] < 1e-9
    value, gradient = loss(few, kept, keys(kept))
    assert value > 1e-6 and any(np.any(np.asarray(g)) for g in gradient.values())


def test_the_loss_is_of_the_models_own_states(source, texts, few):
    """Written out for one sample: Euler steps of the student, the teacher's velocity there."""
    places, found = source
    kept, *_ = places.batches(found, texts, np.random.default_rng(1), 8, 16)
    one = jax.tree.map(lambda a: a[:1], kept)
    moved = {name: value + 0.01 for name, value in few.items()}
    keys = jax.random.split(jax.random.key(0), 1)
    net, old = (optimizer.merge(SMALL.abstract(), weights) for weights in (moved, few))
    student = few_steps.told(net, one, keys)
    teacher = few_steps.told(old, one._replace(told=one.away), keys)
    x, total = jnp.asarray(one.noise), 0.0
    for sigma, following in zip(SMALL.grid[:-1], SMALL.grid[1:], strict=True):
        level = jnp.full(1, sigma)
        v = student(x, level)
        total += float(jnp.mean((v - teacher(x, level)) ** 2))
        x = x + (following - sigma) * v
    value = keeping.loss(SMALL, few)(moved, one, keys)
    assert float(value) == pytest.approx(total / (len(SMALL.grid) - 1), rel=1e-4)
