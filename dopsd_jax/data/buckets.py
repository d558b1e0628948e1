"""Aspect-ratio buckets: the few sizes that pictures are cut to."""

import itertools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from dopsd_jax.common.config_fields import shown
from dopsd_jax.common.errors import UserError, raise_if


class Bucket(NamedTuple):
    """A size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Reference(NamedTuple):
    """A picture that is edited: sha256 of its file, and the size that the model is given."""

    digest: str
    size: Bucket


class Shape(NamedTuple):
    """What rows of one batch have in common: the bucket, and the sizes of their references."""

    bucket: Bucket
    references: tuple[Bucket, ...] = ()

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.references))
        return f"{self.bucket}" + (f" with references {sizes}" if sizes else "")


# Upstream's list for 1024, in its order (width x height).
UPSTREAM_RESOLUTION = 1024
UPSTREAM = tuple(
    Bucket(*size)
    for size in (
        (1024, 1024),
        (1152, 896),
        (896, 1152),
        (1152, 864),
        (864, 1152),
        (1248, 832),
        (832, 1248),
        (1280, 720),
        (720, 1280),
        (1344, 576),
        (576, 1344),
    )
)


def make_buckets(resolution: int, step: int = 16) -> tuple[Bucket, ...]:
    """Upstream's eleven shapes at another resolution.

    Each size is scaled by resolution / 1024 and both sides go to the multiple of `step` below or
    above: of the four results the one closest in aspect ratio whose area is at most resolution².
    Shapes that coincide at small resolutions appear once. At 1024 this is upstream's list.

    Examples:
      >>> [str(bucket) for bucket in make_buckets(512)][:3]
      ['512x512', '576x448', '448x576']
    """
    whole = isinstance(resolution, int) and not isinstance(resolution, bool)
    if not whole or resolution <= 0 or resolution % step:
        raise UserError(
            f"data.resolution {resolution!r} is not a multiple of {step}{_near(resolution, step)}"
        )
    return tuple(dict.fromkeys(_scaled(bucket, resolution, step) for bucket in UPSTREAM))


def _scaled(bucket: Bucket, resolution: int, step: int) -> Bucket:
    sides = [Fraction(side * resolution, UPSTREAM_RESOLUTION * step) for side in bucket]
    choices = itertools.product(*({math.floor(s) or 1, math.ceil(s)} for s in sides))
    fitting = [Bucket(w * step, h * step) for w, h in choices if w * h * step**2 <= resolution**2]
    return min(fitting, key=lambda b: (_aspect_distance(*b, *bucket), -b.width * b.height))


def parse_buckets(sizes: Sequence[object], step: int = 16) -> tuple[Bucket, ...]:
    """An explicit list of sizes, each "832x1248" or (832, 1248), width first."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
        raise UserError('data.buckets must be a list of sizes such as ["1024x1024", "832x1248"]')
    buckets, problems = [], []
    for size in sizes:
        bucket = _parse(size)
        if bucket is None:
            problems.append(f'data.buckets: {shown(size)} is not a size; write it as "832x1248"')
        elif bucket in buckets:
            problems.append(f"data.buckets: {bucket} is there twice; remove one")
        else:
            problems += [
                f"data.buckets: {bucket}: {side} is not a multiple of {step}{_near(side, step)}"
                for side in bucket
                if side <= 0 or side % step
            ]
            buckets.append(bucket)
    raise_if(problems)
    return tuple(buckets)


def _parse(size: object) -> Bucket | None:
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,6})\s*[x*]\s*(\d{1,6})\s*", size)
        return Bucket(int(match[1]), int(match[2])) if match else None
    if isinstance(size, Sequence) and len(size) == 2 and all(type(side) is int for side in size):
        return Bucket(*size)
    return None


def _near(side: object, step: int) -> str:
    if not isinstance(side, int) or side < step:
        return f"; use {step} or more"
    return f"; use {side // step * step} or {(side // step + 1) * step}"


def nearest(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket with the least |ln(width / height) - ln(its aspect)|; the first of equals.

    Examples:
      >>> str(nearest(3024, 4032, make_buckets(1024)))  # a phone's picture, upright
      '864x1152'
    """
    best, (up, down) = buckets[0], (0, 0)
    for bucket in buckets:
        first, second = width * bucket.height, bucket.width * height
        if first < second:
            first, second = second, first
        # e to the distance is first / second; as fractions, so that equals are equal
        if not down or first * down < up * second:
            best, up, down = bucket, first, second
    return best


def nearest_at(width: int, height: int, levels: Sequence[Sequence[Bucket]], level: int) -> Bucket:
    """The nearest bucket of `levels[level]`, if the picture fills it without being enlarged.

    Else that of the next level below which it fills; the lowest is for all pictures.
    """
    for own in reversed(levels[1 : level + 1]):
        bucket = nearest(width, height, own)
        if bucket.width <= width and bucket.height <= height:
            return bucket
    return nearest(width, height, levels[0])


def _aspect_distance(width: int, height: int, to_width: int, to_height: int) -> Fraction:
    """e to the distance of the logarithms: exact, so that equals are equal."""
    first, second = width * to_height, to_width * height
    return Fraction(max(first, second), min(first, second))
