"""Many pictures of one style, as in the paper's full fine-tuning, under two kinds of captions.

Captions name what is drawn, never the style. Those that say the `whole` leave nothing open but the
style; `short` ones say colour and shape, and leave place, size and ground to chance. See paper.py.
"""

import dataclasses
import fcntl
import re
from pathlib import Path

import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from paper_arms import STYLE_BATCH, STYLE_LOOKS, STYLE_STEPS, Arm
from paper_records import CRISPNESS, FID, RETENTION
from paper_run import Bench, Scores
from PIL import Image

from dopsd_jax.common.atomic import atomic_folder
from dopsd_jax.conditioning.encoding import STUDENT, TEACHER
from dopsd_jax.evaluation.drawing import Painter, Shot
from dopsd_jax.evaluation.scorer import Case, digest
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.miniature import captions, frechet, judge, world
from dopsd_jax.miniature.world import Scene

# Finish of the object, texture of the ground: neither is the base model's own choice.
STYLES = ((1, 1), (1, 2), (2, 1), (2, 2))
PICTURES, PROMPTS = 64, 48
DRAWN_TOGETHER = 24
SEED = 7002


def run(bench: Bench, arm: Arm, style: int, seed: int) -> dict[str, object]:
    """Scores of a style at `STYLE_LOOKS`, before training and of its teacher before training."""
    path = dataset(bench.folder, style, arm.kind)
    fields = arm.fields("") | {"steps": STYLE_STEPS, "batch_size": STYLE_BATCH}
    config = bench.config(path, fields)
    pipe = bench.pipe(config.train, config.lora.rank)
    exam, start = StyleExam(pipe, config, style, arm.kind), bench.start(config, seed)
    curve, teacher = {0: exam(start)}, exam(start, TEACHER)
    looks = {n: lambda student, n=n: curve.update({n: exam(student)}) for n in STYLE_LOOKS}
    _, losses = bench.train(config, seed, start, looks)
    return {"curve": curve, "teacher": teacher, "loss": [losses[0], losses[-1]]}


def scenes(style: int, count: int, seed: int) -> list[Scene]:
    """Single plain objects in a style."""
    rng, (finish, ground) = np.random.default_rng([SEED, style, seed]), STYLES[style]
    things = [dataclasses.replace(world.random_thing(rng), texture=0) for _ in range(count)]
    return [
        dataclasses.replace(world.random_scene(rng, (t,)), finish=finish, ground_texture=ground)
        for t in things
    ]


def caption(scene: Scene, kind: str, rng: np.random.Generator) -> str:
    """What is drawn, without its style."""
    if kind == "short":
        (thing,) = scene.things
        text = f"a {list(world.COLOURS)[thing.colour]} {world.SHAPES[thing.shape]}"
        return re.sub(r"^a (?=[aeiou])", "an ", text)
    plain = dataclasses.replace(scene, finish=0, ground_texture=0)
    while True:
        text = captions.caption(plain, rng, whole=True)
        if not {"plain", "flat"} & set(text.split()):
            return text


def dataset(folder: Path, style: int, kind: str) -> Path:
    """The folder of the pictures with their captions; written if it is not there."""
    path = folder / f"style_{style}_{kind}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be about to write it
        if path.exists():
            return path
        rng, shown = np.random.default_rng([SEED, style]), scenes(style, PICTURES, 0)
        with atomic_folder(path) as partial:
            for i, (scene, image) in enumerate(zip(shown, world.pictures(shown, rng), strict=True)):
                Image.fromarray(image).save(partial / f"{i:03d}.png")
                text = caption(scene, kind, rng) + "\n"
                (partial / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    return path


class StyleExam:
    """Pictures of other scenes in the style, from captions of the same kind."""

    def __init__(self, pipe: Pipeline, config: ConfigDict, style: int, kind: str):
        rng, self.scenes = np.random.default_rng([SEED, style, 1]), scenes(style, PROMPTS, 1)
        self.truth = world.pictures(self.scenes)
        cases = []
        for i, (scene, image) in enumerate(zip(self.scenes, self.truth, strict=True)):
            text = caption(scene, kind, rng)
            known = {"truth": scene, "truth_digest": digest(image)}
            cases.append(Case("style", text, text, *image.shape[:2], i, image, **known))
        self.shots = [Shot(case, 0) for case in cases]
        self.painter = Painter(pipe, config.teacher, batch=DRAWN_TOGETHER)
        for role in (STUDENT, TEACHER):
            for _ in self.painter.encode(cases, role):
                pass

    def __call__(self, trained: nnx.State, role: int = STUDENT) -> Scores:
        """Distance to the style's own pictures, crispness relative to theirs, and retention."""
        images = np.stack([image for _, image in self.painter.draw(trained, self.shots, role)])
        right = [
            (seen.shape, seen.colour) == (scene.things[0].shape, scene.things[0].colour)
            for seen, scene in zip(judge.see(images), self.scenes, strict=True)
        ]
        features = frechet.features(images), frechet.features(self.truth)
        crisp = judge.crispness(images).mean() / judge.crispness(self.truth).mean()
        return {
            FID: frechet.frechet(*features),
            CRISPNESS: float(crisp),
            RETENTION: float(np.mean(right)),
        }
