"""What the miniature FLUX.2-klein learns from: captions, references, edits of pictures.

Dimension names: m pictures, s side of a picture, h w c of a latent, b batch, k cells that are kept.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float

from dopsd_jax.miniature import captions, edits, pool, world
from dopsd_jax.miniature.edits import Edit
from dopsd_jax.miniature.families import Batch, Told

# Of batches, with their weights: captions alone; a reference, of the same thing or to be edited; a
# reference in part; a picture to be edited and one of what is wanted.
KINDS = {"with text": 0.4, "with a reference": 0.3, "with a part": 0.15, "with two": 0.15}
PAIRS = 512  # edits that are drawn and encoded together
KEPT = 24  # cells of a reference that is seen in part: of 64
DEALT = 48  # targets among which noise is dealt out; see `pool.paired_noise`
UNKNOWN = 0.5  # share of edited things that are new concepts
NEW = 0.7  # share of edits with two references that put a new concept in a thing's place
RESULT = 0.2  # share of these whose last reference is the very result


@dataclasses.dataclass(frozen=True)
class Pool:
    """Scenes, and edits with latents of the pictures before and after and of what is wanted.

    The first half of the edits needs no more than the picture before.
    """

    scenes: pool.Pool
    edits: list[Edit]
    before: Float[np.ndarray, "m h w c"]
    after: Float[np.ndarray, "m h w c"]
    last: Float[np.ndarray, "m h w c"]


def make_pool(seed: int, number: int, encode: Callable) -> Pool:
    """Pool `number`; `encode` gives the latents of pictures."""
    rng, drawn = np.random.default_rng([seed, 3, number]), [seed, 4, number]
    known, words = pool.bank(seed), captions.nonce_words()[pool.BANK :]
    asked, last = [], []

    def concept() -> world.Thing:
        word = words[rng.integers(len(words))]
        return world.random_thing(rng, world.random_concept(rng), word)

    for i in range(PAIRS):
        thing = concept() if rng.random() < UNKNOWN else None
        if i >= PAIRS // 2 and rng.random() < NEW:
            one = edits.random_edit(rng, ("thing",), thing, concept())
            shown = one.after
            if rng.random() > RESULT:
                (new,) = one.after.things
                place, size = rng.integers(len(world.PLACES)), rng.integers(len(world.SIZES))
                new = dataclasses.replace(new, place=int(place), size=int(size))
                shown = world.random_scene(rng, (new,))
        else:
            instead = None
            if rng.random() < pool.KNOWN:
                word, learned = known[rng.integers(len(known))]
                instead = world.random_thing(rng, learned, word)
            one = edits.random_edit(rng, edits.KINDS, thing, instead)
            shown = one.after
        asked.append(one)
        last.append(shown)
    series = [one.before for one in asked], [one.after for one in asked], last
    latents = [encode(images) for images in edits.pictures(drawn, *series)]
    return Pool(pool.make_pool(seed, number, encode), asked, *latents)


def batches(
    scenes: Pool, texts: pool.Texts, rng: np.random.Generator, alone: int, shown: int
) -> tuple[Batch, Batch, Batch, Batch]:
    """A batch of each of `KINDS`.

    Noise is dealt out among more targets than are taken: the more there are, the better it tells
    the place.
    """
    own, quarter = scenes.scenes, shown // 4
    first = lambda tree, count: jax.tree.map(lambda a: a[:count], tree)
    text = first(pool.text_batch(own, texts, rng, max(alone, DEALT)), alone)
    index, again, prompts = pool.shown_again(own, texts, rng, max(2 * quarter, DEALT))
    noise = pool.paired_noise(rng, own.latents[index], prompts)
    part = lambda of: _of_same(own, texts, index[of], again[of], prompts[of], noise[of])
    same, less = part(slice(quarter)), part(slice(quarter, 2 * quarter))
    cells = less.latents.shape[1] * less.latents.shape[2]
    kept = np.sort([rng.permutation(cells)[:KEPT] for _ in range(quarter)], axis=1)
    less = less._replace(told=less.told._replace(kept=np.int32(kept)))
    half = PAIRS // 2
    one = _edited(scenes, texts, rng, rng.integers(half, size=quarter), False)
    two = _edited(scenes, texts, rng, rng.integers(half, PAIRS, quarter), True)
    return text, jax.tree.map(lambda *a: np.concatenate(a), same, one), less, two


def _of_same(own: pool.Pool, texts: pool.Texts, index, again, prompts, noise) -> Batch:
    """Things as their reference shows them; guidance leads away from the caption alone."""
    references = (np.float32(own.latents[again]),)
    told = Told(*texts(prompts, image=True), references=references)
    return Batch(own.latents[index], noise, told, Told(*texts(prompts, image=False)))


def _edited(scenes: Pool, texts: pool.Texts, rng, index, result: bool) -> Batch:
    """Edits; guidance leads away from the empty prompt alone."""
    said = f" {edits.LIKE_LAST}" if result else ""
    prompts = [scenes.edits[i].text + said for i in index]
    references = [scenes.before[index], *([scenes.last[index]] if result else [])]
    latents = scenes.after[index]
    noise = rng.standard_normal(latents.shape, np.float32)
    told = Told(*texts(prompts, image=False), references=tuple(map(np.float32, references)))
    return Batch(latents, noise, told, Told(*texts([""] * len(index), image=False)))
