"""Outlines of the miniature's objects: the radius of a closed curve at every angle.

An outline is `ANGLES` radii at the angles 2 pi k / ANGLES, measured clockwise from the right (y
points downwards), of which the largest is 1. Every shape is one such table, so one program draws
them all. Between two shapes lies a continuum: the concepts, which captions cannot describe.
"""

import numpy as np
from jaxtyping import Float

ANGLES = 128
THETA = 2 * np.pi * np.arange(ANGLES) / ANGLES

# Of a concept's outline.
APART = 0.2  # least distance from every named shape
LEAST_AREA = 0.25  # of the circle around it
LEAST_RADIUS = 0.15  # the centre lies well inside


def polygon(corners: np.ndarray) -> Float[np.ndarray, " k"]:
    """Outline of a polygon; corners are complex numbers in order of angle.

    Where a ray from the origin meets no edge, because the origin lies outside, the radius is 0.
    """
    start, edge = corners, np.roll(corners, -1) - corners
    ray = np.exp(1j * THETA)[:, None]
    cross = lambda a, b: a.real * b.imag - a.imag * b.real
    with np.errstate(divide="ignore", invalid="ignore"):
        along = cross(start, edge) / cross(ray, edge)  # where the ray meets the edge's line
        at = cross(start, ray) / cross(ray, edge)  # where on the edge
    hits = (at > -1e-9) & (at < 1 + 1e-9) & (along > 0)
    return normalized(np.where(hits, along, 0).max(1))


def normalized(radii: np.ndarray) -> Float[np.ndarray, " k"]:
    """The outline scaled so that its largest radius is 1."""
    return (radii / radii.max()).astype(np.float32)


def _regular(count: int, inner: float = 1.0, turn: float = -np.pi / 2) -> np.ndarray:
    steps = count if inner == 1 else 2 * count
    radii = np.where(np.arange(steps) % 2 == 0, 1.0, inner)
    return radii * np.exp(1j * (2 * np.pi * np.arange(steps) / steps + turn))


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    points = (x + 1j * (y - 1)) / 17
    return points[np.argsort(np.angle(points))]


_CROSS = np.array([3 + 1j, 1 + 1j, 1 + 3j, -1 + 3j, -1 + 1j, -3 + 1j]) / 3

# Named shapes. A ring is a circle with a hole, which is the renderer's business.
NAMED = {
    "circle": normalized(np.ones(ANGLES)),
    "square": polygon(_regular(4, turn=-np.pi / 4)),
    "triangle": polygon(_regular(3)),
    "diamond": polygon(np.array([0.62, 1j, -0.62, -1j])),
    "star": polygon(_regular(5, 0.42)),
    "cross": polygon(np.concatenate([_CROSS, -_CROSS])),
    "heart": polygon(_heart()),
    # A petal stands where a star has a gap: turned the other way, the two would look alike.
    "flower": normalized(0.78 + 0.22 * np.cos(5 * (THETA - np.pi / 2))),
    "bar": polygon(np.array([0.36 + 1j, -0.36 + 1j, -0.36 - 1j, 0.36 - 1j])),
    "ring": normalized(np.ones(ANGLES)),
}


_TURNED = np.concatenate([[np.roll(o, k) for k in range(ANGLES)] for o in NAMED.values()])


def concept(rng: np.random.Generator) -> Float[np.ndarray, " k"]:
    """A random outline of one of the families, which no named shape resembles, however turned."""
    while True:
        outline = _FAMILIES[rng.integers(len(_FAMILIES))](rng)
        solid = outline.min() > LEAST_RADIUS and (outline**2).mean() > LEAST_AREA
        if solid and apart(outline, _TURNED).min() > APART:
            return outline


def apart(a: Float[np.ndarray, "*#b k"], b: Float[np.ndarray, "*#b k"]) -> Float[np.ndarray, " *b"]:
    """One minus the IoU of outlines of equal centre and size; broadcasts."""
    return 1 - (np.minimum(a, b) ** 2).sum(-1) / (np.maximum(a, b) ** 2).sum(-1)


def _blob(rng: np.random.Generator) -> np.ndarray:
    orders = np.arange(1, 6)
    size = rng.normal(0, 0.30, 5) / orders**0.5
    phase = rng.uniform(0, 2 * np.pi, 5)
    radii = 1 + (size * np.cos(orders * THETA[:, None] + phase)).sum(1)
    return normalized(np.maximum(radii, 0.25))


def _polygon(rng: np.random.Generator) -> np.ndarray:
    count = int(rng.integers(3, 8))
    angles = 2 * np.pi * (np.arange(count) + rng.uniform(-0.3, 0.3, count)) / count
    corners = rng.uniform(0.4, 1.0, count) * np.exp(1j * (angles + rng.uniform(0, 2 * np.pi)))
    return polygon(corners[np.argsort(np.angle(corners))])


def _star(rng: np.random.Generator) -> np.ndarray:
    points = _regular(int(rng.integers(3, 7)), rng.uniform(0.3, 0.65), rng.uniform(0, 2 * np.pi))
    points = points.real * rng.uniform(0.6, 1.0) + 1j * points.imag
    return polygon(points[np.argsort(np.angle(points))])


_FAMILIES = (_blob, _polygon, _star)
