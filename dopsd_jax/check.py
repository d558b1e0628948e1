"""Checks a run before it starts: python -m dopsd_jax.check --config FILE[:ARG] [--workdir DIR]

Checks the configuration, every row and picture; reports buckets, adapted layers, memory and work;
then shows whether the teacher's context changes the prediction, what the teacher draws and what it
takes from its picture, and advises in one sentence (`evaluation.teacher_traits`). With
config.teacher.products = fp8 it says what that costs in accuracy (`evaluation.teacher_rounding`).
For methods that learn from latents of the pictures the autoencoder is the limit, so its
reconstruction is compared.
"""

from dopsd_jax.common import program
from dopsd_jax.config.flags import CONFIG, WORKDIR, parse

if __name__ == "__main__":
    parse()  # wrong options end it here: the imports below take seconds

import jax
import numpy as np

from dopsd_jax.common.atomic import remove_leftovers
from dopsd_jax.common.progress import Progress
from dopsd_jax.conditioning.encoding import class_prompt
from dopsd_jax.conditioning.features import Features
from dopsd_jax.data.dataset import describe
from dopsd_jax.estimation import flops, remat
from dopsd_jax.evaluation import teacher_rounding, teacher_traits
from dopsd_jax.evaluation.checkpoint_scores import check_held_out, find_scorers
from dopsd_jax.families.base import TEACHER
from dopsd_jax.methods import registry
from dopsd_jax.parallel import sharding
from dopsd_jax.reporting import pictures
from dopsd_jax.reporting.previews import Previews, rows_of
from dopsd_jax.run import build, data_set, heldout
from dopsd_jax.run.workdir import find_workdir


def main() -> None:
    config = CONFIG.value
    workdir = find_workdir(WORKDIR.value, config)
    remove_leftovers(workdir)
    mesh = sharding.make_mesh(config.mesh)
    heldout.check(config)
    scorers = find_scorers(config)
    pipe, _ = build.open_pipeline(config, workdir, mesh)
    size = pipe.config
    sharding.check(mesh, size, batch_size=config.batch_size)
    build.check_method(config, pipe, asked=CONFIG.asked)
    dataset, trained, held = data_set.hold_out(config, data_set.open_data(config, workdir, pipe))
    check_held_out(config, dataset, held, scorers.values())
    lines = describe(dataset, config.batch_size * config.accumulate, trained)
    print("\n".join([*build.notes(config, pipe), *lines]), flush=True)

    multiple, cache = sharding.sample_devices(mesh), data_set.cache_folder(config, workdir)
    features = Features(pipe, dataset, config, cache, multiple)
    rows = rows_of(dataset, config.sample_rows)
    others = teacher_traits.other_captions(pipe, dataset, config, rows)
    features.prepare()
    lengths = dict(zip(("student", "teacher", "anchors"), positions(features), strict=False))
    if features.rows[TEACHER] is None:
        del lengths["teacher"]
    print("features: " + ", ".join(f"{role} {count} rows" for role, count in lengths.items()))
    chosen = remat.settle(config, pipe, features, mesh)
    plan = build.make_plan(config, pipe, mesh)
    print("\n".join([*plan.describe(), *features.describe(), *chosen.describe()]), flush=True)
    print("\n".join(budget(config, pipe, plan, features, multiple)), flush=True)

    previews = Previews(pipe, features, rows, workdir)
    start = plan.initial_state(pipe.hand_over())
    teacher = start.student if start.teacher is None else start.teacher
    grid = previews.rows(start.student, teacher)
    path = workdir / "check.png"
    pictures.save_grid(path, previews.columns, grid, title="step 0, before training")
    drawn = {
        name: [row.images[i] for row in grid[: len(rows)]]
        for i, name in enumerate(previews.columns)
    }
    if features.needs.target:
        latents = [features.latents([row]) for row in rows]
        drawn["autoencoder"] = [pipe.decode(latent)[0] for latent in latents]
    names = [name for name in ("tuned", "teacher", "autoencoder") if name in drawn]
    distances = {name: _distance(drawn[name], drawn["target"]) for name in names}
    if features.needs.prior:
        captions = [s.caption for s in previews.samples]
        prompts = [class_prompt(caption, config.dreambooth) for caption in captions]
        print("class prompts: " + ", ".join(map(repr, dict.fromkeys(prompts))))
    traits, seen = [], teacher_traits.shown_pictures(pipe, dataset, config, rows)
    if features.needs.teacher and seen is None:
        print("what the teacher takes from a picture: not measured, prepared data have not kept it")
    elif features.needs.teacher:
        measure = teacher_traits.Measurement(
            pipe, features, start.student, teacher, plan.schedule.grid
        )
        asked = zip(previews.samples, others or [None] * len(rows), seen, strict=True)
        progress = Progress("what the teacher takes from a picture", len(rows))
        traits = [measure(*each) for each in progress.over(asked)]
        print("\n".join(teacher_traits.describe(traits)))
    if registry.rounds(config):
        own = pipe, plan.net, start.student, teacher, plan.schedule.grid
        measure = teacher_rounding.Measurement(*own)
        roundings = [measure(sample) for sample in previews.samples]
        print("\n".join(teacher_rounding.describe(roundings)))
    said = ", ".join(f"{name} {distance:.1f}" for name, distance in distances.items())
    print(f"distance to the target (rms of 255): {said}")
    print(f"pictures: {path}")
    if traits:
        print(teacher_traits.recommendation(traits))
    if distances.get("autoencoder", 0) >= distances["tuned"]:
        print(
            "warning: the autoencoder does not bring the targets back; is the vae of config.model "
            "the one that belongs to it?"
        )


def budget(config, pipe, plan, features, devices) -> list[str]:
    """Parameters, memory that lives as long as the run, and the work of a step.

    devices: that samples are spread over.
    """
    width, height = max(features.dataset.buckets, key=lambda b: b.width * b.height)
    h, w, _ = pipe.latent_shape(height, width)
    size = sharding.whole_bytes
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    like = plan.abstract_state
    # Not counted from the base: one that is quantised has scales too.
    frozen = 0 if config.train == "full" else flops.parameters(pipe.family, pipe.config)
    memory = {
        "base": size(pipe.split[2]),
        "student": size(like.student),
        "gradient": size(like.student),
        "teacher": size(like.teacher),
        "start": size(like.start),
        "optimizer": size(like.opt_state),
    }
    work = flops.step_work(
        pipe.family,
        pipe.config,
        registry.passes(config, plan.grid, devices),
        positions(features),
        height=h,
        width=w,
        chosen=plan.trained.chosen,
        products=plan.trained.products,
        inner=plan.trained.inner,
        full=config.train == "full",
        remat=pipe.remat,
    )
    images = config.batch_size * config.accumulate
    gib = lambda n: f"{n / 2**30:.3g} GiB"
    return [
        f"parameters: {frozen:,} of the base, {count(like.student):,} trained",
        "memory (unsplit, without activations): "
        + ", ".join(f"{name} {gib(bytes)}" for name, bytes in memory.items() if bytes)
        + f"; in all {gib(sum(memory.values()))}",
        f"work a step of {images} images at {width}x{height}: {work.model * images / 1e12:.4g} "
        f"TFLOP, executed {work.executed * images / 1e12:.4g}; attention {pipe.attention}, remat "
        f"{pipe.remat}",
    ]


def positions(features: Features) -> list[int]:
    """Of the padded contexts of student, teacher and anchors, at most."""
    count, contexts = features.pipe.family.positions, features.outlines().values()
    return [max(map(count, role)) for role in zip(*contexts, strict=True)]


def _distance(images, targets) -> float:
    """Mean over pictures of the root mean square difference."""
    differences = [a.astype(np.float64) - b for a, b in zip(images, targets, strict=True)]
    return float(np.mean([np.sqrt(np.mean(np.square(d))) for d in differences]))


if __name__ == "__main__":
    program.run(main)
