"""How much one word changes what the untrained student draws, from the same noise. See paper.py.

A word that changes nothing cannot be told from another: what is taught of one, both will mean.
"""

import itertools

import numpy as np
from paper_arms import OPEN, WHOLE, Arm
from paper_run import Bench

from dopsd_jax.miniature.captions import NEW_WORDS
from dopsd_jax.miniature.world import SHAPES

PICTURES = 16
FORMS = {OPEN: "a {}", WHOLE: "a large {} on the left on a white background"}
NOISE = "the same words, other noise"


def run(bench: Bench, arm: Arm, number: int, seed: int) -> dict[str, object]:
    """By form of caption and pair of words: levels of 255 that their pictures differ by."""
    pipe = bench.pipe_of(bench.config(bench.lesson(number).path(OPEN), bench.model_of(arm)))
    return {"words": {form: _differences(pipe, text, seed) for form, text in FORMS.items()}}


def _differences(pipe, text: str, seed: int) -> dict[str, dict[str, float]]:
    """The mean over the pairs of a kind, and the least."""
    drawn = {
        word: pipe([text.format(word)] * PICTURES, seed=seed).astype(float)
        for word in (*NEW_WORDS, *SHAPES)
    }
    apart = lambda a, b: float(np.abs(drawn[a] - drawn[b]).mean())
    turned = [np.abs(x - np.roll(x, 1, axis=0)).mean() for x in drawn.values()]
    found = {
        "two new words": [apart(*pair) for pair in itertools.combinations(NEW_WORDS, 2)],
        "two named shapes": [apart(*pair) for pair in itertools.combinations(SHAPES, 2)],
        "a new word and a shape": [apart(*pair) for pair in itertools.product(NEW_WORDS, SHAPES)],
        NOISE: turned,
    }
    return {kind: {"mean": float(np.mean(own)), "least": float(min(own))}
            for kind, own in found.items()}  # fmt: skip
