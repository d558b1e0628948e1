"""The best approximation of a matrix by one of low rank."""

from typing import NamedTuple

import numpy as np

EXACT = 512  # matrices with a side of at most this are decomposed exactly
SPARE = 16  # directions looked for beyond those wanted
ROUNDS = 4  # of subspace iteration


class LowRank(NamedTuple):
    """a [rank, in], b [out, rank], float32; `error`: |matrix - b a| / |matrix|, Frobenius norms."""

    a: np.ndarray
    b: np.ndarray
    error: float


def low_rank(matrix: np.ndarray, rank: int, energy: float = 1.0) -> LowRank:
    """The leading singular vectors, their values shared between both factors.

    matrix: float32 [out, in], not zero. rank: the largest. energy: of the squared norm; no more
    rank is taken than this share needs. The result is the same every time.
    """
    u, values, vt = _leading(matrix, min(rank, *matrix.shape))
    norm = np.linalg.norm(matrix)
    kept = np.cumsum(np.square(values / norm, dtype=np.float64))
    # Rounding must not ask for one more: a share counts as held when it is within 1e-6.
    count = min(int(np.searchsorted(kept, energy - 1e-6)) + 1, len(values))
    root = np.sqrt(values[:count])
    a, b = root[:, None] * vt[:count], u[:, :count] * root
    return LowRank(a, b, float(np.linalg.norm(matrix - b @ a) / norm))


def _leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u [out, rank], singular values [rank], vt [rank, in].

    Large matrices by subspace iteration with random starts (Halko, Martinsson and Tropp,
    arXiv 0909.4061): the whole decomposition would take minutes for each.
    """
    wide = rank + SPARE
    if min(matrix.shape) <= max(EXACT, wide):
        u, values, vt = np.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], values[:rank], vt[:rank]
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], wide), np.float32)
    q = np.linalg.qr(matrix @ start).Q
    for _ in range(ROUNDS):
        q = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ q).Q).Q
    u, values, vt = np.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u[:, :rank], values[:rank], vt[:rank]
