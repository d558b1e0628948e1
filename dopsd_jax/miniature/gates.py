"""What a trained miniature must do before it is shipped.

    python -m dopsd_jax.miniature.gates --model=examples/miniature/model

Measured on the model's folder, by the pipeline and the sampler that users have.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

import dopsd_jax
from dopsd_jax.common import program
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import expand
from dopsd_jax.common.json_files import read_json
from dopsd_jax.evaluation.appearance import crispness, steepest
from dopsd_jax.families.base import STUDENT
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.miniature import captions, edit_trial, families, identity, judge, render, world
from dopsd_jax.miniature.artist import Artist, Latents, Pictures
from dopsd_jax.miniature.world import Scene

CONCEPTS, ORDINARY, NOISES = 24, 96, 2
SEED = 20011  # of concepts and prompts: none is of the training
BATCH = 24

SCORES = "scores.json"
SHIPPED, UNDISTILLED_FEW, UNDISTILLED_MANY = "shipped", "undistilled_few", "undistilled_many"


class Gate(NamedTuple):
    """A score and its bound. `least`: whether the score must not be lower, or not be higher."""

    name: str
    bound: float
    least: bool
    meaning: str

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


GATES = (
    Gate("identity", 0.8, True, "of unseen concepts, with a picture in another arrangement in "
         "context; relative to the autoencoder's own of a rendering"),
    Gate("blind", 0.4, False, "the same from the text alone"),
    Gate("spread", 0.8, True, "of places that no caption names, with a picture in context; "
         "relative to the world's"),
    Gate("place kept", 0.8, True, "places that student and teacher share at equal noise"),
    Gate("obeys", 0.8, True, "places and grounds where caption and picture differ: as the "
         "caption says"),
    Gate("shape", 0.95, True, "named shapes that are right on ordinary prompts"),
    Gate("colour", 0.95, True, "named colours"),
    Gate("crispness", 0.9, True, "of few-step pictures, relative to true ones"),
    Gate("few to many", 0.95, True, "crispness relative to the undistilled many-step sampler's"),
    Gate("first", 0.75, True, "crispness of the first clean estimate, as a latent, on prompts that "
         "leave the arrangement open; relative to true latents"),
    Gate("undistilled first", 0.3, False, "the same before distillation"),
)  # fmt: skip
EDITING = (
    Gate("edited", 0.9, True, "grounds, places, sizes and things that an instruction names: as it "
         "says"),
    Gate("left alone", 0.9, True, "grounds, places and sizes that it does not name: as before"),
    Gate("edited identity", 0.8, True, "of unseen concepts whose picture is edited; relative to "
         "the autoencoder's own"),
    Gate("result", 0.8, True, "identity of unseen concepts that take a thing's place, with a "
         "picture of the concept as the last reference"),
    Gate("result unseen", 0.4, False, "the same without that picture"),
)  # fmt: skip


class Trial:
    """Fixed concepts, each under a new word, and fixed ordinary prompts.

    shown: a picture of each concept. bare: its word alone, from several noises. told: its word in
    an arrangement that contradicts the picture's place and ground. ordinary: named objects, whole
    captions. loose: named objects, and nothing of the arrangement.
    """

    def __init__(self, concepts: int = CONCEPTS, ordinary: int = ORDINARY):
        rng = np.random.default_rng(SEED)
        words, self.shown, self.told = captions.NEW_WORDS, [], []
        for i in range(concepts):
            concept, word = world.random_concept(rng), words[i % len(words)]
            self.shown.append(shown := _arranged(rng, concept, word))
            while not _unlike(told := _arranged(rng, concept, word), shown):
                pass
            self.told.append(told)
        named = [world.random_scene(rng, (world.random_thing(rng),)) for _ in range(ordinary)]
        self.bare = [scene for scene in self.shown for _ in range(NOISES)]
        self.ordinary, self.loose = named, named[: ordinary // 2]
        self.told_texts = [captions.caption(scene, rng, whole=True) for scene in self.told]
        self.texts = [captions.caption(scene, rng, whole=True) for scene in self.ordinary]
        self.rng_state = rng.integers(2**31)

    def __call__(self, artist: Artist) -> dict[str, float]:
        """Scores of what draws."""
        rng = np.random.default_rng(self.rng_state)
        shape = artist.shape
        noise = lambda scenes: rng.standard_normal((len(scenes), *shape), np.float32)
        shown, truth = world.pictures(self.shown), world.compose(self.bare, None)
        reach = identity.find(artist.decode(artist.encode(render.render(truth))), truth).identity
        bare, same = [captions.short_caption(scene) for scene in self.bare], noise(self.bare)
        teacher = artist.decode(artist.latents(bare, np.repeat(shown, NOISES, 0), same))
        student = artist.decode(artist.latents(bare, None, same))
        told = artist.decode(artist.latents(self.told_texts, shown, noise(self.told)))
        named = artist.decode(artist.latents(self.texts, None, noise(self.ordinary)))
        first = artist.first(
            [captions.short_caption(scene) for scene in self.loose], noise(self.loose)
        )

        likeness = lambda images: float((identity.find(images, truth).identity / reach).mean())
        (places, _), (others, _) = identity.centres(teacher), identity.centres(student)
        seen, things = judge.see(named), [scene.things[0] for scene in self.ordinary]
        right = lambda name: _share(
            getattr(s, name) == getattr(t, name) for s, t in zip(seen, things, strict=True)
        )
        true = np.concatenate([render.render(truth), world.pictures(self.ordinary)])
        latents = artist.encode(world.pictures(self.loose))
        edits = {} if artist.edited is None else edit_trial.scores(artist, rng)
        return edits | {
            "identity": likeness(teacher),
            "blind": likeness(student),
            "spread": identity.spread(places) / identity.spread(world.CENTRES),
            "place kept": _share(identity.named_places(places) == identity.named_places(others)),
            "obeys": self._obeys(told),
            "shape": right("shape"),
            "colour": right("colour"),
            "crispness": float(
                crispness(np.concatenate([teacher, named])).mean() / crispness(true).mean()
            ),
            "first": float(steepest(first).mean() / steepest(latents).mean()),
        }

    def _obeys(self, images: Pictures) -> float:
        places = identity.named_places(identity.centres(images)[0])
        found = judge.lit_distance(
            identity.grounds(images).ground[:, None], world.GROUND_PALETTE
        ).argmin(1)
        return _share(
            right
            for scene, place, ground in zip(self.told, places, found, strict=True)
            for right in (place == scene.things[0].place, ground == scene.ground)
        )


def _arranged(rng: np.random.Generator, concept: world.Concept, word: str) -> Scene:
    return world.random_scene(rng, (world.random_thing(rng, concept, word),))


def _unlike(a: Scene, b: Scene) -> bool:
    return a.ground != b.ground and a.things[0].place != b.things[0].place


def _share(right) -> float:
    return float(np.mean(list(right)))


def of_folder(pipe: Pipeline) -> Artist:
    """The model as it is used: the deployed steps, without guidance."""
    family = families.family(pipe.family.NAME)

    def context(prompts, images):
        if images is None:
            return pipe.encode_prompt(prompts)
        return pipe.encode_prompt_with_image(prompts, list(images), **family.teacher)

    def editing(prompts, images):
        each = [
            pipe.features(STUDENT, *one)
            for one in zip(prompts, zip(*images, strict=True), strict=True)
        ]
        return pipe.family.collate(each)

    def batches(draw: Callable, told, noise: Latents) -> Latents:
        some = (slice(i, i + BATCH) for i in range(0, len(noise), BATCH))
        return np.concatenate(
            [np.asarray(draw(noise[s], jax.tree.map(lambda a, s=s: a[s], told))) for s in some]
        )

    grid = pipe.deployed_grid(family.latent)
    rollout = lambda x, told: pipe.sample(pipe.split[1], x, told, grid)
    estimate = lambda x, told: x - pipe.velocity(x, 1.0, told)
    edited = lambda prompts, images, noise: batches(rollout, editing(prompts, images), noise)
    return Artist(
        family.latent,
        lambda prompts, images, noise: batches(rollout, context(prompts, images), noise),
        lambda prompts, noise: batches(estimate, context(prompts, None), noise),
        lambda images: np.asarray(pipe.encode_image(images)),
        pipe.decode,
        edited if family.editor else None,
    )


class Undistilled(NamedTuple):
    """Of the network before distillation: crispness of its many-step pictures with guidance, and
    of its own first clean estimate, without."""

    crispness: float
    first: float


def undistilled(path: Path) -> Undistilled:
    """From the scores beside a model."""
    stored = read_json(path)[0]
    try:
        many, few = stored[UNDISTILLED_MANY], stored[UNDISTILLED_FEW]
        return Undistilled(float(many["crispness"]), float(few["first"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: has no numbers {UNDISTILLED_MANY}.crispness and {UNDISTILLED_FEW}.first; "
            "miniature.train writes them"
        ) from None


def verdicts(found: Mapping[str, float], before: Undistilled) -> list[tuple[Gate, float, bool]]:
    """Every gate with its value."""
    values = {
        **found,
        "few to many": found["crispness"] / before.crispness,
        "undistilled first": before.first,
    }
    gates = [gate for gate in (*GATES, *EDITING) if gate in GATES or gate.name in found]
    return [(gate, values[gate.name], gate.holds(values[gate.name])) for gate in gates]


def lines(rows: Sequence[tuple[Gate, float, bool]]) -> list[str]:
    """A line a gate."""
    return [
        f"{gate.name:17} {value:6.3f}  {'at least' if gate.least else 'at most'} {gate.bound:.2f}  "
        f"{'holds' if held else 'MISSED'}  {gate.meaning}"
        for gate, value, held in rows
    ]


def main() -> int:
    folder = expand(flags.FLAGS.model)
    before = undistilled(folder.parent / SCORES)
    rows = verdicts(Trial()(of_folder(dopsd_jax.load_pipeline(folder))), before)
    print("\n".join(lines(rows)))
    return 0 if all(held for *_, held in rows) else 1


if __name__ == "__main__":
    flags.DEFINE_string("model", "examples/miniature/model", "folder of the model")
    program.run(main)
