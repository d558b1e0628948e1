"""One training run of the experiment, with what it scores on the way. See paper.py.

The data, the features, the batches, the method and the step are those of `dopsd_jax.train`; only
checkpoints, pictures and metrics are left out, and a step is compiled once for all seeds.
"""

import fcntl
import functools
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from paper_arms import BOTH, OPEN, PICTURES, SEQUENCE, WHOLE, Arm
from paper_exam import Exam, Scores
from PIL import Image

from dopsd_jax.common.atomic import write_text
from dopsd_jax.common.config_fields import highest
from dopsd_jax.conditioning.encoding import STUDENT, TEACHER
from dopsd_jax.conditioning.features import Features
from dopsd_jax.config import schema
from dopsd_jax.data.images import open_image
from dopsd_jax.data.loader import Batches
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods import registry
from dopsd_jax.miniature import captions, concepts, world
from dopsd_jax.models import kinds
from dopsd_jax.run import build, data_set
from dopsd_jax.training import optimizers, state, trainable

CONFIG = Path(__file__).parents[1] / "configs" / "zimage.py"
ORDINARY = Path(__file__).parents[1] / "examples" / "miniature" / "ordinary.txt"
CONCEPT_SEED = 7001  # not of the miniature's training

SHOWN = ("bare identity", "bare crispness", "ordinary crispness", "retention", "leaked concept")


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
    """A concept: its word, and its data sets with either kind of captions.

    Args:
      number: which concept; each has another word.
      folder: for data sets and features.
    """

    def __init__(self, number: int, folder: Path):
        self.number, self.folder = number, folder
        self.word = captions.NEW_WORDS[number]
        self.concept = world.random_concept(np.random.default_rng([CONCEPT_SEED, number]))

    def path(self, told: str) -> Path:
        """The data set with captions of the form `told`; written if it is not there."""
        path = self.folder / f"concept_{self.number}_{told}"
        self.folder.mkdir(parents=True, exist_ok=True)
        forms = [self.path(form) for form in (WHOLE, OPEN)] if told == BOTH else []
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be about to write it
            if not path.exists() and forms:
                whole, alone = forms
                shutil.copytree(whole, path)
                for file in sorted(alone.glob("*.txt"))[::2]:
                    shutil.copy(file, path)
            elif not path.exists():
                concepts.write_dataset(
                    path, self.concept, self.word, PICTURES, self.number, whole=told == WHOLE
                )
        return path

    def captions(self) -> list[str]:
        """Captions that say all."""
        texts = [file.read_text(encoding="utf-8") for file in self.path(WHOLE).glob("*.txt")]
        return sorted(text.strip() for text in texts)


@functools.cache
def bench(folder: Path, students: tuple[tuple[str, str], ...] = ()) -> "Bench":
    """The one of this process."""
    return Bench(folder, dict(students))


class Bench:
    """The miniature, opened once for all runs of a process; `folder` is shared by processes.

    students: model folders by name, besides the shipped one.
    """

    def __init__(self, folder: Path, students: Mapping[str, str] = MappingProxyType({})):
        self.folder, self.students = folder, students
        self.exams: dict[tuple[str, str, int], tuple[Exam, Scores, Scores]] = {}
        self.steps: dict[str, Callable] = {}

    @functools.cache  # noqa: B019
    def lesson(self, number: int) -> Lesson:
        return Lesson(number, self.folder)

    @functools.cache  # noqa: B019
    def pipe(self, train: str, rank: int, model: str) -> Pipeline:
        """A student, with adapters or ready to be trained whole."""
        config = load_config({"train": train, "lora.rank": rank, "model": model})
        pipe, _ = build.open_pipeline(config, self.folder)
        pipe.remat = kinds.UNROLLED  # these few narrow layers take nearly twice as long in a scan
        trainable.trained(config, pipe.family, pipe.config).attach(pipe.transformer)
        return pipe

    def pipe_of(self, config: ConfigDict) -> Pipeline:
        return self.pipe(config.train, config.lora.rank, config.model)

    def config(self, data: Path, fields: Mapping[str, object]) -> ConfigDict:
        return load_config(
            {"data.path": str(data), "data.cache": str(self.folder / "features"), **fields}
        )

    def arm_config(self, arm: Arm, lesson: Lesson, **more: object) -> ConfigDict:
        """What an arm trains a lesson with; `ordinary`: other files of prompts for its anchors."""
        fields = arm.fields(lesson.word, str(more.pop("ordinary", ORDINARY))) | more
        return self.config(lesson.path(arm.captions), fields | self.model_of(arm))

    def model_of(self, arm: Arm) -> dict[str, object]:
        """The field that names the arm's student, unless it is the shipped one."""
        name = arm.student
        return {"model": str(self.students[name])} if name in self.students else {}

    def exam(self, lesson: Lesson, config: ConfigDict) -> tuple[Exam, Scores, Scores]:
        """The exam of a lesson; base and teacher before training, the same for every seed."""
        key = config.train, config.model, lesson.number
        if key not in self.exams:
            rows = data_set.open_rows(config, lesson.path(WHOLE)).rows
            shown = [open_image(row.image, data_set.limits(config)) for row in rows]
            pipe = self.pipe_of(config)
            exam = Exam(pipe, config.teacher, lesson.concept, lesson.word, shown)
            start, found = self.start(config, 0), []
            for role, name in ((STUDENT, "base"), (TEACHER, "teacher")):
                found.append(exam(start, role))
                if lesson.number == 0:
                    self._keep(f"{name} {config.train} {Path(config.model).name}", exam)
            self.exams[key] = exam, *found
        return self.exams[key]

    def start(self, config: ConfigDict, seed: int) -> nnx.State:
        """The student before step 1; adapters begin at random, by the seed."""
        _, student, _ = self.pipe_of(config).split
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
        pipe = self.pipe_of(config)
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
        keep = registry.start(config) == "copy"
        now = state.create(start, registry.teacher(config), optimizers.optimizer(config), keep)
        # What was read is bound to a device. Were the rest not, the second step compiled again.
        now = jax.device_put(now, jax.devices()[0])
        step, losses, anchors = self._step(config, pipe), [], features.anchors
        for n in range(config.steps):
            index = batches.batch(n)
            batch = features.batch(index, 1)
            held = anchors and anchors.batch(index, np.arange(anchors.micro.size))
            now, metrics = step(config.learning_rate, seed, now, pipe.split[2], batch, n, held)
            losses.append(metrics["loss"])
            if n + 1 in looks:
                looks[n + 1](now.student)
        return now.student, [float(loss) for loss in losses]

    def run(self, arm: Arm, number: int, seed: int) -> dict[str, object]:
        """Scores of a concept at the arm's looks, before training and of its teacher then."""
        lesson = self.lesson(number)
        config = self.arm_config(arm, lesson)
        exam, base, teacher = self.exam(lesson, config)
        curve, start = {0: base}, self.start(config, seed)
        look = {n: lambda student, n=n: curve.update({n: exam(student)}) for n in arm.looks}
        _, losses = self.train(config, seed, start, look)
        if (number, seed) == (0, 0):
            self._keep(arm.key(number, seed), exam)
        return {"curve": curve, "teacher": teacher, "loss": [losses[0], losses[-1]]}

    def _keep(self, key: str, exam: Exam) -> None:
        """A strip of the pictures that were drawn last, for a figure."""
        path = self.folder / "pictures" / f"{key.replace('|', ' ').replace('/', ' of ')}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.concatenate(exam.last, axis=1)).save(path)

    def sequence(self, arm: Arm, _: int, seed: int) -> dict[str, object]:
        """Concepts one after another, with one student; after each, the scores of all so far.

        Each run begins with the last result, as with config.lora.init_from; its anchors, if it has
        some, are ordinary prompts and the earlier concepts' captions in turn.
        """
        student, rounds = None, []
        for round_, number in enumerate(SEQUENCE):
            lesson, more = self.lesson(number), {"lora.init_from": "the last result"}  # not read
            if round_:
                more["ordinary"] = self._prompts([self.lesson(n) for n in SEQUENCE[:round_]])
            config = self.arm_config(arm, lesson, **more)
            student = self.start(config, seed) if student is None else student
            student, _ = self.train(config, seed, student, {})
            seen = [self.lesson(other) for other in SEQUENCE[: round_ + 1]]
            rounds.append([self.exam(other, config)[0](student) for other in seen])
        base = [self.exam(self.lesson(number), config)[1] for number in SEQUENCE]
        return {"rounds": rounds, "base": base}

    def _prompts(self, earlier: Sequence[Lesson]) -> str:
        """Files of prompts for anchors: ordinary ones, and the captions of earlier lessons."""
        path = self.folder / f"captions_to_{len(earlier)}.txt"
        texts = [text for lesson in earlier for text in lesson.captions()]
        write_text(path, "".join(f"{text}\n" for text in texts))
        return f"{ORDINARY},{path}"

    def _step(self, config: ConfigDict, pipe: Pipeline) -> Callable:
        """(rate, seed, state, base, batch, number, anchors) -> state, metrics."""
        known = config.copy_and_resolve_references()
        # Concepts share a program, and so do rates: the step is linear in a constant rate.
        known.data.path, known.learning_rate = "", 1.0
        known.dreambooth.concept_word = ""  # a matter of the data alone, as are the next
        known.anchor.concept_word, known.anchor.prompts = "", ""
        known.model = ""  # students have one architecture
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


def shown(found: Mapping[str, object]) -> str:
    """A run in a line."""
    if "rounds" in found:
        return "identity " + ", ".join(f"{s['identity']:.2f}" for s in found["rounds"][-1])
    if "targets" in found:
        return "estimates of the teacher"
    if "words" in found:
        return "pictures of words"
    last = found["curve"][max(found["curve"])]
    return ", ".join(f"{name} {last[name]:.3f}" for name in SHOWN)


def _gaussian(key: jax.Array, number: int, like: jax.Array) -> jax.Array:
    """The start of an adapter's first factor; see `attach.attach`."""
    return jax.random.normal(jax.random.fold_in(key, number), like.shape) / like.shape[-1]
