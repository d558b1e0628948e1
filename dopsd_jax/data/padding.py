"""Features of unequal length in one array of few possible lengths."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int32


def padded_length(longest: int, multiple: int, maximum: int) -> int:
    """The least multiple of `multiple` that holds `longest`; at most `maximum`.

    With several processes `longest` must be the same on all: take it over the whole data set or
    the whole batch, not over one process's part.

    Examples:
      >>> padded_length(33, multiple=32, maximum=512)
      64
    """
    if not 0 < longest <= maximum:
        raise ValueError(f"length {longest} is not in 1..{maximum}")
    return min(-(-longest // multiple) * multiple, maximum)


def pad_stack(
    features: Sequence[Float[np.ndarray, "_n c"]], length: int
) -> tuple[Float[np.ndarray, "b {length} c"], Int32[np.ndarray, " b"]]:
    """Stacks features of n_i <= length positions with zeros behind; also returns the n_i."""
    lengths = np.array([len(feature) for feature in features], np.int32)
    if lengths.max() > length:
        raise ValueError(f"a feature of {lengths.max()} positions in a length of {length}")
    stacked = np.zeros((len(features), length, features[0].shape[1]), features[0].dtype)
    for place, feature in zip(stacked, features, strict=True):
        place[: len(feature)] = feature
    return stacked, lengths
