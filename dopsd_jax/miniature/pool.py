"""Endless training pictures: a batch depends on a seed and the batch's number alone.

Dimension names: m pictures, s side of a picture, h w c of a latent, b batch, n tokens, p patches.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.optimize import linear_sum_assignment

from dopsd_jax.miniature import captions, world
from dopsd_jax.miniature.families import Batch, Told
from dopsd_jax.miniature.world import Scene

POOL = 1024  # pictures that are drawn and encoded together
POOL_STEPS = 96  # steps that draw their batches from one pool
BANK = 96  # words with a fixed concept each, which the model learns by heart
KNOWN = 0.4  # share of a text-only batch's concepts that are of the bank
NAMED_TEXT = 0.8  # share of named shapes in a text-only batch
NAMED_IMAGE = 0.3  # and in a batch with images
SAME = 0.2  # share of images in context that are the target itself
EMPTY = 0.08  # share of empty captions, for guidance


def plain_pictures(seed: int, number: int, count: int) -> UInt8[np.ndarray, "m s s 3"]:
    """Batch `number` of pictures for the autoencoder: named shapes and concepts in equal parts."""
    rng = np.random.default_rng([seed, number])
    scenes = []
    for i in range(count):
        things = None
        if i % 2:
            things = (world.random_thing(rng, world.random_concept(rng)),)
        scenes.append(world.random_scene(rng, things))
    return world.pictures(scenes, rng)


@dataclasses.dataclass(frozen=True)
class Pool:
    """Scenes with their pictures and latents.

    First half: named shapes. Second half: concepts; those from `bank` on are of the bank, the
    others never seen before. Entries 2k and 2k + 1 are the same thing arranged twice.
    """

    scenes: list[Scene]
    images: UInt8[np.ndarray, "m s s 3"]
    latents: Float[np.ndarray, "m h w c"]
    bank: int


def bank(seed: int) -> list[tuple[str, world.Concept]]:
    """The words with a fixed concept each."""
    rng = np.random.default_rng([seed, 7])
    return [(word, world.random_concept(rng)) for word in captions.nonce_words()[:BANK]]


def make_pool(seed: int, number: int, encode: Callable) -> Pool:
    """Pool `number`; `encode` gives the latents of pictures."""
    rng = np.random.default_rng([seed, 1, number])
    scenes = [s for _ in range(POOL // 4) for s in _arranged_twice(rng)]
    known, free = bank(seed), captions.nonce_words()[BANK:]
    fresh = POOL // 4  # concepts seen here only; as many entries are of the bank as text needs
    for i in range(POOL // 4):
        if i < fresh * (1 - KNOWN):
            word, concept = free[rng.integers(len(free))], world.random_concept(rng)
        else:
            word, concept = known[rng.integers(len(known))]
        for _ in range(2):
            thing = world.random_thing(rng, concept, word)
            scenes.append(world.random_scene(rng, (thing,)))
    images = world.pictures(scenes, rng)
    first_known = POOL // 2 + 2 * int(np.ceil(fresh * (1 - KNOWN)))
    return Pool(scenes, images, encode(images), first_known)


def _arranged_twice(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """A scene, and its thing in another arrangement; two things stay as they are."""
    scene = world.random_scene(rng)
    if len(scene.things) > 1:
        return scene, scene
    thing, other = scene.things[0], world.random_thing(rng)
    return scene, world.random_scene(
        rng, (dataclasses.replace(thing, size=other.size, place=other.place),)
    )


class Texts:
    """Prompts to token rows of fixed length.

    Args:
      template: (prompt, whether an image is shown) -> text.
      rows: of a prompt alone, and of one with an image.
      pad: the token of the rows behind a text; it counts only where these are seen.
    """

    def __init__(
        self,
        tokenizer,
        template: Callable[[str, bool], str],
        rows: tuple[int, int],
        pad: int = 0,
    ):
        self.tokenizer, self.template, self.rows, self.pad = tokenizer, template, rows, pad

    def tokens(self, prompts: list[str], image: bool) -> list[list[int]]:
        """Token ids of templated prompts."""
        texts = [self.template(prompt, image) for prompt in prompts]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def fit(self, prompt: str) -> bool:
        """Whether the prompt's tokens fit, also beside an image."""
        return all(len(self.tokens([prompt], image)[0]) <= self.rows[image] for image in (0, 1))

    def caption(self, scene: Scene, rng: np.random.Generator, whole: bool = False) -> str:
        """A caption whose tokens fit."""
        while not self.fit(text := captions.caption(scene, rng, whole)):
            pass
        return text

    def __call__(self, prompts: list[str], image: bool) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, padded on the right, and lengths; with the places of an image or without."""
        limit = self.rows[image]
        found = self.tokens(prompts, image)
        ids = np.full((len(found), limit), self.pad, np.int32)
        for row, tokens in zip(ids, found, strict=True):
            if len(tokens) > limit:
                raise ValueError(f"{len(tokens)} tokens, {limit} fit: {prompts}")
            row[: len(tokens)] = tokens
        return ids, np.array([len(tokens) for tokens in found], np.int32)


def text_batch(pool: Pool, texts: Texts, rng: np.random.Generator, count: int) -> Batch:
    """Targets with captions alone."""
    named = rng.random(count) < NAMED_TEXT
    index = np.where(
        named, rng.integers(POOL // 2, size=count), rng.integers(POOL // 2, POOL, count)
    )
    prompts = [texts.caption(pool.scenes[i], rng) for i in index]
    prompts = ["" if rng.random() < EMPTY else p for p in prompts]
    latents, away = pool.latents[index], Told(*texts([""] * count, image=False))
    noise = paired_noise(rng, latents, prompts)
    return Batch(latents, noise, Told(*texts(prompts, image=False)), away)


def shown_again(
    pool: Pool, texts: Texts, rng: np.random.Generator, count: int
) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"], list[str]]:
    """Targets, pictures to be shown with them, as entries of the pool, and captions.

    Both are the same thing, mostly in another arrangement. So the caption is followed where it says
    something, the picture tells what the thing is, and the noise decides the rest, as it does
    without a picture.
    """
    named = rng.random(count) < NAMED_IMAGE
    half = POOL // 2
    index = np.where(named, rng.integers(half, size=count), rng.integers(half, pool.bank, count))
    shown = np.where(rng.random(count) < SAME, index, index ^ 1)
    return index, shown, [texts.caption(pool.scenes[i], rng) for i in index]


def paired_noise(
    rng: np.random.Generator, latents: Float[np.ndarray, "b h w c"], prompts: list[str]
) -> Float[np.ndarray, "b h w c"]:
    """Noise for each target; where captions leave the place open, the noise tells it.

    Among targets without a place in the caption the noise is dealt out so that its mean over the
    channels is high where something stands. Captions do not know that place, so to every caption
    the noise is as random as before. But what a sample's noise was, decides where its thing
    stands, with an image in context as without one.
    """
    noise = rng.standard_normal(latents.shape, np.float32)
    free = np.flatnonzero([not captions.says_place(prompt) for prompt in prompts])
    away = np.linalg.norm(latents - np.median(latents, axis=(1, 2), keepdims=True), axis=-1)
    there = _cells(np.float32(away))[free]
    there /= np.linalg.norm(there, axis=1, keepdims=True) + 1e-6
    order = linear_sum_assignment(there @ _cells(noise.mean(-1))[free].T, maximize=True)[1]
    noise[free] = noise[free[order]]
    return noise


def _cells(maps: Float[np.ndarray, "b h w"], side: int = 4) -> Float[np.ndarray, "b n"]:
    """Means over `side` x `side` cells, less the map's own mean."""
    b, h, w = maps.shape
    means = maps.reshape(b, side, h // side, side, w // side).mean((2, 4)).reshape(b, -1)
    return means - means.mean(1, keepdims=True)
