"""One training run of the experiment, with what it scores on the way. See paper.py.

The data, the features, the batches, the method and the step are those of `dopsd_jax.train`; only
checkpoints, pictures and metrics are left out, and a step is compiled once for all seeds.
"""

import fcntl
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from paper_arms import LOOKS, SEQUENCE, Arm

from dopsd_jax.common.config_fields import highest
from dopsd_jax.conditioning.encoding import TEACHER
from dopsd_jax.conditioning.features import Features
from dopsd_jax.config import schema
from dopsd_jax.data.images import open_image
from dopsd_jax.data.loader import Batches
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods import registry
from dopsd_jax.miniature import captions, concepts, world
from dopsd_jax.miniature.exam import Exam
from dopsd_jax.run import build, data_set
from dopsd_jax.training import optimizers, state, trainable

CONFIG = Path(__file__).parents[1] / "configs" / "zimage.py"
PROMPTS = 12  # of a concept; twice as many ordinary ones. Noise and prompts are a concept's own
CONCEPT_SEED = 7001  # not of the miniature's training

Scores = dict[str, float]


def load_config(fields: Mapping[str, object]) -> ConfigDict:
    """The quickstart's configuration with some fields changed; without anchors unless these ask."""
    spec = importlib.util.spec_from_file_location("zimage_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny")
    config.update_from_flattened_dict({"anchor.share": 0.0, **fields})
    schema.check(config)
    return config


class Lesson:
    """A concept: its word, its data set of six pictures, and its exam.

    Args:
      number: which concept; each has another word.
      folder: for data sets and features.
    """

    def __init__(self, number: int, folder: Path):
        self.word = captions.NEW_WORDS[number]
        self.concept = world.random_concept(np.random.default_rng([CONCEPT_SEED, number]))
        self.path = folder / f"concept_{number}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be about to write it
            if not self.path.exists():
                concepts.write_dataset(self.path, self.concept, self.word, seed=number)

    def exam(self, pipe: Pipeline, config: ConfigDict) -> Exam:
        """The same prompts and noise for every model: differences between models are paired."""
        rows = data_set.open_rows(config, self.path).rows
        shown = [open_image(row.image, data_set.limits(config)) for row in rows]
        return Exam(
            pipe, config.teacher, self.concept, self.word, count=PROMPTS, seed=0, shown=shown
        )


@functools.cache
def bench(folder: Path) -> "Bench":
    """The one of this process."""
    return Bench(folder)


class Bench:
    """The miniature, opened once for all runs of a process; `folder` is shared by processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.exams: dict[tuple[str, int], Exam] = {}
        self.steps: dict[str, Callable] = {}
        self.before: dict[tuple[str, int], tuple[Scores, Scores]] = {}

    @functools.cache  # noqa: B019
    def lesson(self, number: int) -> Lesson:
        return Lesson(number, self.folder)

    @functools.cache  # noqa: B019
    def pipe(self, train: str, rank: int) -> Pipeline:
        """The shipped model, with adapters or ready to be trained whole."""
        config = load_config({"train": train, "lora.rank": rank})
        pipe, _ = build.open_pipeline(config, self.folder)
        pipe.remat = "unrolled"  # these few narrow layers take nearly twice as long in a scan
        trainable.trained(config, pipe.family, pipe.config).attach(pipe.transformer)
        return pipe

    def config(self, data: Path, fields: Mapping[str, object]) -> ConfigDict:
        return load_config(
            {"data.path": str(data), "data.cache": str(self.folder / "features"), **fields}
        )

    def exam(self, number: int, config: ConfigDict) -> Exam:
        key = config.train, number
        if key not in self.exams:
            pipe = self.pipe(config.train, config.lora.rank)
            self.exams[key] = self.lesson(number).exam(pipe, config)
        return self.exams[key]

    def start(self, config: ConfigDict, seed: int) -> nnx.State:
        """The student before step 1; adapters begin at random, by the seed."""
        pipe = self.pipe(config.train, config.lora.rank)
        _, student, _ = pipe.split
        if config.train == "full":
            return student
        key = jax.random.key(seed)
        leaves = [
            (path, leaf if path[-1] != "a" else leaf.replace(_gaussian(key, i, leaf[...])))
            for i, (path, leaf) in enumerate(nnx.to_flat_state(student))
        ]
        return nnx.from_flat_state(leaves)

    def train(
        self,
        config: ConfigDict,
        seed: int,
        start: nnx.State,
        looks: Mapping[int, Callable[[nnx.State], None]],
    ) -> tuple[nnx.State, list[float]]:
        """Trains on the configuration's data; returns the student and the losses.

        looks: what to do with the student after so many steps.
        """
        pipe = self.pipe(config.train, config.lora.rank)
        dataset = data_set.open_data(config, self.folder, pipe)
        features = Features(pipe, dataset, config, data_set.cache_folder(config, self.folder))
        features.prepare()
        batches = Batches(
            dataset.rows_by_shape(),
            dataset.rows,
            dataset.prompt_keys,
            batch_size=config.batch_size,
            seed=seed,
            draw=config.data.prompt_draw,
        )
        now = state.create(start, registry.teacher(config), optimizers.optimizer(config))
        step, losses, anchors = self._step(config, pipe), [], features.anchors
        for n in range(config.steps):
            batch = features.batch(batches.batch(n), 1)
            held = anchors and anchors.batch(n, np.arange(anchors.micro.size))
            now, metrics = step(config.learning_rate, seed, now, pipe.split[2], batch, n, held)
            losses.append(metrics["loss"])
            if n + 1 in looks:
                looks[n + 1](now.student)
        return now.student, [float(loss) for loss in losses]

    def run(self, arm: Arm, number: int, seed: int) -> dict[str, object]:
        """Scores of a concept at `LOOKS`, before training and of its teacher before training."""
        lesson = self.lesson(number)
        config = self.config(lesson.path, arm.fields(lesson.word))
        exam, start = self.exam(number, config), self.start(config, seed)
        key = arm.train, number
        if key not in self.before:  # the model without its adapters: the same for every seed
            self.before[key] = means(exam.values(start)), means(exam.values(start, TEACHER))
        base, teacher = self.before[key]
        curve = {0: base}
        look = {n: lambda student, n=n: curve.update({n: means(exam.values(student))})
                for n in LOOKS}  # fmt: skip
        _, losses = self.train(config, seed, start, look)
        return {"curve": curve, "teacher": teacher, "loss": [losses[0], losses[-1]]}

    def sequence(self, arm: Arm, _: int, seed: int) -> dict[str, object]:
        """Concepts one after another, with one student; after each, the scores of all."""
        student, rounds = None, []
        for number in SEQUENCE:
            lesson = self.lesson(number)
            config = self.config(lesson.path, arm.fields(lesson.word))
            student = self.start(config, seed) if student is None else student
            student, _ = self.train(config, seed, student, {})
            exams = [self.exam(other, config) for other in SEQUENCE]
            rounds.append([means(exam.values(student)) for exam in exams])
        return {"rounds": rounds}

    def _step(self, config: ConfigDict, pipe: Pipeline) -> Callable:
        """(rate, seed, state, base, batch, number, anchors) -> state, metrics."""
        known = config.copy_and_resolve_references()
        # Concepts share a program, and so do rates: the step is linear in a constant rate.
        known.data.path, known.learning_rate = "", 1.0
        known.dreambooth.concept_word = ""  # a matter of the data alone, as are the next
        known.anchor.concept_word, known.anchor.prompts = "", ""
        key = known.to_json_best_effort()
        if key not in self.steps:
            schedule = build.make_schedule(config, pipe.family, pipe.scheduler)
            unit, net = optimizers.optimizer(known), pipe.family.denoiser(pipe.split[0])
            side = highest(config.data.resolution)
            latent = (config.batch_size, *pipe.latent_shape(side, side))

            def step(rate, seed, now, base, batch, number, anchors):
                tx = _at_rate(unit, rate)
                inner = build.make_step(known, net, schedule, tx, seed=seed)
                return inner(now, base, batch, number, anchors, latent=latent)

            self.steps[key] = jax.jit(step, donate_argnums=2)
        return self.steps[key]


def _at_rate(unit: optax.GradientTransformation, rate) -> optax.GradientTransformation:
    """The optimizer of rate 1 at another, constant one."""

    def update(gradient, state, parameters):
        updates, state = unit.update(gradient, state, parameters)
        return jax.tree.map(lambda u: rate * u, updates), state

    return optax.GradientTransformation(unit.init, update)


def means(values: Mapping[str, Sequence[float]]) -> Scores:
    """The means over prompts, and retention: shape and colour both right."""
    found = {name: float(np.mean(column)) for name, column in values.items()}
    if "named shape" in values:
        both = np.asarray(values["named shape"]) * np.asarray(values["named colour"])
        found["retention"] = float(both.mean())
    return found


def shown(found: Mapping[str, object]) -> str:
    """A run in a line."""
    if "rounds" in found:
        return "concepts " + ", ".join(f"{s['concept IoU']:.2f}" for s in found["rounds"][-1])
    if "targets" in found:
        return "estimates of the teacher"
    last = found["curve"][max(found["curve"])]
    names = ("concept IoU", "concept crispness", "FID", "crispness", "retention")
    return ", ".join(f"{name} {last[name]:.3f}" for name in names if name in last)


def _gaussian(key: jax.Array, number: int, like: jax.Array) -> jax.Array:
    """The start of an adapter's first factor; see `attach.attach`."""
    return jax.random.normal(jax.random.fold_in(key, number), like.shape) / like.shape[-1]
