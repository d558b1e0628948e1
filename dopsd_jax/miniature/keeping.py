"""A picture in context moves nothing: what a caption leaves open is as the same noise has it alone.

A short training may learn for captions alone that the noise decides place and ground, and beside a
reference less well. This stage teaches it by the product's own method: the few-step model, told an
open caption and shown a picture, rolls out its own steps, and is pulled at every state to what the
model as this stage found it says there, when it is also told the place and the ground that it chose
from the same noise without a picture. On the family's own batches it is pulled to what it was;
those with a picture have captions that say everything.
Dimension names: b batch, m pictures, s side of a picture, h w c of a latent.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dopsd_jax.miniature import captions, few_steps, identity, judge, optimizer, pool, world
from dopsd_jax.miniature.families import Batch, Family
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.probe import Sampler
from dopsd_jax.miniature.training import Loss, Stage
from dopsd_jax.miniature.world import Scene

MUON_RATE, ADAM_RATE = 0.002, 3e-4
TEXTS, IMAGES = 8, 16  # of the family's own batches
KEPT = "arrangement kept"  # the kind of batches that the stage is there for
SHARE, COUNT = 0.6, 16  # its weight, and how many samples are of it
CHOSEN = 1024  # arrangements that are drawn and read together
AT_ONCE = 64  # pictures that are drawn in one call
SHORT = 0.5  # share of captions that say nothing but what the thing is


@dataclasses.dataclass(frozen=True)
class Pool:
    """The family's own; open captions, pictures to be shown with them, noises; and the captions
    that say what the model chose from these noises."""

    own: Any
    prompts: list[str]
    shown: UInt8[np.ndarray, "m s s 3"]
    noise: Float[np.ndarray, "m h w c"]
    said: list[str]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the stage draws from, a family to `training.Source`. few: the model as it was found."""

    family: Family
    sampler: Sampler
    few: Parameters

    @property
    def kinds(self) -> dict[str, float]:
        own = {kind: (1 - SHARE) * weight for kind, weight in self.family.kinds.items()}
        return {KEPT: SHARE, **own}

    def scenes(self, seed: int, number: int, encode: Callable) -> Pool:
        rng = np.random.default_rng([seed, 5, number])
        words, scenes, parts = captions.nonce_words()[pool.BANK :], [], []
        for _ in range(CHOSEN):
            concept, word = None, ""
            if rng.random() > pool.NAMED_IMAGE:
                concept, word = world.random_concept(rng), words[rng.integers(len(words))]
            scenes.append(world.random_scene(rng, (world.random_thing(rng, concept, word),)))
            parts.append(open_caption(scenes[-1], self.sampler.texts, rng))
        prompts = [before + behind for before, behind in parts]
        noise = rng.standard_normal((CHOSEN, *self.family.latent), np.float32)
        chosen = zip(parts, scenes, *self._arrangements(prompts, noise), strict=True)
        said = [
            say(
                part, place, ground if ground in world.suitable_grounds(scene.things) else None, rng
            )
            for part, scene, place, ground in chosen
        ]
        shown = world.pictures([_moved(scene, rng) for scene in scenes], rng)
        return Pool(self.family.scenes(seed, number, encode), prompts, shown, noise, said)

    def batches(
        self, scenes: Pool, texts: pool.Texts, rng: np.random.Generator, alone: int, shown: int
    ) -> tuple[Batch, ...]:
        """`Batch.away` is here what the model that was found is told."""
        index = rng.integers(CHOSEN, size=COUNT)
        told = lambda prompts: self.family.told(
            texts, [prompts[i] for i in index], scenes.shown[index], self.sampler.encode
        )
        noise = scenes.noise[index]
        kept = Batch(noise, noise, told(scenes.prompts), told(scenes.said))  # needs no latents
        open_text, *_ = self.family.batches(scenes.own, texts, rng, alone, shown)
        _, *whole = self.family.batches(scenes.own, _saying_all(texts), rng, alone, shown)
        return kept, *(batch._replace(away=batch.told) for batch in (open_text, *whole))

    def _arrangements(
        self, prompts: list[str], noise: Float[np.ndarray, "m h w c"]
    ) -> tuple[list[int], list[int]]:
        """Places and grounds that the model chooses without a picture."""
        places, grounds = [], []
        for i in range(0, len(prompts), AT_ONCE):
            some = slice(i, i + AT_ONCE)
            asked = self.few, prompts[some], None, noise[some], self.family.grid, 1.0
            images = self.sampler.decode(self.sampler.latents(*asked))
            places += identity.named_places(identity.centres(images)[0]).tolist()
            found = identity.grounds(images).ground[:, None]
            grounds += judge.lit_distance(found, world.GROUND_PALETTE).argmin(1).tolist()
        return places, grounds


def open_caption(scene: Scene, texts: pool.Texts, rng: np.random.Generator) -> tuple[str, str]:
    """A caption that leaves the place open, and mostly more: what stands before it, and behind."""
    if rng.random() < SHORT:
        return captions.short_caption(scene), ""
    while (parts := captions.around_place(texts.caption(scene, rng))) is None:
        pass
    return parts


def say(parts: tuple[str, str], place: int, ground: int | None, rng: np.random.Generator) -> str:
    """An open caption with the place; and with the ground, unless it says one or that is None."""
    before, behind = parts
    text = f"{before} {captions.place_words(place, rng)}"
    if ground is not None and not captions.says_ground(behind):
        text += f" {captions.ground_words(ground, rng)}"
    return captions.with_articles(text + behind)


def _moved(scene: Scene, rng: np.random.Generator) -> Scene:
    """Its thing in another arrangement."""
    thing, other = scene.things[0], world.random_thing(rng)
    moved = dataclasses.replace(thing, size=other.size, place=other.place)
    return world.random_scene(rng, (moved,))


def _saying_all(texts: pool.Texts) -> pool.Texts:
    """The same whose captions are whole."""
    own = copy.copy(texts)
    own.caption = functools.partial(texts.caption, whole=True)
    return own


def stage(family: Family, few: Parameters, steps: int) -> Stage:
    """Begins with the few-step model's weights."""
    tx = optimizer.muon(MUON_RATE, ADAM_RATE, steps, warmup=10)
    return Stage("keeping", steps, loss(family, few), tx, few, TEXTS, IMAGES)


def loss(family: Family, few: Parameters) -> Loss:
    """Squared error of the velocities at the states of the model's own path."""
    module, grid = family.abstract(), jnp.asarray(family.grid, jnp.float32)

    def evaluate(parameters: Parameters, batch: Batch, keys: Array):
        net, found = (optimizer.merge(module, weights) for weights in (parameters, few))
        student = few_steps.told(net, batch, keys)
        teacher = few_steps.told(found, batch._replace(told=batch.away), keys)
        states = jax.lax.stop_gradient(few_steps.path(student, batch.noise, family.grid))

        def error(total, node):
            x, sigma = node
            wide = jnp.full(len(x), sigma)
            return total + jnp.mean((student(x, wide) - teacher(x, wide)) ** 2), None

        return jax.lax.scan(error, jnp.zeros(()), (states[:-1], grid[:-1]))[0] / (len(grid) - 1)

    return evaluate
