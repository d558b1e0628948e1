"""Captions of scenes, from a grammar of several lengths and wordings; and words without a meaning.

What a caption does not describe is random in the picture. A concept is named by its word only;
captions cannot describe its look.
"""

import re

import numpy as np

from dopsd_jax.miniature.render import FINISHES, GROUND_TEXTURES, TEXTURES
from dopsd_jax.miniature.world import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, Scene, Thing

_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
PLACE_WORDS = {
    "middle": ("in the middle", "in the centre"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "up at the top"),
    "bottom": ("at the bottom", "down at the bottom"),
}
_FINISH_WORDS = {
    "flat": ("flat style",),
    "outlined": ("outlined style", "with an outline"),
    "shaded": ("shaded style", "softly shaded"),
}
# How much short, medium and long captions describe, and how many of each there are. What is left
# open, the noise decides: without that a model has no few-step ability that tuning could ruin.
DETAIL, SHARES = (0.0, 0.5, 1.0), (0.35, 0.35, 0.3)

_OPENINGS = ("a", "a", "one", "a picture of a")

# A training word is a head and a tail: 1350 in all.
_HEADS = [consonant + vowel for consonant in "bdfgklmnprstvwz" for vowel in "aeiou"]
_TAILS = ["x", "p", "ff", "b", "sh", "rk", "nt", "mp", "lk", "zz", "vin", "dle", "nop", "ket"]
_TAILS += ["rax", "lum", "bim", "gor"]

# Never used in training: for concepts that a user brings.
NEW_WORDS = ("dax", "wug", "blicket", "toma", "fep", "zup")


def nonce_words() -> list[str]:
    """All training words without a meaning, in a fixed order."""
    words = [head + tail for tail in _TAILS for head in _HEADS]
    order = np.random.default_rng(0).permutation(len(words))
    taken = {*NEW_WORDS, *vocabulary(nonce=False)}
    return [words[i] for i in order if words[i] not in taken]


def vocabulary(nonce: bool = True) -> list[str]:
    """Every word of the grammar, and with `nonce` the parts of nonce words: for a tokenizer."""
    said = [*COLOURS, *SHAPES, *GROUNDS, *TEXTURES, *FINISHES, *GROUND_TEXTURES]
    said += ["a", "an", "one", "picture", "of", "and", "on", "background", "against"]
    said += ["user", "assistant"]  # of the chat template
    for table in (_SIZE_WORDS, PLACE_WORDS, _FINISH_WORDS):
        said += [word for wordings in table.values() for text in wordings for word in text.split()]
    words = list(dict.fromkeys(said))
    return words + (_HEADS + _TAILS if nonce else [])


def says_place(text: str) -> bool:
    """Whether a caption says where its first thing stands."""
    return around_place(text) is not None


def around_place(text: str) -> tuple[str, str] | None:
    """What a caption says before and behind the words that tell a place; None: it tells none."""
    said = [words for wordings in PLACE_WORDS.values() for words in wordings]
    for words in sorted(said, key=len, reverse=True):  # "down at the bottom" has "at the bottom"
        before, found, behind = text.partition(f" {words}")
        if found:
            return before, behind
    return None


def says_ground(text: str) -> bool:
    """Whether a caption says what is behind its things."""
    return " background" in text or " against " in text


def caption(scene: Scene, rng: np.random.Generator, whole: bool = False) -> str:
    """One wording of a scene; `whole` says the place, size and ground of what is there."""
    pick = lambda texts: texts[rng.integers(len(texts))]
    say = lambda share: whole or rng.random() < share
    several = len(scene.things) > 1
    detail = rng.choice(DETAIL, p=SHARES)
    parts = []
    for thing in scene.things:
        part = _noun(thing, rng, detail, size=not several and say(detail))
        if several or say(detail):
            part += " " + place_words(thing.place, rng)
        parts.append(part)
    text = pick(_OPENINGS) + " " + " and a ".join(parts)
    if say(detail):
        texture = GROUND_TEXTURES[scene.ground_texture]
        plain = texture == "plain" and rng.random() < 0.7
        text += f" {ground_words(scene.ground, rng, '' if plain else texture + ' ')}"
    if not several and rng.random() < (detail if scene.finish else 0.2 * detail):
        text += " " + pick(_FINISH_WORDS[FINISHES[scene.finish]])
    return with_articles(text)


def place_words(place: int, rng: np.random.Generator) -> str:
    """One wording of a place."""
    wordings = PLACE_WORDS[list(PLACES)[place]]
    return wordings[rng.integers(len(wordings))]


def ground_words(ground: int, rng: np.random.Generator, texture: str = "") -> str:
    """One wording of a ground; its articles are `with_articles`'s."""
    name = f"{texture}{list(GROUNDS)[ground]}"
    return f"on a {name} background" if rng.random() < 0.75 else f"against {name}"


def with_articles(text: str) -> str:
    """An for a where a vowel follows."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def short_caption(scene: Scene) -> str:
    """What its thing is and nothing else, as everyone types it."""
    (thing,) = scene.things
    named = f"{list(COLOURS)[thing.colour]} {SHAPES[thing.shape]}"
    text = named if thing.concept is None else thing.word
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def noun(thing: Thing, rng: np.random.Generator) -> str:
    """A thing by its name, with all that can be said of its surface."""
    return _noun(thing, rng, 1.0, size=False)


def _noun(thing: Thing, rng: np.random.Generator, detail: float, size: bool) -> str:
    words = []
    if size:
        wordings = _SIZE_WORDS[list(SIZES)[thing.size]]
        words.append(wordings[rng.integers(len(wordings))])
    if thing.concept is not None:
        return " ".join([*words, thing.word])
    if rng.random() < (0.9 if thing.texture else 0.15) * min(1.0, detail + 0.3):
        words.append(TEXTURES[thing.texture])
    return " ".join([*words, list(COLOURS)[thing.colour], SHAPES[thing.shape]])
