"""A student to which invented words differ: its text encoder learns by heart what 256 of them name.

To the shipped miniature a new word is nearly *some new word*: captions that differ in it alone give
pictures that are much alike. Here the text encoder alone learns, so that a linear head reads from
its features what a caption's word names. Features of ordinary captions, and of those with a picture
in context, stay as they were. See paper_students.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dopsd_jax.conditioning.anchors import new_words
from dopsd_jax.miniature import captions, optimizer, pool, world
from dopsd_jax.miniature.families import Batch, Family, Told
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.training import Loss, Stage

RATE, WARMUP, COOLDOWN = 3e-3, 50, 0.9
WORDS, WORDS_SEED = 256, 1000003  # anchors draw their words with a run's seed
NAMED, TEXTS, IMAGES = 64, 16, 16  # samples of a step
SHORT = 0.3  # share of captions that say the word alone
CELLS = 4  # a side of what the head reads: means of a latent
HEAD, BIAS = "head.kernel", "head.bias"
TRAINED = ("text.", HEAD, BIAS)


@dataclasses.dataclass(frozen=True)
class Pool:
    """The family's own; words with what they name, and what the head is to read of each."""

    own: pool.Pool
    words: list[tuple[str, world.Concept]]
    looks: Float[np.ndarray, "m h w c"]


@dataclasses.dataclass(frozen=True)
class Naming:
    """What the stage draws from, a family to `training.Source`."""

    family: Family
    kinds = {"unread": 1.0, "ordinary": 1.0, "with a picture": 1.0}  # noqa: RUF012

    def scenes(self, seed: int, number: int, encode: Callable) -> Pool:
        rng = np.random.default_rng([seed, 8])
        names = captions.nonce_words()[pool.BANK :][: WORDS // 2]
        names += [word for _, word in new_words(WORDS - len(names), WORDS_SEED)]
        words = [(name, world.random_concept(rng)) for name in names]
        plain = [world.Scene((_plain(*word),), 0, 0, 0) for word in words]
        latents = np.float32(encode(world.pictures(plain, rng)))
        m, h, w, c = latents.shape
        means = latents.reshape(m, CELLS, h // CELLS, CELLS, w // CELLS, c).mean((2, 4))
        looks = (means - means.mean(0)) / (means.std(0) + 1e-3)
        return Pool(self.family.scenes(seed, number, encode), words, looks)

    def batches(
        self, scenes: Pool, texts: pool.Texts, rng: np.random.Generator, alone: int, shown: int
    ) -> tuple[Batch, ...]:
        """Captions with a word, and behind them what it names; ordinary captions; with pictures."""
        prompts, looks = [], []
        for i in rng.integers(WORDS, size=NAMED):
            name, concept = scenes.words[i]
            scene = world.random_scene(rng, (world.random_thing(rng, concept, name),))
            short = rng.random() < SHORT
            prompts.append(captions.short_caption(scene) if short else texts.caption(scene, rng))
            looks.append(scenes.looks[i])
        said = Told(*texts(prompts, image=False), references=(np.stack(looks),))
        nothing = np.zeros((NAMED, *self.family.latent), np.float32)
        index = rng.integers(pool.POOL // 2, size=alone)
        told = [texts.caption(scenes.own.scenes[i], rng) for i in index]
        ordinary = Told(*texts(told, image=False))
        _, again = self.family.batches(scenes.own, texts, rng, alone, shown)
        again = again._replace(told=again.told._replace(references=(), dropped=None))
        latents = scenes.own.latents[index]
        return (
            Batch(nothing, nothing, said, said),
            Batch(latents, latents, ordinary, ordinary),
            again,
        )


def _plain(word: str, concept: world.Concept) -> world.Thing:
    """The concept, large and in the middle."""
    return world.Thing(shape=-1, colour=0, size=1, place=0, texture=0, word=word, concept=concept)


def stage(family: Family, shipped: Parameters, steps: int) -> Stage:
    """Begins with the shipped weights and a head that reads nothing."""
    looks, width = CELLS**2 * family.latent[2], family.size.text_dim
    start = shipped | {HEAD: jnp.zeros((width, looks)), BIAS: jnp.zeros(looks)}
    rate = optimizer.schedule(RATE, steps, WARMUP, COOLDOWN)
    learns = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    owner = lambda all_: {k: "learns" if k.startswith(TRAINED) else "stays" for k in all_}
    tx = optax.multi_transform({"learns": learns, "stays": optax.set_to_zero()}, owner)
    networks = lambda all_: {k: v for k, v in all_.items() if k not in (HEAD, BIAS)}
    return Stage("naming", steps, loss(family, shipped), tx, start, TEXTS, IMAGES, networks)


def loss(family: Family, shipped: Parameters) -> Loss:
    """What the head cannot read, or how far features went from the shipped ones."""
    module = family.abstract()

    def evaluate(parameters: Parameters, batch: Batch, keys: Array):
        told = batch.told
        networks = {k: v for k, v in parameters.items() if k not in (HEAD, BIAS)}
        rows = jnp.arange(told.ids.shape[1]) < told.lengths[:, None]
        features = jnp.where(rows[..., None], _features(module, networks, told), 0)
        if told.references:
            size = jnp.mean(features**2, axis=-1, keepdims=True)
            mean = jnp.sum(features * jax.lax.rsqrt(size + 1e-6), axis=1) / told.lengths[:, None]
            look = told.references[0].reshape(len(mean), -1)
            return jnp.mean((mean @ parameters[HEAD] + parameters[BIAS] - look) ** 2)
        before = jnp.where(rows[..., None], _features(module, shipped, told), 0)
        return jnp.sum((features - before) ** 2) / jnp.sum(before**2)

    return evaluate


def _features(module: Any, parameters: Parameters, told: Told) -> Float[Array, "b n c"]:
    return optimizer.merge(module, parameters).context(told).features
