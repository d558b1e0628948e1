"""The miniature's scores: the renderer is the judge.

Cases are made from a seed. Captions that say all that is judged: `concept`, arrangements of the
new word's object that the data set does not have; `ordinary`, single named objects, of which
nothing should be lost; `other`, the arrangements again under other new words, which should not take
on the concept. Captions that leave place, size and ground to the noise: `bare`, the new word alone;
`open`, the colour and shape of a named object alone.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from dopsd_jax.common.errors import UserError
from dopsd_jax.evaluation.appearance import CompositionKept, contrast
from dopsd_jax.evaluation.scorer import Case, Judge, Picture, digest
from dopsd_jax.evaluation.seeds import case_seed
from dopsd_jax.miniature import captions, frechet, identity, judge, render, world
from dopsd_jax.miniature.concepts import arrangements
from dopsd_jax.miniature.render import FINISHES, GROUND_TEXTURES, SIDE, TEXTURES
from dopsd_jax.miniature.world import Concept, Scene

CONCEPT, ORDINARY, OTHER, BARE, OPEN = "concept", "ordinary", "other", "bare", "open"
FLOOR_SEED = 1


def cases(
    concept: Concept,
    word: str,
    *,
    concepts: int,
    ordinary: int,
    others: int = 0,
    bare: int = 0,
    opened: int = 0,
    seed: int = 0,
    shown: Sequence[Picture] = (),
    first_seed: int = 30,
) -> list[Case]:
    """The prompts of an evaluation, with their target pictures; one seed gives the same ones.

    concepts, ordinary, others, bare, opened: how many of each kind; `others` at most as many as
    `concepts`.
    shown: pictures of the data set, whose arrangements are left out. first_seed: of the noise.
    Raises `UserError` where a concept has fewer unseen arrangements than `concepts`.
    """
    rng = np.random.default_rng([seed, 2026])
    new = unseen(rng, concept, word, concepts, shown)
    named = [world.random_scene(rng, (world.random_thing(rng),)) for _ in range(ordinary)]
    words = other_words(word, others)
    asked = [(CONCEPT, s, s) for s in new] + [(ORDINARY, s, s) for s in named]
    asked += [(OTHER, _renamed(s, w), s) for s, w in zip(new, words, strict=False)]
    texts = [caption(said, rng) for _, said, _ in asked]
    loose = np.random.default_rng([seed, 2027])  # a stream of its own: the others stay as they are
    for kind, count in ((BARE, bare), (OPEN, opened)):
        for _ in range(count):
            own = (concept, word) if kind == BARE else ()
            scene = world.random_scene(loose, (world.random_thing(loose, *own),))
            asked.append((kind, scene, scene))
            texts.append(captions.short_caption(scene))
    found = []
    for number, ((kind, _, truth), text) in enumerate(zip(asked, texts, strict=True)):
        picture = world.pictures([truth])[0]
        target = None if kind in (OTHER, OPEN) else picture
        noise, name = case_seed(first_seed, number), digest(picture)
        known = {"truth": truth, "truth_digest": name}
        found.append(Case(kind, text, text, SIDE, SIDE, noise, target, **known))
    return found


def unseen(
    rng: np.random.Generator, concept: Concept, word: str, count: int, shown: Sequence[Picture]
) -> list[Scene]:
    """Arrangements (place, size, ground) of a concept that none of the pictures shows.

    A picture shows the arrangement whose rendering, in any texture of the ground and any finish, is
    nearest to it.
    """
    grounds = len(world.suitable_grounds((world.random_thing(rng, concept, word),)))
    every = arrangements(rng, concept, word, len(world.PLACES) * len(world.SIZES) * grounds)
    styles = [(f, g) for f in range(len(FINISHES)) for g in range(len(GROUND_TEXTURES))]
    taken = set()
    here = [image for image in shown if image.shape == (SIDE, SIDE, 3)]
    if here:
        drawn = world.pictures(
            [dataclasses.replace(s, finish=f, ground_texture=g) for s in every for f, g in styles]
        ).astype(np.float32)
        nearest = [int(np.abs(drawn - image).mean((1, 2, 3)).argmin()) for image in here]
        taken = {number // len(styles) for number in nearest}
    new = [scene for number, scene in enumerate(every) if number not in taken]
    if len(new) < count:
        raise UserError(
            f"--count: {count} arrangements of {word!r}, but {len(new)} are unseen; lower it"
        )
    return new[:count]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A wording that describes everything by which a picture is judged."""
    finish = ("flat", "outline", "shaded")[scene.finish]
    textures = [TEXTURES[t.texture] for t in scene.things if t.concept is None and t.texture]
    while True:
        text = captions.caption(scene, rng, whole=True)
        if finish in text and all(texture in text for texture in textures):
            return text


def other_words(word: str, count: int) -> list[str]:
    """Words without a meaning but for `word`: new ones and ones of the training, in turn."""
    kinds = [w for w in captions.NEW_WORDS if w != word], captions.nonce_words()
    turns = [kinds[i % 2][i // 2 % len(kinds[i % 2])] for i in range(count + 1)]
    return [w for w in turns if w != word][:count]


def _renamed(scene: Scene, word: str) -> Scene:
    (thing,) = scene.things
    return dataclasses.replace(scene, things=(dataclasses.replace(thing, word=word),))


# --- scorers


@dataclasses.dataclass(frozen=True)
class WorldScorer:
    """See `scorer.Scorer`; `values` gets the pictures as one array, and the scenes."""

    name: str
    better: str
    kinds: tuple[str, ...]
    values: Callable[[judge.Images, list[Scene]], Sequence[float]]
    needs: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        return f"world-1 {self.name}"

    def __call__(self, images: Sequence[Picture], cases: Sequence[Case]) -> list[float]:
        found = self.values(np.stack(images), [case.truth for case in cases])
        return [float(value) for value in found]


def fitted(images: judge.Images, scenes: list[Scene]) -> render.Scenes:
    """The scenes with their objects where the pictures have them, as far as captions leave open."""
    return judge.fitted(images, world.compose(scenes, None))


def iou(images: judge.Images, scenes: list[Scene]) -> Float[np.ndarray, " n"]:
    """Shape-and-colour IoU with the true object, where captions leave its place open: fitted."""
    return judge.iou(images, fitted(images, scenes))


def relative(
    measure: Callable[[judge.Images], np.ndarray],
) -> Callable[[judge.Images, list[Scene]], Float[np.ndarray, " n"]]:
    """What is measured of a picture, relative to the same of its fitted target."""
    return lambda images, scenes: measure(images) / measure(render.render(fitted(images, scenes)))


def likeness(images: judge.Images, scenes: list[Scene]) -> Float[np.ndarray, " n"]:
    """Identity of the concept, wherever and on whatever ground it stands."""
    return identity.find(images, world.compose(scenes, None)).identity


def named(attribute: str) -> Callable[[judge.Images, list[Scene]], list[bool]]:
    """Whether a picture shows the named attribute that its caption asks for."""
    return lambda images, scenes: [
        getattr(seen, attribute) == getattr(scene.things[0], attribute)
        for seen, scene in zip(judge.see(images), scenes, strict=True)
    ]


def retention(images: judge.Images, scenes: list[Scene]) -> list[bool]:
    """Whether both shape and colour are as the caption names them."""
    right = [named(attribute)(images, scenes) for attribute in ("shape", "colour")]
    return [all(both) for both in zip(*right, strict=True)]


def taken_colours(images: judge.Images, scenes: list[Scene]) -> Float[np.ndarray, " n"]:
    """Share of the object's pixels, all but the ground's, that have the concept's colours."""
    found = judge.label(images, world.compose(scenes, None))
    there = found != judge.GROUND
    own = there & (found != judge.STRANGE)
    return own.sum((1, 2)) / np.maximum(there.sum((1, 2)), 1)


class Spread:
    """Spread of the places where things stand that no caption places, relative to the world's."""

    name, better, kinds, needs, identity = "spread", "higher", (BARE,), (), "world-1 spread"

    def features(self, images: Sequence[Picture], cases: Sequence[Case]) -> np.ndarray:
        return identity.centres(np.stack(images))[0]

    def reference(self, cases: Sequence[Case]) -> np.ndarray:
        return world.CENTRES[[case.truth.things[0].place for case in cases]]

    def distance(self, a: np.ndarray, b: np.ndarray) -> float:
        return identity.spread(a) / identity.spread(world.CENTRES)

    def floor(self, cases: Sequence[Case]) -> float:
        """True arrangements: near 1, the nearer the more there are."""
        return self.distance(self.reference(cases), world.CENTRES)


class PlaceKept:
    """Share of things that stand at the same named place as the base's from the same noise."""

    name, better, kinds, needs, least = "place kept", "higher", (BARE,), (), 1
    identity = "world-1 place kept"

    def features(self, images: Sequence[Picture], cases: Sequence[Case]) -> np.ndarray:
        places, there = identity.centres(np.stack(images))
        return np.where(there, identity.named_places(places), -1.0)[:, None]

    def compare(
        self, own: Float[np.ndarray, "p s d"], base: Float[np.ndarray, "p s d"]
    ) -> Float[np.ndarray, "p s"]:
        return ((own == base) & (base >= 0))[..., 0].astype(float)


class FeatureFID:
    """Fréchet distance of ordinary pictures to renderings of their captions; see `frechet`."""

    name, better, kinds, needs = "feature FID", "lower", (ORDINARY,), ()
    identity = f"world-1 FID {frechet.NAME}"

    def features(self, images: Sequence[Picture], cases: Sequence[Case]) -> np.ndarray:
        return frechet.features(np.stack(images))

    def reference(self, cases: Sequence[Case]) -> np.ndarray:
        return self._rendered(cases, 0)

    def distance(self, a: np.ndarray, b: np.ndarray) -> float:
        return frechet.frechet(a, b)

    def floor(self, cases: Sequence[Case]) -> float:
        """Other renderings of the same captions: places and sizes vary as captions leave them."""
        return frechet.frechet(self._rendered(cases, FLOOR_SEED), self.reference(cases))

    def _rendered(self, cases: Sequence[Case], seed: int) -> np.ndarray:
        rng = np.random.default_rng([2026, seed])
        return frechet.features(world.pictures([case.truth for case in cases], rng))


def scorers() -> dict[str, Callable[[], Judge]]:
    """All scorers of the miniature by name, in the order of the table."""
    made: list[Judge] = [
        WorldScorer("identity", "higher", (CONCEPT,), likeness),
        WorldScorer("bare identity", "higher", (BARE,), likeness),
        WorldScorer("concept IoU", "higher", (CONCEPT,), iou),
        WorldScorer("concept crispness", "higher", (CONCEPT,), relative(judge.crispness)),
        WorldScorer("concept contrast", "higher", (CONCEPT,), relative(contrast)),
        Spread(),
        PlaceKept(),
        WorldScorer("retention", "higher", (ORDINARY,), retention),
        WorldScorer("named shape", "higher", (ORDINARY,), named("shape")),
        WorldScorer("named colour", "higher", (ORDINARY,), named("colour")),
        WorldScorer("ordinary crispness", "higher", (ORDINARY,), relative(judge.crispness)),
        WorldScorer("ordinary contrast", "higher", (ORDINARY,), relative(contrast)),
        CompositionKept((OPEN,)),
        FeatureFID(),
        WorldScorer("leaked colours", "lower", (OTHER,), taken_colours),
        WorldScorer("leaked concept", "lower", (OTHER,), iou),
    ]
    return {scorer.name.replace(" ", "_"): (lambda scorer=scorer: scorer) for scorer in made}
