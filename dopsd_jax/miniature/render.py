"""The renderer: many scenes at once, from outlines to anti-aliased pictures.

Dimension names: n scenes, o objects a scene, k angles of an outline, s side of the picture.
Colours are RGB in [0, 1]; lengths are pixels of a picture of side `SIDE`, y downwards.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from dopsd_jax.miniature.outlines import ANGLES

SIDE = 64
TEXTURES = ("plain", "striped", "dotted", "checked")
FINISHES = ("flat", "outlined", "shaded")
GROUND_TEXTURES = ("plain", "gradient", "lined")

SHADE = 0.62  # a texture's second colour is the body's, so much darker
EDGE_SHADE = 0.3  # and so is the outlined finish's edge
EDGE_WIDTH = 2.0
PERIOD = 7.0  # of textures

GROUND, BODY, CORE = 0, 1, 2  # labels


@dataclasses.dataclass
class Objects:
    """Arrays over scenes and objects; an object of radius 0 is absent.

    A core is a smaller copy of the outline, in a colour of its own or, with `hole`, cut out.
    """

    outline: Float[np.ndarray, "n o k"]
    centre: Float[np.ndarray, "n o 2"]
    radius: Float[np.ndarray, "n o"]
    body: Float[np.ndarray, "n o 3"]
    core: Float[np.ndarray, "n o 3"]
    core_scale: Float[np.ndarray, "n o"]
    hole: Bool[np.ndarray, "n o"]
    texture: Int[np.ndarray, "n o"]


@dataclasses.dataclass
class Scenes:
    """Objects before a ground; one finish for the whole picture."""

    objects: Objects
    finish: Int[np.ndarray, " n"]
    ground: Float[np.ndarray, "n 3"]
    ground_texture: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.finish)

    def __getitem__(self, index) -> "Scenes":
        pick = lambda record: {
            f.name: getattr(record, f.name)[index]
            for f in dataclasses.fields(record)
            if f.name != "objects"
        }
        return Scenes(objects=Objects(**pick(self.objects)), **pick(self))


_AXIS = np.arange(SIDE, dtype=np.float32) + 0.5
_X, _Y = _AXIS[None, :], _AXIS[:, None]


def render(scenes: Scenes) -> UInt8[np.ndarray, "n s s 3"]:
    """The pictures."""
    # A few at a time: the intermediate arrays then stay in the processor's cache.
    few = [_render(scenes[i : i + 16]) for i in range(0, len(scenes), 16)]
    return np.concatenate(few)


def _render(scenes: Scenes) -> UInt8[np.ndarray, "n s s 3"]:
    picture = _ground(scenes)
    for slot in range(scenes.objects.radius.shape[1]):
        there = np.flatnonzero(scenes.objects.radius[:, slot] > 0)
        if len(there):
            picture[there] = _paint(picture[there], scenes[there], slot)
    return np.round(picture * 255).clip(0, 255).astype(np.uint8)


def labels(scenes: Scenes) -> Int[np.ndarray, "n s s"]:
    """What every pixel shows of the first object: GROUND, BODY or CORE."""
    outer, inner, _ = _covers(scenes.objects, 0)
    found = np.where(outer > 0.5, BODY, GROUND)
    hollow = np.where(scenes.objects.hole[:, 0], GROUND, CORE)[:, None, None]
    return np.where(inner > 0.5, hollow, found)


def _ground(scenes: Scenes) -> np.ndarray:
    texture = scenes.ground_texture[:, None, None]
    gradient = np.broadcast_to(1.08 - 0.28 * _Y / SIDE, (SIDE, SIDE))
    lined = 1 - 0.16 * _step(np.sin(2 * np.pi * (_X + _Y) / 11) * 3)
    light = np.where(texture == 1, gradient, np.where(texture == 2, lined, 1.0))
    return scenes.ground[:, None, None] * light[..., None].astype(np.float32)


def _step(distance: np.ndarray) -> np.ndarray:
    """An anti-aliased step: 0 well below zero, 1 well above."""
    return np.clip(distance + 0.5, 0, 1)


def _covers(objects: Objects, slot: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much of every pixel an object covers: whole, core, and whole less its edge."""
    pick = lambda a: a[:, slot, None, None]
    outline, radius = objects.outline[:, slot], np.maximum(pick(objects.radius), 1e-3)
    x, y = _X - pick(objects.centre[..., 0]), _Y - pick(objects.centre[..., 1])
    rho = np.sqrt(x * x + y * y)
    position = np.arctan2(y, x) * np.float32(ANGLES / (2 * np.pi)) % ANGLES
    low = position.astype(np.int32)
    fraction = position - low
    row = np.arange(len(outline))[:, None, None]
    first, second = outline[row, low % ANGLES], outline[row, (low + 1) % ANGLES]
    r = first + fraction * (second - first)
    slope = (second - first) * np.float32(ANGLES / (2 * np.pi))
    steep = 1 / np.sqrt(1 + (slope / r) ** 2)  # radial to perpendicular distance
    outer = (r * radius - rho) * steep
    inner = (r * radius * pick(objects.core_scale) - rho) * steep
    there = pick(objects.core_scale) > 0
    return _step(outer), np.where(there, _step(inner), 0), _step(outer - EDGE_WIDTH)


def _paint(picture: np.ndarray, scenes: Scenes, slot: int) -> np.ndarray:
    objects = scenes.objects
    pick = lambda a: a[:, slot, None, None]
    outer, inner, within = (c[..., None] for c in _covers(objects, slot))
    x, y = _X - pick(objects.centre[..., 0]), _Y - pick(objects.centre[..., 1])

    body = pick(objects.body)
    light = _texture(pick(objects.texture), x, y)
    finish = scenes.finish[:, None, None]
    shaded = 1.14 - 0.42 * np.clip(0.5 + (x + y) / (2.8 * pick(objects.radius)), 0, 1)
    light = light * np.where(finish == 2, shaded, 1)
    paint = body * light[..., None]
    edged = (finish == 1)[..., None] * (1 - within)
    paint = paint + edged * (body * EDGE_SHADE - paint)
    hole = pick(objects.hole)[..., None]
    core = np.where(hole, picture, pick(objects.core))
    paint = paint + inner * (core - paint)
    return (picture + outer * (paint - picture)).clip(0, 1).astype(np.float32)


def _texture(kind: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wave = lambda z: np.sin(2 * np.pi * z / PERIOD)
    dots = (np.hypot((x + 3.5) % PERIOD - 3.5, (y + 3.5) % PERIOD - 3.5) - 1.9) * -1
    bands = [np.zeros_like(y), _step(2 * wave(y)), _step(dots), _step(3 * wave(x) * wave(y))]
    dark = sum((kind == i) * band for i, band in enumerate(bands))
    return 1 - (1 - SHADE) * dark
