"""What the miniature's architectures give to the training that they share.

Stages, pool, probes and gates know a `Family` alone; what is particular to one is in its room.
Dimension names: b batch, n tokens, p image tokens, s side of a picture, h w c of a latent.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.models.autoencoder import Autoencoder

NAMES = ("zimage", "flux2_klein")


class Told(NamedTuple):
    """What a context is made of: token rows, and what is shown with them.

    images: a picture each, for a vision tower; dropped: the share of its tokens that is left out.
    references: latents; kept: the cells of the last one that are seen, None: all.
    """

    ids: Int[Array, "b n"]
    lengths: Int[Array, " b"]
    images: UInt8[Array, "b s s 3"] | None = None
    dropped: Float[Array, " b"] | None = None
    references: tuple[Float[Array, "b h w c"], ...] = ()
    kept: Int[Array, "b k"] | None = None


class Batch(NamedTuple):
    """Targets with their noise; what the network is told, and what guidance leads away from."""

    latents: Float[Array, "b h w c"]
    noise: Float[Array, "b h w c"]
    told: Told
    away: Told


class Networks(Protocol):
    """What is trained together: a module that its parameters are merged into."""

    def context(self, told: Told, keys: Key[Array, " b"] | None = None) -> Any:
        """What the transformer is given, so far as it depends neither on state nor on time.

        `keys` draw what is left out of a picture; without them it is whole.
        """

    def velocity(
        self, x: Float[Array, "b h w c"], sigma: Float[Array, " b"], context: Any
    ) -> Array:
        """dx/dsigma, in the project's sign."""

    def velocity_and_states(self, x, sigma, context) -> tuple[Array, list[Float[Array, "b p d"]]]:
        """The same, and the image tokens after each layer."""


class Family(Protocol):
    """An architecture of a certain size.

    latent: rows, columns and channels of a latent. grid: the deployed noise levels. kinds: of
    batches, as they are called in the log, with the weight of each. teacher: what the pipeline's
    encoder of the teacher's context is told besides. editor: whether it edits pictures.
    """

    name: str
    latent: tuple[int, int, int]
    grid: tuple[float, ...]
    kinds: dict[str, float]
    teacher: dict[str, Any]
    editor: bool

    def start(self, seed: int) -> nnx.Module:
        """Networks with random weights, initialized so that they learn fast."""

    def abstract(self) -> nnx.Module:
        """The networks without weights, for `optimizer.merge`."""

    def heads(self) -> Parameters:
        """What reads the networks' states while they learn flow matching, see `pretrain`."""

    def unread(self, parameters: Parameters, context: Any, told: Told) -> Float[Array, ""] | None:
        """How much a head of its own cannot read; None: has none for what was told."""

    def places(self) -> Float[Array, "p c"]:
        """What tells the place of each image token."""

    def autoencoder(self) -> Autoencoder:
        """The network, at random."""

    def normalized(self, vae: Autoencoder, seed: int) -> Autoencoder:
        """The same network whose latents have mean 0 and deviation 1 over the world."""

    def write_words(self, folder: Path) -> None:
        """Writes the tokenizer's files."""

    def texts(self, tokenizer: Any) -> Any:
        """Its `pool.Texts`."""

    def scenes(self, seed: int, number: int, encode: Callable) -> Any:
        """The pictures that `batches` draws from."""

    def batches(self, pool: Any, texts: Any, rng: Any, alone: int, shown: int) -> tuple[Batch, ...]:
        """One of each of `kinds`: `alone` captions alone, and `shown` with pictures in all."""

    def told(self, texts: Any, prompts: Sequence[str], images: Any, encode: Callable) -> Told:
        """What its user tells it: prompts, with a picture each in context, or None."""

    def asked_to_edit(
        self, texts: Any, prompts: Sequence[str], images: Sequence[Any], encode: Callable
    ) -> Told:
        """Instructions with the pictures to edit, and behind these others; of an `editor`."""

    def write(self, folder: Path, parameters: Parameters, vae: Autoencoder) -> None:
        """Writes a model folder, which must not exist."""

    def read(self, folder: Path) -> tuple[Parameters, Autoencoder]:
        """What of a model folder can be gone on from: parameters by name, and the autoencoder.

        Raises `UserError`.
        """


def family(name: str) -> Family:
    """The architecture of a name, at the size that is shipped."""
    room = importlib.import_module(f"dopsd_jax.miniature.{name}.family")
    return room.Miniature()
