"""What the gates try: anything that draws, from prompts, pictures and noise."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

Latents = Float[np.ndarray, "n h w c"]
Pictures = UInt8[np.ndarray, "n s s 3"]


class Artist(NamedTuple):
    """What draws: latents of prompts from noise, with a picture each in context or None.

    shape: of a latent. first: the first clean estimate, from the prompt alone. edited: latents of
    instructions with pictures, the first of which is edited; None: it edits none.
    """

    shape: tuple[int, ...]
    latents: Callable[[Sequence[str], Pictures | None, Latents], Latents]
    first: Callable[[Sequence[str], Latents], Latents]
    encode: Callable[[Pictures], Latents]
    decode: Callable[[Latents], Pictures]
    edited: Callable[[Sequence[str], Sequence[Pictures], Latents], Latents] | None = None
