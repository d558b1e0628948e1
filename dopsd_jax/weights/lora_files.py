"""LoRA files."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LoraModule:
    """The adapter of one linear layer: W + scale * b a; a float32 [rank, in], b float32 [out, rank]."""

    a: np.ndarray
    b: np.ndarray
    scale: float
