"""A picture in context moves nothing: things stand where the same noise puts them without it.

Where a caption leaves the place open the noise decides it. A short training may learn this for
captions alone, and less well beside a reference. This stage teaches it by the product's own method:
the few-step model, told an open caption and shown a picture, rolls out its own steps, and is pulled
at every state to what the model as this stage found it says there, when it is also told the place
that it chose from the same noise without a picture. On the family's own batches it is pulled to
what it was.
Dimension names: b batch, m pictures, s side of a picture, h w c of a latent.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dopsd_jax.miniature import captions, few_steps, identity, optimizer, pool, world
from dopsd_jax.miniature.families import Batch, Family
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.probe import Sampler
from dopsd_jax.miniature.training import Loss, Stage

MUON_RATE, ADAM_RATE = 0.002, 3e-4
TEXTS, IMAGES = 8, 16  # of the family's own batches
KEPT = "place kept"  # the kind of batches that the stage is there for
SHARE, COUNT = 0.6, 16  # its weight, and how many samples are of it
CHOSEN = 1024  # places that are drawn and read together
SHORT = 0.5  # share of captions that say nothing but what the thing is


@dataclasses.dataclass(frozen=True)
class Pool:
    """The family's own; open captions, pictures to be shown with them, noises; and the captions
    with the places that the model chose from these noises."""

    own: Any
    prompts: list[str]
    shown: UInt8[np.ndarray, "m s s 3"]
    noise: Float[np.ndarray, "m h w c"]
    placed: list[str]


@dataclasses.dataclass(frozen=True)
class Places:
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
        words, parts, shown = captions.nonce_words()[pool.BANK :], [], []
        for _ in range(CHOSEN):
            concept, word = None, ""
            if rng.random() > pool.NAMED_IMAGE:
                concept, word = world.random_concept(rng), words[rng.integers(len(words))]
            scene = world.random_scene(rng, (world.random_thing(rng, concept, word),))
            parts.append(open_caption(scene, self.sampler.texts, rng))
            thing, other = scene.things[0], world.random_thing(rng)
            moved = dataclasses.replace(thing, size=other.size, place=other.place)
            shown.append(world.random_scene(rng, (moved,)))
        prompts = [before + behind for before, behind in parts]
        noise = rng.standard_normal((CHOSEN, *self.family.latent), np.float32)
        places = self._chosen(prompts, noise)
        placed = [f"{before} {said_place(p, rng)}{behind}"
                  for (before, behind), p in zip(parts, places, strict=True)]  # fmt: skip
        own = self.family.scenes(seed, number, encode)
        return Pool(own, prompts, world.pictures(shown, rng), noise, placed)

    def batches(
        self, scenes: Pool, texts: pool.Texts, rng: np.random.Generator, alone: int, shown: int
    ) -> tuple[Batch, ...]:
        """`Batch.away` is here what the model that was found is told."""
        index = rng.integers(CHOSEN, size=COUNT)
        said = lambda prompts: self.family.told(
            texts, [prompts[i] for i in index], scenes.shown[index], self.sampler.encode
        )
        noise = scenes.noise[index]
        kept = Batch(noise, noise, said(scenes.prompts), said(scenes.placed))  # needs no latents
        own = self.family.batches(scenes.own, texts, rng, alone, shown)
        return kept, *(batch._replace(away=batch.told) for batch in own)

    def _chosen(self, prompts: list[str], noise: Float[np.ndarray, "m h w c"]) -> np.ndarray:
        """The places that the model chooses without a picture."""
        found = []
        for i in range(0, len(prompts), SOME):
            some = slice(i, i + SOME)
            z = self.sampler.latents(
                self.few, prompts[some], None, noise[some], self.family.grid, 1.0
            )
            images = self.sampler.decode(z)
            found.append(identity.named_places(identity.centres(images)[0]))
        return np.concatenate(found)


SOME = 64  # pictures that are drawn at once


def open_caption(scene: world.Scene, texts: pool.Texts, rng) -> tuple[str, str]:
    """A caption that leaves the place open: what stands before it, and behind it."""
    if rng.random() < SHORT:
        return captions.short_caption(scene), ""
    while (parts := captions.around_place(texts.caption(scene, rng))) is None:
        pass
    return parts


def said_place(place: int, rng: np.random.Generator) -> str:
    """A wording of one of `world.PLACES`."""
    wordings = captions.PLACE_WORDS[list(world.PLACES)[place]]
    return wordings[rng.integers(len(wordings))]


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
