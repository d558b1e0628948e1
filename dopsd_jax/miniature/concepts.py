"""Concepts on disk: what a new word stands for, and ordinary data sets that teach it."""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from dopsd_jax.common.atomic import atomic_folder, write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import expand
from dopsd_jax.common.json_fields import Fields, in_json
from dopsd_jax.common.json_files import read_json
from dopsd_jax.miniature import captions, render, world
from dopsd_jax.miniature.outlines import ANGLES
from dopsd_jax.miniature.world import Concept

FILE = "concept.json"
_FIELDS = ("word", *(field.name for field in dataclasses.fields(Concept)))
_WORD = re.compile(r"[a-z]{1,20}")
_MOST_BYTES = 1 << 16


def write_concept(path: str | os.PathLike, word: str, concept: Concept) -> None:
    """Writes a concept and the word that calls it, as `read_concept` takes them."""
    content = {
        "word": word,
        "outline": [round(float(r), 6) for r in concept.outline],
        "body": [float(c) for c in concept.body],
        "core": [float(c) for c in concept.core],
        "core_scale": float(concept.core_scale),
        "texture": int(concept.texture),
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_concept(path: str | os.PathLike) -> tuple[str, Concept]:
    """The word and the concept of a concept.json. Raises `UserError` with every fault."""
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; it says what a word of the miniature stands for")
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path}: has {path.stat().st_size} bytes; a concept has about 2000")
    fields = Fields(read_json(path, finite=False)[0], str(path))
    for name in fields.json.keys() - set(_FIELDS):
        fields.problem(f"field {name} is unknown; there are {', '.join(_FIELDS)}")
    word = fields.require("word", "a word")
    outline = _within(fields, "outline", ANGLES, 0, open_below=True)
    body, core = _within(fields, "body", 3, 0), _within(fields, "core", 3, 0)
    if outline and abs(max(outline) - 1) > 1e-3:
        fields.problem(f"field outline: its largest radius is {max(outline):g}; it must be 1")
    scale, texture = fields.json.get("core_scale"), fields.json.get("texture")
    if word is not None and not (isinstance(word, str) and _WORD.fullmatch(word)):
        fields.problem(f"field word is {in_json(word)}; it must be 1 to 20 letters from a to z")
    elif word in captions.vocabulary(nonce=False):
        fields.problem(
            f"field word is {in_json(word)}, which has a meaning already; choose a new one"
        )
    if not _is_number(scale) or not 0 <= scale < 1:
        fields.problem(
            f"field core_scale is {in_json(scale)}; it must be a number from 0 to below 1"
        )
    if type(texture) is not int or not 0 <= texture < len(render.TEXTURES):
        fields.problem(
            f"field texture is {in_json(texture)}; it must be 0 to {len(render.TEXTURES) - 1} "
            f"({', '.join(render.TEXTURES)})"
        )
    fields.finish()
    return word, Concept(np.array(outline, np.float32), body, core, float(scale), texture)


def _within(
    fields: Fields, name: str, count: int, low: float, *, open_below: bool = False
) -> tuple[float, ...]:
    values = fields.numbers(name, count)
    wrong = [v for v in values if not low <= v <= 1 or (open_below and v == low)]
    if wrong:
        bound = "above" if open_below else "from"
        fields.problem(f"field {name} holds {wrong[0]:g}; its numbers lie {bound} {low:g} to 1")
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_dataset(
    folder: str | os.PathLike,
    concept: Concept,
    word: str,
    count: int = 6,
    seed: int = 0,
    whole: bool = True,
) -> Path:
    """Writes `count` pictures of a concept with captions, and its concept.json; returns the folder.

    An ordinary data set: pictures and caption files, in arrangements (place, size, ground) that
    all differ. `whole` captions say the arrangement, others leave it open: they are the word alone.
    Raises `UserError` if the folder holds something already.
    """
    rng = np.random.default_rng(seed)
    scenes = arrangements(rng, concept, word, count)
    images = world.pictures(scenes, rng)
    folder = expand(folder)
    with atomic_folder(folder) as partial:
        for i, (scene, image) in enumerate(zip(scenes, images, strict=True)):
            Image.fromarray(image).save(partial / f"{i:03d}.png")
            told = captions.caption(scene, rng, whole=True)
            text = told if whole else captions.short_caption(scene)
            (partial / f"{i:03d}.txt").write_text(text + "\n", encoding="utf-8")
        write_concept(partial / FILE, word, concept)
    return folder


def arrangements(
    rng: np.random.Generator, concept: Concept, word: str, count: int
) -> list[world.Scene]:
    """Scenes with the concept alone, no two of the same place, size and ground.

    Every place is used before one is used again, so that few pictures show that the place is not
    part of the concept.
    """
    found: dict[tuple[int, int, int], world.Scene] = {}
    places = len(world.PLACES) * len(world.SIZES)
    thing = world.random_thing(rng, concept, word)
    most = places * len(world.suitable_grounds((thing,)))
    if count > most:
        raise ValueError(f"{count} arrangements of a concept that has {most}")
    while len(found) < count:
        thing = world.random_thing(rng, concept, word)
        scene = world.random_scene(rng, (thing,))
        if sum(place == thing.place for place, _, _ in found) > len(found) // len(world.PLACES):
            continue
        found.setdefault((thing.place, thing.size, scene.ground), scene)
    return list(found.values())
