"""The student's features of many prompts: texts of about one length are encoded together."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dopsd_jax.common.errors import UserError
from dopsd_jax.families.base import STUDENT, Features

TEXTS = 8  # at most so many are encoded together


def prompt_features(
    pipe: Any,
    prompts: Sequence[str],
    references: Iterable[UInt8[np.ndarray, "_H _W 3"]] = (),
) -> list[Features]:
    """The features of each prompt by a `families.pipeline.Pipeline`, which imports this.

    references: pictures to edit, the same for all prompts.

    Raises `UserError` for references that the model cannot take.
    """
    references = list(references)
    sizes = [np.shape(picture)[:2] for picture in references]
    for number, size in enumerate(sizes, 1):
        pipe.reference_size(*size, f"reference {number}")
    groups: dict[tuple, list[int]] = {}
    requests = [pipe.request(STUDENT, prompt, sizes=sizes) for prompt in prompts]
    for place, request in enumerate(requests):
        groups.setdefault(request.group, []).append(place)
    found: dict[int, Features] = {}
    most = 1 if references else TEXTS  # pictures take memory: each prompt has them again
    for places in groups.values():
        for first in range(0, len(places), most):
            some = places[first : first + most]
            # Filled up to a power of two: few numbers of texts are compiled.
            filled = some + [some[-1]] * ((1 << (len(some) - 1).bit_length()) - len(some))
            own = [requests[place] for place in filled]
            made = pipe.encode(STUDENT, own, [references] * len(filled))
            found.update(zip(some, made[: len(some)], strict=True))
    return [found[place] for place in range(len(prompts))]


def too_long(prompt: str, count: int, limit: int, picture: int = 0) -> UserError:
    """A prompt makes more tokens than the model takes; `picture`: how many are its picture's."""
    start = prompt if len(prompt) < 60 else f"{prompt[:57]}..."
    share, advice = "", "shorten it"
    if picture:
        share = f", {picture} of them for the picture"
        advice += ", or lower teacher.min_pixels and teacher.max_pixels"
    return UserError(
        f"the prompt {start!r} makes {count} tokens with its template{share}, the model takes "
        f"{limit}; {advice}"
    )
