"""Checks a run before it starts: python -m dopsd_jax.check --config FILE[:ARG] [--workdir DIR]

Checks the configuration, every row and picture; reports buckets, adapted layers, memory and work;
then shows whether the teacher's context changes the prediction, and what the teacher draws. Where
the teacher's picture is no nearer to the target than the student's, there is nothing to learn.
For methods that learn from latents of the pictures the autoencoder is the limit, so its
reconstruction is compared.
"""

from dopsd_jax.common import program
from dopsd_jax.config.flags import CONFIG, WORKDIR, parse

if __name__ == "__main__":
    parse()  # wrong options end it here: the imports below take seconds

import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.common.atomic import remove_leftovers
from dopsd_jax.common.flow import euler
from dopsd_jax.conditioning.encoding import class_prompt
from dopsd_jax.conditioning.features import Features
from dopsd_jax.data.dataset import describe
from dopsd_jax.dopsd import Contexts, Denoiser
from dopsd_jax.estimation import flops
from dopsd_jax.families.base import Family
from dopsd_jax.methods import registry
from dopsd_jax.parallel import sharding
from dopsd_jax.reporting import pictures
from dopsd_jax.reporting.previews import Previews, rows_of
from dopsd_jax.run import build
from dopsd_jax.run.workdir import find_workdir

NOTHING = 1e-3  # relative gap below which the context changes nothing


def main() -> None:
    config = CONFIG.value
    workdir = find_workdir(WORKDIR.value, config)
    remove_leftovers(workdir)
    mesh = sharding.make_mesh(config.mesh)
    pipe, _ = build.open_pipeline(config, workdir, mesh)
    size = pipe.config
    sharding.check(mesh, size, batch_size=config.batch_size)
    build.check_method(config, pipe)
    dataset = build.open_data(config, workdir, pipe)
    lines = describe(dataset, config.batch_size * config.accumulate)
    print("\n".join([*build.notes(config, pipe), *lines]), flush=True)

    multiple, cache = sharding.sample_devices(mesh), build.cache_folder(config, workdir)
    features = Features(pipe, dataset, config, cache, multiple)
    features.prepare()
    lengths = zip(("student", "teacher"), positions(features), strict=True)
    print("features: " + ", ".join(f"{role} {count} rows" for role, count in lengths if count))
    plan = build.make_plan(config, pipe, mesh)
    print("\n".join([*plan.describe(), *features.describe()]), flush=True)
    print("\n".join(budget(config, pipe, plan, features)), flush=True)

    rows = rows_of(dataset, config.sample_rows)
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
    gaps = None
    if features.needs.teacher:
        gaps = np.mean([
            gap(
                pipe.family,
                pipe.split,
                start.student,
                teacher,
                s.contexts,
                s.noise,
                plan.schedule.grid(*s.noise.shape[1:3]),
            )
            for s in previews.samples
        ], axis=0)  # fmt: skip
        print("teacher: relative gap by step, " + ", ".join(f"{g:.3f}" for g in gaps))
    said = ", ".join(f"{name} {distance:.1f}" for name, distance in distances.items())
    print(f"distance to the target (rms of 255): {said}")
    print(f"pictures: {path}")
    if gaps is not None and np.mean(gaps) < NOTHING:
        print("warning: the teacher's context changes nothing; there is nothing to learn")
    elif distances.get("teacher", 0) >= distances["tuned"]:
        print(
            "warning: the teacher is no nearer to the targets than the tuned model; look at the "
            "pictures before training"
        )
    if distances.get("autoencoder", 0) >= distances["tuned"]:
        print(
            "warning: the autoencoder does not bring the targets back; is the vae of config.model "
            "the one that belongs to it?"
        )


def budget(config, pipe, plan, features) -> list[str]:
    """Parameters, memory that lives as long as the run, and the work of a step."""
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
    student, teacher = positions(features)
    work = flops.step_work(
        pipe.family,
        pipe.config,
        registry.passes(config, plan.grid),
        height=h,
        width=w,
        rows_student=student,
        rows_teacher=teacher,
        chosen=plan.trained.chosen,
        rank=config.lora.rank,
        full=config.train == "full",
        remat=config.remat,
        flash=pipe.attention != "xla",
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
        f"{config.remat}",
    ]


def positions(features: Features) -> tuple[int, int]:
    """Of the student's and of the teacher's padded contexts, at most; 0 without a teacher."""
    dataset, count = features.dataset, features.pipe.family.positions
    most = [0, 0]
    for rows in dataset.rows_by_shape().values():
        contexts = features.contexts([dataset.caption(int(rows[0]), dataset.prompt_keys)])
        for role, context in enumerate(contexts):
            most[role] = max(most[role], 0 if context is None else count(context))
    return tuple(most)


def gap(family: Family, split, student, teacher, contexts: Contexts, noise, grid) -> np.ndarray:
    """rms(v_student - v_teacher) / rms(v_teacher) at each state of the student's rollout, [K]."""
    graphdef, _, base = split
    sigma = jnp.asarray(grid, jnp.float32)
    run = jax.jit(lambda *args: _gaps(family.denoiser(graphdef), *args))
    return np.asarray(run(student, teacher, base, contexts, noise, sigma))


def _gaps(net: Denoiser, student, teacher, base, contexts: Contexts, noise, sigma):
    precomputed = net.precompute(student, base, contexts.student)
    precomputed_teacher = net.precompute(teacher, base, contexts.teacher)

    def denoise(x, pair):
        v = net.velocity(student, base, x, pair[0], contexts.student, precomputed)
        target = net.velocity(teacher, base, x, pair[0], contexts.teacher, precomputed_teacher)
        size = jnp.sqrt(jnp.mean(jnp.square(target)))
        return euler(x, v, *pair), jnp.sqrt(jnp.mean(jnp.square(v - target))) / size

    return jax.lax.scan(denoise, noise, (sigma[:-1], sigma[1:]))[1]


def _distance(images, targets) -> float:
    """Mean over pictures of the root mean square difference."""
    differences = [a.astype(np.float64) - b for a, b in zip(images, targets, strict=True)]
    return float(np.mean([np.sqrt(np.mean(np.square(d))) for d in differences]))


if __name__ == "__main__":
    program.run(main)
