"""Edits of a picture with one thing: what the instruction names changes, all else stays."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dopsd_jax.common.atomic import atomic_folder
from dopsd_jax.common.files import expand
from dopsd_jax.miniature import captions, concepts, world
from dopsd_jax.miniature.world import Concept, Scene, Thing

KINDS = ("ground", "place", "size", "thing")
AS_SHOWN = "as shown"  # behind a caption: of the thing that the reference shows
LIKE_LAST = "like the last"  # behind an instruction: the last reference shows what is wanted
CONCEPT = "edited_concept.json"  # as concept.json, of pictures that are edited
_SAME = ("the same", "the same thing")
_SIZES = {"small": "smaller", "large": "larger"}
_INSTEAD = "in its place"


class Edit(NamedTuple):
    """A picture, the instruction, and the picture that is wanted."""

    before: Scene
    text: str
    after: Scene


def vocabulary() -> list[str]:
    """Every word of instructions that is none of captions."""
    said = " ".join([*_SAME, *_SIZES.values(), _INSTEAD, AS_SHOWN, LIKE_LAST]).split()
    return [word for word in dict.fromkeys(said) if word not in captions.vocabulary()]


def edit(
    rng: np.random.Generator, before: Scene, kind: str, instead: Thing | None = None
) -> Edit | None:
    """A random edit of a kind; None where the scene has none.

    instead: what takes the thing's place, in an edit of kind `thing`; None: a random named shape.
    """
    (thing,), other = before.things, lambda count, own: int((own + rng.integers(1, count)) % count)
    pick = lambda texts: texts[rng.integers(len(texts))]
    if kind == "ground":
        grounds = [g for g in world.suitable_grounds((thing,)) if g != before.ground]
        if not grounds:
            return None
        ground = int(pick(grounds))
        said = captions.ground_words(ground, rng)
        after = dataclasses.replace(before, ground=ground)
        return Edit(before, captions.with_articles(f"{pick(_SAME)} {said}"), after)
    if kind == "place":
        place = other(len(world.PLACES), thing.place)
        said = captions.place_words(place, rng)
        return Edit(before, f"{pick(_SAME)} {said}", _with(before, place=place))
    if kind == "size":
        size = other(len(world.SIZES), thing.size)
        said = _SIZES[list(world.SIZES)[size]]
        return Edit(before, f"{pick(_SAME)}, {said}", _with(before, size=size))
    new = world.random_thing(rng) if instead is None else instead
    dark = max(world.body_colour(new)) < world.DARK
    if before.ground not in world.suitable_grounds((new,)) or (dark and before.finish):
        return None
    new = dataclasses.replace(new, place=thing.place, size=thing.size)
    return Edit(before, in_its_place(new, rng), dataclasses.replace(before, things=(new,)))


def in_its_place(thing: Thing, rng: np.random.Generator) -> str:
    """The instruction that puts a thing where another one stands."""
    return captions.with_articles(f"a {captions.noun(thing, rng)} {_INSTEAD}")


def _with(scene: Scene, **changes: int) -> Scene:
    (thing,) = scene.things
    return dataclasses.replace(scene, things=(dataclasses.replace(thing, **changes),))


def random_edit(
    rng: np.random.Generator,
    kinds: Sequence[str] = KINDS,
    thing: Thing | None = None,
    instead: Thing | None = None,
) -> Edit:
    """A random edit of a random scene; `thing`: what stands there before."""
    while True:
        there = world.random_thing(rng) if thing is None else thing
        before = world.random_scene(rng, (there,))
        found = edit(rng, before, kinds[rng.integers(len(kinds))], instead)
        if found is not None:
            return found


def instructions(count: int, seed: int = 0) -> list[str]:
    """Different instructions of random edits, which say nothing of the picture that is edited."""
    rng, found = np.random.default_rng([seed, 10]), {}
    while len(found) < count:
        found[random_edit(rng).text] = None
    return list(found)


def pictures(seed: Sequence[int], *series: Sequence[Scene]) -> list[UInt8[np.ndarray, "n s s 3"]]:
    """Pictures of each series; what varies a little is the same in the k-th scene of each."""
    return [world.pictures(list(scenes), np.random.default_rng(seed)) for scenes in series]


def write_pairs(
    folder: str | os.PathLike, concept: Concept, word: str, count: int = 12, seed: int = 0
) -> Path:
    """Writes a data set that teaches the editor a word; returns the folder.

    before/: pictures of named things. after/: the same with the concept in their places, a text
    file with the instruction beside each, and the concept in the file `CONCEPT`. Raises `UserError`
    if the folder holds something already.
    """
    rng = np.random.default_rng([seed, 8])
    thing = lambda: world.random_thing(rng, concept, word)
    found = [random_edit(rng, ("thing",), instead=thing()) for _ in range(count)]
    drawn = pictures([seed, 9], [e.before for e in found], [e.after for e in found])
    folder = expand(folder)
    with atomic_folder(folder) as partial:
        for name, images in zip(("before", "after"), drawn, strict=True):
            (partial / name).mkdir()
            for i, image in enumerate(images):
                Image.fromarray(image).save(partial / name / f"{i:03d}.png")
        for i, one in enumerate(found):
            (partial / "after" / f"{i:03d}.txt").write_text(one.text + "\n", encoding="utf-8")
        concepts.write_concept(partial / "after" / CONCEPT, word, concept)
    return folder
