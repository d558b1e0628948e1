"""The renderer as a judge: the IoU of a sample with its target, and what the sample shows.

Pictures are uint8 [n, side, side, 3]; distances of colours are Euclidean, channels in [0, 1].
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from dopsd_jax.evaluation.appearance import crispness as crispness
from dopsd_jax.miniature import render, world
from dopsd_jax.miniature.render import GROUND, SIDE, Objects, Scenes

TOLERANCE = 0.30  # colours farther than this from all that a picture should hold are none of them
STRANGE = -1  # the label of such a pixel
APART = 0.20  # a pixel farther than this from the ground belongs to an object
GROUND_LIGHT = np.linspace(0.76, 1.14, 9)  # what ground textures do to the ground's colour
OTHER_SHADE = 0.04  # how much less a shade of a colour counts than the colour: see `_colour`
LEAST_PIXELS = 25
FIT_ROUNDS = 3
LEAST_FIT = 0.6  # IoU below which an object is of no named shape

Images = UInt8[np.ndarray, "n s s 3"]


def iou(images: Images, truth: Scenes) -> Float[np.ndarray, " n"]:
    """Shape-and-colour IoU with the first object of the true scenes.

    The true object's pixels that have the right label, over all pixels that belong to the object
    in either picture; a strange colour belongs to it. The target is labelled by its colours
    too, so its IoU is 1.
    """
    wanted, found = label(render.render(truth), truth), label(images, truth)
    return overlap(wanted, found)


def overlap(
    wanted: Int[np.ndarray, "n s s"], found: Int[np.ndarray, "n s s"]
) -> Float[np.ndarray, " n"]:
    """Pixels with the wanted label, over all pixels that are not ground in either."""
    right = (wanted == found) & (wanted != GROUND)
    either = (wanted != GROUND) | (found != GROUND)
    return right.sum((1, 2)) / np.maximum(either.sum((1, 2)), 1)


def fitted(images: Images, truth: Scenes) -> Scenes:
    """The true scenes with the first object moved and scaled to fit the pictures.

    For samples from captions alone, which leave places and sizes open by `world.PLACE_JITTER` and
    `world.SIZE_JITTER`: the object moves no farther than that from where `truth` has it, and only
    where that raises its IoU.
    """
    best, score = truth, iou(images, truth)
    for _ in range(FIT_ROUNDS):
        tried = _nearer(images, best, truth)
        found = iou(images, tried)
        better = found > score
        score = np.maximum(found, score)
        best = _placed(
            best,
            np.where(better[:, None], tried.objects.centre[:, 0], best.objects.centre[:, 0]),
            np.where(better, tried.objects.radius[:, 0], best.objects.radius[:, 0]),
        )
    return best


def _nearer(images: Images, scenes: Scenes, truth: Scenes) -> Scenes:
    """The scenes with the centre of mass and the area that the pictures' objects have."""
    found = label(images, scenes) != GROUND
    wanted = label(render.render(scenes), scenes) != GROUND
    axis = np.arange(SIDE) + 0.5
    area = lambda mask: np.maximum(mask.sum((1, 2)), 1)
    middle = lambda mask: (
        np.stack([mask.sum(1) @ axis, mask.sum(2) @ axis], 1) / area(mask)[:, None]
    )
    home, size = truth.objects.centre[:, 0], truth.objects.radius[:, 0]
    centre = scenes.objects.centre[:, 0] + middle(found) - middle(wanted)
    radius = scenes.objects.radius[:, 0] * np.sqrt(area(found) / area(wanted))
    return _placed(
        scenes,
        np.clip(centre, home - world.PLACE_JITTER, home + world.PLACE_JITTER),
        np.clip(radius, size * (1 - world.SIZE_JITTER), size * (1 + world.SIZE_JITTER)),
    )


def _placed(scenes: Scenes, centre: np.ndarray, radius: np.ndarray) -> Scenes:
    """The scenes with the first object elsewhere."""
    objects = scenes.objects
    centres, radii = objects.centre.copy(), objects.radius.copy()
    centres[:, 0], radii[:, 0] = centre, radius
    objects = dataclasses.replace(objects, centre=centres, radius=radii)
    return dataclasses.replace(scenes, objects=objects)


def label(images: Images, truth: Scenes) -> Int[np.ndarray, "n s s"]:
    """Each pixel by the nearest colour of the target: GROUND, BODY, CORE or STRANGE.

    A mixture of two colours of the picture, as edges have, is not strange.
    """
    pixels = images.astype(np.float32) / 255
    objects = truth.objects
    empty = dataclasses.replace(objects, radius=np.zeros_like(objects.radius))
    ground = render.render(dataclasses.replace(truth, objects=empty)).astype(np.float32) / 255
    body, core = (c[:, 0, None, None] for c in (objects.body, objects.core))
    cored = ((objects.core_scale[:, 0] > 0) & ~objects.hole[:, 0])[:, None, None]
    away = lambda colour: np.linalg.norm(pixels - colour, axis=-1)
    of_body = np.min([away(body * shade) for shade in _shades(truth)], axis=0)
    of_core = np.where(cored, away(core), np.inf)
    distances = np.stack([away(ground), of_body, of_core])  # in the order of the labels
    colours = [ground, body, np.where(cored[..., None], core, body)]
    mixed = [_to_mixture(pixels, a, b) for a, b in itertools.combinations(colours, 2)]
    strange = np.minimum(distances.min(0), np.min(mixed, axis=0)) > TOLERANCE
    return np.where(strange, STRANGE, distances.argmin(0))


def _shades(truth: Scenes) -> list[np.ndarray]:
    """What textures and finishes do to the body's colour, each [n, 1, 1, 1]."""
    only = lambda there, shade: np.where(there, shade, 1.0)[:, None, None, None]
    return [
        only(truth.objects.texture[:, 0] >= 0, 1.0),
        only(truth.objects.texture[:, 0] > 0, render.SHADE),
        only(truth.finish == 1, render.EDGE_SHADE),
        only(truth.finish == 2, 0.8),
    ]


def _to_mixture(pixels: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the colours between a and b."""
    way = b - a
    share = ((pixels - a) * way).sum(-1) / np.maximum((way * way).sum(-1), 1e-6)
    return np.linalg.norm(pixels - a - share.clip(0, 1)[..., None] * way, axis=-1)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a picture of one object shows: indices into the tables of `world`, -1 for none."""

    shape: int
    colour: int
    size: int
    place: int
    ground: int


def see(images: Images) -> list[Seen]:
    """What each picture of one object shows, judged without its caption."""
    return [_see(image) for image in images.astype(np.float32) / 255]


def _see(image: Float[np.ndarray, "s s 3"]) -> Seen:
    rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    backdrop = np.median(rim, axis=0)
    ground = int(lit_distance(backdrop, world.GROUND_PALETTE).argmin())
    mask = lit_distance(image, backdrop) > APART
    if mask.sum() < LEAST_PIXELS:
        return Seen(-1, -1, -1, -1, ground)
    rows, columns = np.nonzero(mask)
    centre = np.array([columns.mean(), rows.mean()]) + 0.5
    fits, radii = _fits(mask, centre)
    best = int(fits.argmax())
    return Seen(
        shape=best if fits[best] >= LEAST_FIT else -1,
        colour=_colour(image[mask]),
        size=int(np.abs(world.RADII - radii[best]).argmin()),
        place=int(np.linalg.norm(world.CENTRES - centre, axis=1).argmin()),
        ground=ground,
    )


def lit_distance(colours: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Distance to a ground's colour in the best of its lights; broadcasts."""
    lit = ground[..., None, :] * GROUND_LIGHT[:, None]
    return np.linalg.norm(colours[..., None, :] - lit, axis=-1).min(-1)


def _colour(pixels: Float[np.ndarray, "p 3"]) -> int:
    """The named colour that most pixels are nearest to, in its own or its texture's shade."""
    shades = np.array([1.0, 0.85, render.SHADE, render.EDGE_SHADE])
    lit = world.PALETTE * shades[:, None, None]
    away = np.linalg.norm(pixels[:, None, None] - lit, axis=-1)
    away[:, 1:] += OTHER_SHADE  # brown is a dark orange, but more likely brown
    nearest = away.min(1)
    votes = np.bincount(nearest.argmin(1)[nearest.min(1) < TOLERANCE], minlength=len(lit[0]))
    return int(votes.argmax()) if votes.any() else -1


def _fits(mask: Bool[np.ndarray, "s s"], centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU of a mask with every named shape of its area and centre of mass, and their radii."""
    count, radius = len(world.SHAPES), 16.0
    drawn = _drawn(np.full(count, radius), np.full((count, 2), SIDE / 2))
    areas = drawn.sum((1, 2))
    axis = np.arange(SIDE) + 0.5
    offset = np.stack([drawn.sum(1) @ axis, drawn.sum(2) @ axis], 1) / areas[:, None] - SIDE / 2
    scale = np.sqrt(mask.sum() / areas)
    best = np.zeros(count)
    for factor in (0.94, 1.0, 1.06):
        by = scale * factor
        masks = _drawn(radius * by, centre - offset * by[:, None])
        best = np.maximum(best, (masks & mask).sum((1, 2)) / (masks | mask).sum((1, 2)))
    return best, radius * scale


def _drawn(radius: Float[np.ndarray, " k"], centre: Float[np.ndarray, "k 2"]) -> np.ndarray:
    """Masks [k, s, s] of all k named shapes, each at its own radius and place."""
    count = len(world.SHAPES)
    zeros = np.zeros((count, 1, 3), np.float32)
    ring = np.array([name == "ring" for name in world.SHAPES])[:, None]
    objects = Objects(
        outline=world.OUTLINES[:, None],
        centre=centre.astype(np.float32)[:, None],
        radius=radius.astype(np.float32)[:, None],
        body=zeros,
        core=zeros,
        core_scale=np.where(ring, world.RING_HOLE, 0).astype(np.float32),
        hole=ring,
        texture=np.zeros((count, 1), np.int32),
    )
    none = np.zeros(count, np.int32)
    return render.labels(Scenes(objects, none, zeros[:, 0], none)) != GROUND
