"""Whether a picture shows a concept, wherever it stands, however large and on whatever ground.

`judge.iou` asks for the object at the place that a caption names. Here the arrangement is factored
out: the object is found in the picture, the concept is drawn there, and the two are compared. So a
new rendering of the concept has 1 in any arrangement, and what a caption or the noise decides costs
nothing. Only the outline and the colours count.
"""

import dataclasses

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, Int

from dopsd_jax.miniature import judge, render, world
from dopsd_jax.miniature.judge import Images
from dopsd_jax.miniature.render import FINISHES, GROUND, GROUND_TEXTURES, SIDE, Scenes

RANGE = 0.85, 1.15  # radii that are fitted, relative to the world's smallest and largest
# The search for place and radius: shifts in pixels and factors of the radius, coarse to fine.
SHIFTS, FACTORS = (2.0, 1.0, 0.5), (1.08, 1.04, 1.02)
AROUND = ((-1, 0), (1, 0), (0, -1), (0, 1))


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found of one concept a picture.

    identity: IoU of labels (ground, body, core) of the picture and of the concept drawn there.
    0 where nothing is there. scenes: the concepts drawn: arranged as the pictures have them.
    """

    identity: Float[np.ndarray, " n"]
    scenes: Scenes


def find(images: Images, concepts: Scenes) -> Found:
    """Finds the first object of each scene in the picture of the same number.

    Of `concepts` only the object's outline, colours, core and texture are used. Ground and its
    texture, finish, place (anywhere) and radius (over the world's range) are fitted. A further
    thing in the picture, or a strange colour, counts as a part of the object that is wrong.
    """
    backdrop = grounds(images)
    scenes = dataclasses.replace(
        concepts, ground=backdrop.ground, ground_texture=backdrop.ground_texture
    )
    mask, there = things(images, backdrop)
    scenes = _at(scenes, *_placed_on(mask, scenes))
    scenes = _finished(images, scenes)
    labels = judge.label(images, scenes)
    score = _likeness(labels, scenes)
    for shift, factor in zip(SHIFTS, FACTORS, strict=True):
        for x, y, scale in [*((x, y, 1.0) for x, y in AROUND), (0, 0, factor), (0, 0, 1 / factor)]:
            here, step = scenes.objects, np.array([x, y], np.float32) * shift
            tried = _at(scenes, here.centre[:, 0] + step, here.radius[:, 0] * scale)
            found, now = tried.objects, _likeness(labels, tried)
            better = now > score
            score = np.maximum(now, score)
            scenes = _at(
                scenes,
                np.where(better[:, None], found.centre[:, 0], here.centre[:, 0]),
                np.where(better, found.radius[:, 0], here.radius[:, 0]),
            )
    return Found(np.where(there, judge.iou(images, scenes), 0.0), scenes)


def centres(images: Images) -> tuple[Float[np.ndarray, "n 2"], Bool[np.ndarray, " n"]]:
    """The centre of mass of the largest thing of each picture, whatever it is, in pixels from the
    left and from the top; and whether there is anything. Where there is nothing: the middle."""
    masks, there = things(images, grounds(images))
    return np.where(there[:, None], _mass(masks), SIDE / 2), there


def grounds(images: Images) -> Scenes:
    """Scenes without objects on the grounds that the pictures have.

    A ground is the one of the palette that is nearest to the picture's rim, in any light, in the
    texture that is nearest.
    """
    pixels = images.astype(np.float32) / 255
    rim = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    nearest = judge.lit_distance(np.median(rim, axis=1)[:, None], world.GROUND_PALETTE).argmin(1)
    nothing = world.compose([world.Scene((), 0, int(i), 0) for i in nearest], None)
    tried = [
        dataclasses.replace(nothing, ground_texture=np.full(len(nothing), texture, np.int32))
        for texture in range(len(GROUND_TEXTURES))
    ]
    away = [np.median(_from_ground(pixels, one), axis=(1, 2)) for one in tried]
    return dataclasses.replace(nothing, ground_texture=np.argmin(away, axis=0).astype(np.int32))


def things(
    images: Images, backdrop: Scenes
) -> tuple[Bool[np.ndarray, "n s s"], Bool[np.ndarray, " n"]]:
    """The largest connected thing of each picture, and whether it is large enough to be one."""
    apart = _from_ground(images.astype(np.float32) / 255, backdrop) > judge.APART
    masks = np.stack([_largest(one) for one in apart])
    return masks, masks.sum((1, 2)) >= judge.LEAST_PIXELS


def _from_ground(pixels: Float[np.ndarray, "n s s 3"], backdrop: Scenes) -> np.ndarray:
    """Distance of every pixel to the ground behind it."""
    return np.linalg.norm(pixels - render.render(backdrop).astype(np.float32) / 255, axis=-1)


def _largest(mask: Bool[np.ndarray, "s s"]) -> Bool[np.ndarray, "s s"]:
    parts, count = scipy.ndimage.label(mask)
    if count < 2:
        return mask
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax()


def _placed_on(
    masks: Bool[np.ndarray, "n s s"], scenes: Scenes
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
    """Centre and radius with which the objects have the masks' centres of mass and areas."""
    middle, radius = np.full((len(scenes), 2), SIDE / 2, np.float32), np.float32(SIDE / 4)
    drawn = render.labels(_at(scenes, middle, np.full(len(scenes), radius))) != GROUND
    scale = np.sqrt(_area(masks) / _area(drawn))
    return _mass(masks) - (_mass(drawn) - middle) * scale[:, None], radius * scale


def _area(masks: Bool[np.ndarray, "n s s"]) -> Float[np.ndarray, " n"]:
    return np.maximum(masks.sum((1, 2)), 1.0)


def _mass(masks: Bool[np.ndarray, "n s s"]) -> Float[np.ndarray, "n 2"]:
    """The centres of mass."""
    axis = np.arange(SIDE) + 0.5
    return np.stack([masks.sum(1) @ axis, masks.sum(2) @ axis], 1) / _area(masks)[:, None]


def _at(scenes: Scenes, centre: np.ndarray, radius: np.ndarray) -> Scenes:
    """The scenes with the first object there, no smaller or larger than the world has them."""
    low, high = world.RADII.min() * RANGE[0], world.RADII.max() * RANGE[1]
    centre = np.clip(centre, 0, SIDE).astype(np.float32)[:, None]
    radius = np.clip(radius, low, high).astype(np.float32)[:, None]
    return dataclasses.replace(
        scenes, objects=dataclasses.replace(scenes.objects, centre=centre, radius=radius)
    )


def _finished(images: Images, scenes: Scenes) -> Scenes:
    """The scenes in the finish that is most like the pictures."""
    tried = [
        dataclasses.replace(scenes, finish=np.full(len(scenes), finish, np.int32))
        for finish in range(len(FINISHES))
    ]
    score = [_likeness(judge.label(images, one), one) for one in tried]
    return dataclasses.replace(scenes, finish=np.argmax(score, axis=0).astype(np.int32))


def _likeness(labels: np.ndarray, scenes: Scenes) -> Float[np.ndarray, " n"]:
    """IoU of a picture's labels with the drawn geometry: `judge.iou` without drawing colours."""
    return judge.overlap(render.labels(scenes), labels)


def spread(places: Float[np.ndarray, "n 2"]) -> float:
    """Standard deviation of places, in pixels: the root of the sum of both coordinates' variances.

    Over n, so comparable between sets of equal size alone.
    """
    return float(np.sqrt(places.var(0).sum()))


def named_places(places: Float[np.ndarray, "n 2"]) -> Int[np.ndarray, " n"]:
    """The nearest of `world.PLACES`."""
    return np.linalg.norm(places[:, None] - world.CENTRES, axis=-1).argmin(1)
