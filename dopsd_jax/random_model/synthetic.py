"""A small data set that needs no download: simple pictures with captions.

Every picture is one shape of one colour on a background, drawn from signed distances, and follows
from (seed, number) alone.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dopsd_jax.common.atomic import partial_of, remove_leftovers
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import expand
from dopsd_jax.data.sources.files import IMAGE_SUFFIXES

SIZES = ((256, 256), (288, 224), (224, 288), (304, 208))  # width, height

COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 147, 43),
    "yellow": (246, 209, 60),
    "green": (39, 157, 85),
    "blue": (43, 95, 206),
    "purple": (127, 63, 178),
    "pink": (240, 120, 170),
    "black": (35, 35, 40),
}
GROUNDS = {
    "white": (246, 246, 242),
    "grey": (150, 154, 160),
    "sky blue": (164, 208, 240),
    "cream": (246, 230, 196),
    "dark green": (28, 66, 52),
    "navy": (26, 34, 72),
}
TOO_CLOSE = {("black", "navy"), ("black", "dark green"), ("blue", "navy"), ("purple", "navy")}
STYLES = ("plain", "shaded", "striped")
PLACES = {
    "in the middle": (0.0, 0.0),
    "on the left": (-0.5, 0.0),
    "on the right": (0.5, 0.0),
    "at the top": (0.0, -0.5),
    "at the bottom": (0.0, 0.5),
}
RADII = {"small": 0.27, "large": 0.46}


def _polygon(points: np.ndarray, corners: Sequence[complex]) -> np.ndarray:
    """Signed distance of `points` to a closed polygon, negative inside."""
    distance = np.full(points.shape, np.inf)
    inside = np.zeros(points.shape, bool)
    for start, end in zip(corners, [*corners[1:], corners[0]], strict=True):
        edge, offset = end - start, points - start
        along = np.clip((offset * np.conj(edge)).real / abs(edge) ** 2, 0, 1)
        distance = np.minimum(distance, np.abs(offset - along * edge))
        crosses = (start.imag > points.imag) != (end.imag > points.imag)
        if edge.imag:
            at = start.real + (points.imag - start.imag) * edge.real / edge.imag
            inside ^= crosses & (points.real < at)
    return np.where(inside, -distance, distance)


def _regular(count: int, inner: float = 1.0) -> list[complex]:
    """Corners of a star, or of a regular polygon with `inner` 1; the first corner is on top."""
    steps = count if inner == 1 else 2 * count
    radii = [1.0 if inner == 1 or i % 2 == 0 else inner for i in range(steps)]
    return [r * np.exp(1j * (2 * np.pi * i / steps - np.pi / 2)) for i, r in enumerate(radii)]


_CROSS = [
    complex(x, y) for x, y in ((-1, 3), (1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3))
] + [complex(x, y) for x, y in ((-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1))]

# Signed distances in units of the radius; x + iy with y downwards.
SHAPES = {
    "circle": lambda p: np.abs(p) - 1,
    "ring": lambda p: np.abs(np.abs(p) - 0.75) - 0.25,
    "square": lambda p: _polygon(
        p, [0.9 * (-1 - 1j), 0.9 * (1 - 1j), 0.9 * (1 + 1j), 0.9 * (-1 + 1j)]
    ),
    "triangle": lambda p: _polygon(p, _regular(3)),
    "hexagon": lambda p: _polygon(p, _regular(6)),
    "star": lambda p: _polygon(p, _regular(5, 0.42)),
    "cross": lambda p: _polygon(p, [corner / 3 for corner in _CROSS]),
    "crescent": lambda p: np.maximum(np.abs(p) - 1, 0.85 - np.abs(p - (0.5 - 0.15j))),
}


def draw(
    seed: int, number: int, width: int, height: int
) -> tuple[UInt8[np.ndarray, "{height} {width} 3"], str]:
    """Picture `number` of a seed, and its caption."""
    choose = np.random.Philox(np.random.SeedSequence((seed, number))).random_raw
    pairs = [(c, g) for c in COLOURS for g in GROUNDS if (c, g) not in TOO_CLOSE]
    raw = [int(value) for value in choose(4)]
    # The shape changes with the number, so that a few pictures show different ones.
    shape = list(SHAPES)[(seed + number) % len(SHAPES)]
    colour, ground = pairs[raw[0] % len(pairs)]
    style = STYLES[raw[1] % len(STYLES)]
    place = list(PLACES)[raw[2] % len(PLACES)]
    size = list(RADII)[raw[3] % len(RADII)]

    short = min(width, height)
    x = (np.arange(width) + 0.5 - width / 2) / (short / 2)
    y = (np.arange(height) + 0.5 - height / 2) / (short / 2)
    points = x[None, :] + 1j * y[:, None]
    radius = RADII[size]
    centre = complex(PLACES[place][0] * width / short, PLACES[place][1] * height / short)
    distance = SHAPES[shape]((points - centre) / radius) * radius * short / 2  # in pixels
    cover = np.clip(0.5 - distance, 0, 1)[..., None]

    picture = _ground(GROUNDS[ground], style, points)
    picture = picture + cover * (np.array(COLOURS[colour], float) - picture)
    adjective = "" if style == "plain" else f"{style} "
    caption = f"a {size} {colour} {shape} {place} on a {adjective}{ground} background"
    return np.round(picture).astype(np.uint8), caption


def _ground(
    colour: tuple[int, int, int], style: str, points: np.ndarray
) -> Float[np.ndarray, "h w 3"]:
    base = np.array(colour, float)
    if style == "shaded":
        light = 1.08 - 0.25 * (points.imag - points.imag.min()) / np.ptp(points.imag)
    elif style == "striped":
        light = 0.93 + 0.07 * np.clip(6 * np.sin(10 * (points.real + points.imag)), -1, 1)
    else:
        light = np.ones(points.shape)
    return np.clip(base * light[..., None], 0, 255)


def write_folder(
    directory: str | Path,
    count: int = 8,
    seed: int = 0,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> Path:
    """Writes `count` pictures and their captions as an ordinary folder; returns the folder.

    Sizes (width, height) are used in turn. A folder that has these files already is left as it is;
    one that holds other pictures is refused.
    """
    directory = expand(directory)
    files: dict[str, bytes] = {}
    for number in range(count):
        picture, caption = draw(seed, number, *sizes[number % len(sizes)])
        content = io.BytesIO()
        Image.fromarray(picture).save(content, "PNG")
        files[f"{number:03d}.png"] = content.getvalue()
        files[f"{number:03d}.txt"] = f"{caption}\n".encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        known = (*IMAGE_SUFFIXES, ".txt")
        foreign = [
            path.name
            for path in sorted(directory.iterdir())
            if path.suffix.lower() in known and path.name not in files
        ]
        if foreign:
            raise UserError(
                f"{directory}: holds other pictures or captions ({foreign[0]}); choose an empty "
                "folder for the drawn example"
            )
        remove_leftovers(directory)
        for name, content in files.items():
            place = directory / name
            if not place.exists() or place.read_bytes() != content:
                temporary = partial_of(place)
                temporary.write_bytes(content)
                os.replace(temporary, place)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error
    return directory
