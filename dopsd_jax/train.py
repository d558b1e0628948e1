"""Trains: python -m dopsd_jax.train --config FILE[:ARG] [--workdir DIR] [--config.FIELD=VALUE ...]

Run the same command again to resume. What it writes is described in README.md.
"""

from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from dopsd_jax import errors, experiment, settings, sharding
from dopsd_jax.checkpoint import Checkpoints
from dopsd_jax.data.dataset import describe
from dopsd_jax.data.loader import Batches, prefetch
from dopsd_jax.errors import UserError
from dopsd_jax.features import Features
from dopsd_jax.metrics import MetricsWriter, Progress, StepTimer
from dopsd_jax.previews import Previews, rows_of
from dopsd_jax.report import write_report
from dopsd_jax.workdir import open_workdir

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configuration file, with :argument", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", "runs/zimage", "folder of the run; an old one is resumed")


def main() -> None:
    config, workdir = CONFIG.value, Path(WORKDIR.value).expanduser()
    settings.check(config, config_flags.get_override_values(flags.FLAGS["config"]))

    # ---- Devices, model, data: everything that can be wrong is found here.
    mesh = sharding.make_mesh(config.mesh)
    pipe, origin = experiment.open_pipeline(config, workdir, mesh)
    size = pipe.config
    sharding.check(mesh, batch_size=config.batch_size, heads=size.heads, hidden=size.hidden_dim)
    experiment.check_method(config, pipe)
    dataset = experiment.open_data(config, workdir, pipe.size_multiple)
    open_workdir(workdir, config, {"data": dataset.digest(), **origin})
    effective_batch = config.batch_size * config.accumulate
    print("\n".join(describe(dataset, effective_batch)), flush=True)

    # ---- Contexts of student and teacher: computed once, then the encoders leave.
    features = Features(pipe, dataset, config, Path(config.data.cache or workdir / "features"))
    features.prepare()

    # ---- State and step.
    with jax.set_mesh(mesh):
        plan = experiment.make_plan(config, pipe, mesh)
    print("\n".join(plan.describe()), flush=True)
    previews = Previews(pipe, features, rows_of(dataset, config.sample_rows), workdir)
    begun = pipe.hand_over()

    # ---- Restore.
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints, config.keep_every)
    restored = checkpoints.restore(plan.like)
    if restored is None:
        first, state = 0, plan.begin(begun)
    else:
        first, state = restored
        print(f"resuming at step {first}", flush=True)
    del begun
    writer = MetricsWriter(workdir, first)
    results = plan.trained.paths(workdir, config.steps)

    def deliver(step: int) -> None:
        plan.trained.deliver(pipe.folder, workdir, step, getattr(state, config.export_weights))

    def save(step: int) -> None:
        if plan.trained.due(step):  # first: who resumes at a checkpoint finds it there
            deliver(step)
        checkpoints.save(step, state)

    def show(step: int) -> None:
        teacher = state.student if state.teacher is None else state.teacher
        progress.note(f"pictures: {previews.write(step, state.student, teacher)}")

    # ---- Loop. Metrics are read one step late, so that the device never waits for the host.
    batches = Batches(
        dataset.rows_by_bucket(),
        dataset.rows,
        dataset.prompt_keys,
        batch_size=effective_batch,
        seed=config.seed,
        draw=config.data.prompt_draw,
    )
    load = lambda index: (index.bucket, features.batch(index, config.accumulate))
    timer = StepTimer()
    progress = Progress(config.steps, timer)
    pending = None

    def finish(step: int, metrics) -> None:
        metrics = jax.device_get(metrics)
        seconds = timer.tick()
        speed = {"seconds": seconds, "images_per_second": effective_batch / seconds}
        writer.write({"step": step, **metrics, **speed})
        if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"]):
            raise UserError(
                f"step {step}: the loss is {metrics['loss']}, its gradient's norm "
                f"{metrics['grad_norm']}; lower config.learning_rate and start from one of the "
                f"saved steps {checkpoints.steps}"
            )
        progress.update(step, metrics["loss"], metrics["gap"], effective_batch)

    try:
        if first == 0:
            show(0)
        if first == config.steps and not all(p.exists() for p in results):
            deliver(first)  # asked for after the run was done
        timer.skip()
        for n, (bucket, contexts) in prefetch(batches, load, first, config.steps):
            latent = (config.batch_size, *pipe.latent_shape(bucket.height, bucket.width))
            with jax.set_mesh(mesh):
                contexts = sharding.put_batch(contexts, mesh)
                state, metrics = plan.step(state, pipe.split[2], contexts, latent=latent)
            if pending:
                finish(*pending)
            pending = step, _ = n + 1, metrics
            last = step == config.steps
            due = [
                every and step % every == 0
                for every in (config.checkpoint_every, config.sample_every)
            ]
            if last or any(due):
                finish(*pending)
                pending = None
                if last or due[0]:
                    save(step)
                if last or due[1]:
                    show(step)
                timer.skip()
    finally:  # a save under way is finished, whatever happened
        checkpoints.close()
        writer.close()
    print("".join(f"result: {path}\n" for path in results), end="")
    print(f"report: {write_report(workdir)}", flush=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    errors.run(main)
