"""Texts, and texts with images, through the encoders: in batches of one shape, on many devices.

Hidden state -2 of the text encoder, at each text's own tokens.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from dopsd_jax.families.texts import hidden_states, spread
from dopsd_jax.models import qwen3, qwen3_vl

TOKEN_MULTIPLE = 32  # texts are padded to it, so that few lengths are compiled


def padded_tokens(count: int) -> int:
    """What a text of `count` tokens is padded to."""
    return -(-count // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def texts(
    encoder: qwen3.Qwen3, ids: Sequence[Sequence[int]], dtype, mesh: Mesh | None = None
) -> list[Float[np.ndarray, "_n c"]]:
    """The features of texts whose `padded_tokens` are the same.

    `mesh`: the encoder is whole on each of its devices, and each takes an equal share of the texts.
    """
    padded, lengths = _pad(ids)
    return _unpad(hidden_states(encoder, padded, lengths, (-2,), dtype, mesh), ids)


def image_texts(
    vision: qwen3_vl.Qwen3VLVision,
    language: qwen3.Qwen3,
    cfg: qwen3_vl.Qwen3VLConfig,
    ids: Sequence[Sequence[int]],
    patches: Sequence[Float[np.ndarray, "p d"]],
    grid: tuple[int, int],
    dtype,
    mesh: Mesh | None = None,
) -> list[Float[np.ndarray, "_n c"]]:
    """The same for texts with an image each; all images have the same `grid`."""
    padded, lengths = _pad(ids)
    found = _encode_image_text(
        vision, language, cfg, padded, lengths, np.stack(patches), grid, dtype, mesh
    )
    return _unpad(found, ids)


def _pad(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    rows = padded_tokens(len(ids[0]))
    padded = [np.pad(np.asarray(own, np.int32), (0, rows - len(own))) for own in ids]
    return np.stack(padded), np.array([len(own) for own in ids])


def _unpad(features, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    found = np.asarray(features)
    return [own[: len(tokens)] for own, tokens in zip(found, ids, strict=True)]


@functools.partial(jax.jit, static_argnames=("cfg", "grid", "dtype", "mesh"))
def _encode_image_text(vision, language, cfg, ids, lengths, patches, grid, dtype, mesh):
    def run(encoders, ids, lengths, patches):
        return qwen3_vl.encode(
            *encoders, cfg, ids, lengths, patches, grid, hidden=(-2,), dtype=dtype
        )[0]

    return spread(run, mesh, (vision, language))(ids, lengths, patches)
