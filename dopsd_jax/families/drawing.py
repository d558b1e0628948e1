"""Pictures in batches of one size, so that a sampler is compiled once for every size of picture.

Several small pictures are drawn together, one at a time of 1024 x 1024; on a mesh that is what
each device draws.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dopsd_jax.families.base import Tree
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.parallel import multihost
from dopsd_jax.parallel.sharding import sample_devices

PIXELS, MOST_TOGETHER = 1 << 20, 8  # of pictures that are drawn together: one at 1024 x 1024
DECODED_PIXELS = 1 << 21  # of pictures that are decoded together: two at 1024 x 1024

T = TypeVar("T")


class Wish(NamedTuple):
    """A picture to draw: its start noise, and its context, with an axis of one sample."""

    noise: Float[Array | np.ndarray, "1 h w c"]
    context: Tree


def together(count: int, pixels: int) -> int:
    """How many of `count` a device draws together: so many that batches are equally full."""
    batches = -(-count // min(MOST_TOGETHER, max(1, PIXELS // pixels)))
    return -(-count // batches)


def filled(items: Sequence[T], size: int) -> Iterator[tuple[list[T], int]]:
    """Batches of `size`, the last filled up by repetition, and how many of each are asked for."""
    for first in range(0, len(items), size):
        some = list(items[first : first + size])
        yield some + [some[-1]] * (size - len(some)), len(some)


def decoded(
    pipe: Pipeline, latents: Float[np.ndarray, "n h w c"], size: int
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """The pictures of latents; at most `size`, and fewer large ones, are decoded together."""
    pixels = latents.shape[1] * latents.shape[2] * pipe.vae_config.factor**2
    for some, count in filled(latents, max(1, min(size, DECODED_PIXELS // pixels))):
        yield from pipe.decode(np.stack(some))[:count]


def draw(
    pipe: Pipeline, trained: nnx.State, wishes: Sequence[Wish]
) -> list[UInt8[np.ndarray, "_H _W 3"]]:
    """The pictures of the wishes by the deployed sampler, in their order. Every process calls it.

    trained: the trained part of the transformer. Wishes of one shape make batches.
    """
    alike: dict[tuple, list[int]] = {}
    for number, wish in enumerate(wishes):
        leaves, structure = jax.tree.flatten(wish)
        kind = structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
        alike.setdefault(kind, []).append(number)
    found, devices = {}, sample_devices(pipe.mesh)
    for numbers in alike.values():
        shape = wishes[numbers[0]].noise.shape[1:]
        grid = pipe.deployed_grid(shape)
        pixels = shape[0] * shape[1] * pipe.vae_config.factor**2
        alone = together(len(numbers), pixels)  # what one device decodes
        size = devices * together(-(-len(numbers) // devices), pixels)
        for some, count in filled(numbers, size):
            noise, context = jax.tree.map(
                lambda *leaves: np.concatenate(leaves), *(wishes[number] for number in some)
            )
            latents = multihost.to_host(pipe.sample(trained, noise, context, grid))
            found.update(zip(some[:count], decoded(pipe, latents[:count], alone), strict=True))
    return [found[number] for number in range(len(wishes))]
