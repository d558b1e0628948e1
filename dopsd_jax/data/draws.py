"""Random numbers that a key of integers alone decides, the same in every version of NumPy."""

import numpy as np
from jaxtyping import Int64, UInt64


def random_numbers(count: int, *key: int) -> UInt64[np.ndarray, " n"]:
    """`count` random uint64 for a key of non-negative integers.

    Raw Philox output: NumPy keeps these streams as they are, which it does not promise for its
    distributions and shuffles.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def permutation(count: int, *key: int) -> Int64[np.ndarray, " n"]:
    """An order of 0..count-1."""
    return np.argsort(random_numbers(count, *key), kind="stable")


def shares(count: int, *key: int) -> np.ndarray:
    """`count` random numbers from 0 to below 1."""
    return (random_numbers(count, *key) >> np.uint64(11)) * 2.0**-53
