"""What the miniature's pictures show: scenes with attributes that words name, and concepts.

A scene has one or two objects. An object is a named shape, or a concept: an outline, a pair of
colours and a core that words cannot describe, named by an invented word. Everything depends on a
generator's state alone.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from dopsd_jax.miniature import outlines, render
from dopsd_jax.miniature.outlines import ANGLES
from dopsd_jax.miniature.render import SIDE, Objects, Scenes

SHAPES = tuple(outlines.NAMED)
COLOURS = {
    "red": (0.84, 0.12, 0.14),
    "orange": (0.96, 0.55, 0.10),
    "yellow": (0.97, 0.86, 0.16),
    "green": (0.13, 0.62, 0.25),
    "blue": (0.13, 0.33, 0.85),
    "purple": (0.52, 0.17, 0.68),
    "pink": (0.97, 0.50, 0.72),
    "brown": (0.47, 0.28, 0.13),
    "black": (0.08, 0.08, 0.10),
    "cyan": (0.15, 0.78, 0.84),
}
GROUNDS = {
    "white": (0.92, 0.92, 0.90),
    "grey": (0.56, 0.58, 0.60),
    "cream": (0.90, 0.83, 0.64),
    "sky": (0.62, 0.80, 0.92),
    "navy": (0.09, 0.13, 0.30),
    "moss": (0.28, 0.36, 0.20),
}
SIZES = {"small": 10.5, "large": 14.4}  # radius in pixels
# Whole patches of a transformer apart (8 pixels): a shape is then the same patches at every place,
# which a small network learns many times sooner than one that lies differently in each.
PLACES = {
    "middle": (0.50, 0.50),
    "left": (0.25, 0.50),
    "right": (0.75, 0.50),
    "top": (0.50, 0.25),
    "bottom": (0.50, 0.75),
}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

PLAIN = 0.75  # share of objects, of finishes and of grounds without a texture
PAIRS = 0.15  # share of random scenes with two things
CONTRAST = 0.38  # least RGB distance of colours that touch
DARK = 0.2  # bodies of which no channel is lighter are plain and flat
PLACE_JITTER = 0.5  # pixels
SIZE_JITTER = 0.02
RING_HOLE = 0.52  # of the ring's radius


@dataclasses.dataclass(frozen=True)
class Concept:
    """What a new word stands for."""

    outline: Float[np.ndarray, " k"]
    body: tuple[float, float, float]
    core: tuple[float, float, float]
    core_scale: float
    texture: int


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object in words: indices into the tables; shape -1 is a concept, called `word`."""

    shape: int
    colour: int
    size: int
    place: int
    texture: int
    word: str = ""
    concept: Concept | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture in words."""

    things: tuple[Thing, ...]
    finish: int
    ground: int
    ground_texture: int


def _table(values: dict) -> np.ndarray:
    return np.array(list(values.values()), np.float32)


# The same as arrays, in the order of the names.
PALETTE, GROUND_PALETTE = _table(COLOURS), _table(GROUNDS)
RADII, CENTRES = _table(SIZES), _table(PLACES) * SIDE
OUTLINES = _table(outlines.NAMED)


def distance(a, b) -> float:
    """Distance of two colours."""
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)))


def random_concept(rng: np.random.Generator) -> Concept:
    """A concept; its two colours are unlike each other, its body unlike at least four grounds."""
    while True:
        body, core = _vivid(rng), _vivid(rng)
        clear = sum(distance(body, g) > CONTRAST for g in GROUND_PALETTE)
        if distance(body, core) > 1.3 * CONTRAST and clear >= 4:
            break
    texture = 0 if rng.random() < 0.7 else int(rng.integers(1, len(render.TEXTURES)))
    scale = 0.0 if rng.random() < 0.15 else float(rng.uniform(0.38, 0.6))
    return Concept(outlines.concept(rng), body, core, scale, texture)


def _vivid(rng: np.random.Generator) -> tuple[float, float, float]:
    hue, value, grey = rng.uniform(0, 6), rng.uniform(0.55, 1.0), rng.uniform(0, 0.35)
    rgb = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return tuple(float(c) for c in value * (grey + (1 - grey) * rgb))


def random_thing(rng: np.random.Generator, concept: Concept | None = None, word: str = "") -> Thing:
    """An object with random attributes."""
    plain = rng.random() < PLAIN
    thing = Thing(
        shape=int(rng.integers(len(SHAPES))) if concept is None else -1,
        colour=int(rng.integers(len(COLOURS))),
        size=int(rng.random() < 0.65),
        place=int(rng.integers(len(PLACES))),
        texture=0 if plain else int(rng.integers(1, len(render.TEXTURES))),
        word=word,
        concept=concept,
    )
    return dataclasses.replace(thing, texture=0) if _dark(thing) else thing


def random_scene(rng: np.random.Generator, things: tuple[Thing, ...] | None = None) -> Scene:
    """A scene around the given things, or around one or two random ones.

    Raises ValueError if no ground is unlike all of the given things.
    """
    if things is None:
        things = random_pair(rng) if rng.random() < PAIRS else (random_thing(rng),)
    grounds = suitable_grounds(things)
    if not grounds:
        raise ValueError("no ground is unlike all of these things")
    flat = rng.random() < PLAIN or any(_dark(t) for t in things)
    return Scene(
        things=things,
        finish=0 if flat else int(rng.integers(1, len(render.FINISHES))),
        ground=grounds[rng.integers(len(grounds))],
        ground_texture=0 if rng.random() < PLAIN else int(rng.integers(1, 3)),
    )


def random_pair(rng: np.random.Generator) -> tuple[Thing, Thing]:
    """Two small random things on opposite sides, which one ground suits."""
    while True:
        side = list(OPPOSITE)[rng.integers(len(OPPOSITE))]
        first, second = (
            dataclasses.replace(random_thing(rng), size=0, place=list(PLACES).index(place))
            for place in (side, OPPOSITE[side])
        )
        if suitable_grounds((first, second)):
            return first, second


def suitable_grounds(things: tuple[Thing, ...]) -> list[int]:
    """Indices of the grounds from which all the things stand out."""
    return [
        i
        for i, ground in enumerate(GROUND_PALETTE)
        if all(distance(body_colour(t), ground) > CONTRAST for t in things)
    ]


def _dark(thing: Thing) -> bool:
    """Whether textures and finishes, which darken, would not be seen on an object."""
    return bool(max(body_colour(thing)) < DARK)


def body_colour(thing: Thing) -> np.ndarray:
    """RGB of an object's body."""
    return PALETTE[thing.colour] if thing.concept is None else np.array(thing.concept.body)


def compose(scenes: list[Scene], rng: np.random.Generator | None) -> Scenes:
    """The scenes as the renderer takes them; places and sizes vary a little if `rng` is given."""
    n, slots = len(scenes), max(len(s.things) for s in scenes)
    objects = Objects(
        outline=np.ones((n, slots, ANGLES), np.float32),
        centre=np.zeros((n, slots, 2), np.float32),
        radius=np.zeros((n, slots), np.float32),
        body=np.zeros((n, slots, 3), np.float32),
        core=np.zeros((n, slots, 3), np.float32),
        core_scale=np.zeros((n, slots), np.float32),
        hole=np.zeros((n, slots), bool),
        texture=np.zeros((n, slots), np.int32),
    )
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.things):
            _place(objects, (i, j), thing)
    if rng is not None:
        shift = rng.uniform(-PLACE_JITTER, PLACE_JITTER, objects.centre.shape)
        scale = 1 + rng.uniform(-SIZE_JITTER, SIZE_JITTER, objects.radius.shape)
        objects.centre += shift.astype(np.float32)
        objects.radius *= scale.astype(np.float32)
    column = lambda name: np.array([getattr(s, name) for s in scenes], np.int32)
    return Scenes(
        objects, column("finish"), GROUND_PALETTE[column("ground")], column("ground_texture")
    )


def _place(objects: Objects, at: tuple[int, int], thing: Thing) -> None:
    objects.centre[at] = CENTRES[thing.place]
    objects.radius[at] = RADII[thing.size]
    concept = thing.concept
    if concept is not None:
        objects.outline[at], objects.body[at], objects.core[at] = (
            concept.outline,
            concept.body,
            concept.core,
        )
        objects.core_scale[at], objects.texture[at] = concept.core_scale, concept.texture
        return
    objects.outline[at], objects.body[at] = OUTLINES[thing.shape], PALETTE[thing.colour]
    objects.texture[at] = thing.texture
    if SHAPES[thing.shape] == "ring":
        objects.core_scale[at], objects.hole[at] = RING_HOLE, True


def pictures(
    scenes: list[Scene], rng: np.random.Generator | None = None
) -> UInt8[np.ndarray, "n s s 3"]:
    """Pictures of scenes; places and sizes vary a little if `rng` is given."""
    return render.render(compose(scenes, rng))
