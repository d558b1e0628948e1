"""What can be measured of any picture without a network: edges, contrast, composition.

They tell apart the ways in which a tuned model loses its few steps and its memory. Crispness falls
with blur. Contrast falls with haze, which the mean over many possible pictures has and which edges
alone show late. Composition kept falls where the same noise gives another picture than before.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dopsd_jax.evaluation.prompts import ORDINARY
from dopsd_jax.evaluation.scorer import Case, Judge, Picture

EDGE_SHARE = 0.05  # of the pixels: those with the steepest change count as edges
CELLS = 16  # a side: what is smaller than a cell is no composition

CRISPNESS, CONTRAST, COMPOSITION = "crispness", "contrast", "composition kept"


def crispness(images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, " n"]:
    """Mean size of the steepest changes between neighbouring pixels, the edges of a picture.

    Channels in [0, 1]. Blur lowers it and noise raises it, so it is meaningful only together with
    a score of what the pictures show.
    """
    return steepest(images.astype(np.float32) / 255)


def steepest(values: Float[np.ndarray, "n H W c"]) -> Float[np.ndarray, " n"]:
    """The same of pictures in any units, or of latents."""
    down = np.linalg.norm(values[:, 1:, :-1] - values[:, :-1, :-1], axis=-1)
    right = np.linalg.norm(values[:, :-1, 1:] - values[:, :-1, :-1], axis=-1)
    steep = np.sort(np.hypot(down, right).reshape(len(values), -1), axis=1)
    return steep[:, -max(1, round(EDGE_SHARE * steep.shape[1])) :].mean(1)


def contrast(images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, " n"]:
    """Root mean square distance of the pixels to the picture's mean colour, channels in [0, 1].

    Haze lowers it: a picture mixed with a share h of its mean colour has 1 - h of its contrast.
    """
    pixels = images.astype(np.float32) / 255
    away = pixels - pixels.mean((1, 2), keepdims=True)
    return np.sqrt((away**2).sum(-1).mean((1, 2)))


def cells(image: Picture) -> Float[np.ndarray, "k k 3"]:
    """The mean colour of each cell of a grid over a picture of any size, channels in [0, 1]."""
    small = Image.fromarray(image).resize((CELLS, CELLS), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


class OnePicture:
    """A `scorer.Scorer` from a function of equally large pictures."""

    better, kinds, needs = "higher", (), ()

    def __init__(self, name: str, values: Callable[[np.ndarray], np.ndarray]):
        self.name, self.values, self.identity = name, values, f"{name}-1"

    def __call__(self, images: Sequence[Picture], cases: Sequence[Case]) -> list[float]:
        return [float(value) for value in self.values(np.stack(images))]


class CompositionKept:
    """How much of the base's composition a model keeps at equal noise; see `scorer.PairScorer`.

    For prompts without the concept. 1: the base's picture; 0: as far from it as the base's
    pictures from other noise are from each other.

    A distance is the mean distance of colours over the cells of a grid. The base's own, by which
    all are divided, is the mean over prompts, so that a prompt that leaves little open weighs
    little.
    """

    name, better, needs = COMPOSITION, "higher", ()
    identity = "composition-1"
    least = 2

    def __init__(self, kinds: Sequence[str] = (ORDINARY,)):
        self.kinds = tuple(kinds)

    def features(self, images: Sequence[Picture], cases: Sequence[Case]) -> np.ndarray:
        return np.stack([cells(image).ravel() for image in images])

    def compare(
        self, own: Float[np.ndarray, "p s d"], base: Float[np.ndarray, "p s d"]
    ) -> Float[np.ndarray, "p s"]:
        away = lambda a, b: np.linalg.norm((a - b).reshape(*a.shape[:-1], -1, 3), axis=-1).mean(-1)
        others = [np.roll(base, -shift, axis=1) for shift in range(1, base.shape[1])]
        apart = np.mean([away(base, other) for other in others])
        # The base draws one picture whatever the noise: any change is then a whole one.
        return 1 - away(own, base) / max(apart, 1e-6)


def scorers() -> dict[str, Callable[[], Judge]]:
    """Scorers of any pictures by name, in the order of the table."""
    return {
        CRISPNESS: lambda: OnePicture(CRISPNESS, crispness),
        CONTRAST: lambda: OnePicture(CONTRAST, contrast),
        "composition": CompositionKept,
    }
