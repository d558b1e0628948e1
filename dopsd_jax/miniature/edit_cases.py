"""Prompts for the scores of an editor, with the pictures that are edited.

Of the kinds of `world_scorers`: `concept`, the new word's object takes a thing's place; `ordinary`,
any edit of a named thing; `other`, the edits of `concept` with another new word.
"""

import dataclasses

import numpy as np

from dopsd_jax.evaluation.scorer import Case, digest
from dopsd_jax.evaluation.seeds import case_seed
from dopsd_jax.miniature import edits, world
from dopsd_jax.miniature.render import SIDE
from dopsd_jax.miniature.world import Concept
from dopsd_jax.miniature.world_scorers import CONCEPT, ORDINARY, OTHER, other_words

KINDS = CONCEPT, ORDINARY, OTHER


def cases(
    concept: Concept,
    word: str,
    *,
    concepts: int,
    ordinary: int,
    others: int = 0,
    seed: int = 0,
    first_seed: int = 30,
) -> list[Case]:
    """One seed gives the same ones; no data set of `edits.write_pairs` has them.

    concepts, ordinary, others: how many of each kind; `others` at most as many as `concepts`.
    first_seed: of the noise. The target is the wanted picture; `other` has none.
    """
    rng = np.random.default_rng([seed, 2028])
    new = [
        edits.random_edit(rng, ("thing",), instead=world.random_thing(rng, concept, word))
        for _ in range(concepts)
    ]
    asked = [(CONCEPT, one) for one in new]
    asked += [(ORDINARY, edits.random_edit(rng)) for _ in range(ordinary)]
    for own, instead in zip(new, other_words(word, others), strict=False):
        (thing,) = own.after.things
        text = edits.in_its_place(dataclasses.replace(thing, word=instead), rng)
        asked.append((OTHER, own._replace(text=text)))
    every = [one for _, one in asked]
    drawn = edits.pictures([seed, 2029], [e.before for e in every], [e.after for e in every])
    found = []
    for number, ((kind, one), before, after) in enumerate(zip(asked, *drawn, strict=True)):
        noise, target = case_seed(first_seed, number), None if kind == OTHER else after
        shown = {"target": target, "references": (before,)}
        known = {"truth": one.after, "truth_digest": digest(after)}
        found.append(Case(kind, one.text, one.text, SIDE, SIDE, noise, **shown, **known))
    return found
