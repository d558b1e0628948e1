"""Trains: python -m dopsd_jax.train --config FILE[:ARG] [--workdir DIR] [--config.FIELD=VALUE ...]

Run the same command again to resume. What it writes is described in README.md.
"""

from dopsd_jax.common import program
from dopsd_jax.config.changes import WEIGHTS, check_allowed
from dopsd_jax.config.flags import CONFIG, WORKDIR, parse
from dopsd_jax.config.schema import placeless
from dopsd_jax.parallel import cluster

OPTIONS = program.options(__name__)
ALLOW_CHANGES = OPTIONS.list(
    "allow_changes",
    [],
    "fields that may differ from the run that is continued, such as "
    "learning_rate, or data; see docs/running.md",
)

if __name__ == "__main__":
    # Wrong options end it here: the imports below take seconds.
    parse(more_checks=lambda: check_allowed(ALLOW_CHANGES.value))

import jax
from etils import epath
from ml_collections import ConfigDict

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.progress import Progress, size
from dopsd_jax.common.start_parts import StartParts, Waits, process_age
from dopsd_jax.conditioning.features import Features
from dopsd_jax.data.dataset import describe
from dopsd_jax.data.loader import Batches, prefetch
from dopsd_jax.estimation import remat
from dopsd_jax.estimation.early_step import EarlyStep
from dopsd_jax.evaluation import run_scores
from dopsd_jax.evaluation.checkpoint_scores import (
    CheckpointScores,
    check_held_out,
    find_scorers,
    order_of,
)
from dopsd_jax.parallel import multihost, sharding
from dopsd_jax.parallel.preemption import STOPPED_EXIT, StopRequest
from dopsd_jax.reporting.incidents import write_incident
from dopsd_jax.reporting.metrics import MetricsWriter
from dopsd_jax.reporting.pictures import sample_path
from dopsd_jax.reporting.previews import Previews, rows_of, write_training_pictures
from dopsd_jax.reporting.run_page import write_report
from dopsd_jax.reporting.trackers import Trackers
from dopsd_jax.run import build, data_set, heldout, origin
from dopsd_jax.run.lock import exclusive_run
from dopsd_jax.run.workdir import find_workdir, open_workdir
from dopsd_jax.training.checkpoint import Checkpoints
from dopsd_jax.training.nonfinite import Guard
from dopsd_jax.training.results import Results

WAIT_TOLD = 0.05  # seconds that a step waits for its batch; less is not worth a word


def main() -> int | None:
    config = CONFIG.value
    with multihost.together():
        workdir = find_workdir(WORKDIR.value, config)
    with exclusive_run(workdir, "training"):
        return train(config, workdir)


def train(config: ConfigDict, workdir: epath.Path) -> int | None:
    """Trains in `workdir`, which no other process uses; returns the exit status."""
    parts = StartParts(process_age())
    # ---- Devices, model, data: everything that can be wrong is found here, by all processes.
    with multihost.together():
        mesh = sharding.make_mesh(config.mesh)
        heldout.check(config)
        scorers = find_scorers(config)

    def open_run():
        pipe, revisions = build.open_pipeline(config, workdir, mesh)
        sharding.check(mesh, pipe.config, batch_size=config.batch_size)
        folder = workdir / "checkpoints"
        begun = folder.exists() and any(path.name.isdigit() for path in folder.iterdir())
        build.check_method(config, pipe, begun, CONFIG.asked)
        whole = data_set.open_data(config, workdir, pipe)
        dataset, rows, held_out = data_set.hold_out(config, whole)
        check_held_out(config, dataset, held_out, scorers.values())
        own_judge = run_scores.find_judge(config, workdir, dataset)
        facts = {"data": dataset.digest(), **revisions}
        open_workdir(workdir, config, facts, False, ALLOW_CHANGES.value)
        return pipe, dataset, rows, held_out, own_judge, facts

    pipe, dataset, rows, held_out, own_judge, facts = multihost.first_alone(open_run)
    effective_batch = config.batch_size * config.accumulate
    multihost.say(
        "\n".join([*build.notes(config, pipe), *describe(dataset, effective_batch, rows)])
    )
    parts.end("model and data")

    # ---- What the method learns from: computed once, then the encoders are freed.
    with multihost.together():
        multiple, cache = sharding.sample_devices(mesh), data_set.cache_folder(config, workdir)
        features = Features(pipe, dataset, config, cache, multiple)
    facts |= features.facts()
    multihost.need_same({**placeless(config), **facts})
    batches = Batches(
        rows,
        dataset.rows,
        dataset.prompt_keys,
        batch_size=effective_batch,
        seed=config.seed,
        draw=config.data.prompt_draw,
        dropout=config.data.caption_dropout,
        sets=dataset.sets,
    )
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints, config.keep_every)
    shapes = batches.shapes_between(checkpoints.newest, config.steps)
    early = EarlyStep(config, pipe, features, mesh, shapes)
    multihost.first_alone(features.prepare)
    about = multihost.first_alone(
        lambda: origin.header_strings(
            config,
            pipe,
            cache,
            dataset.infos.distinct() - config.data.holdout,
            bool(dataset.references),
            facts["data"],
            facts["model_revision"],
        )
    )
    if about:  # else a checkpoint holds the whole network
        facts[WEIGHTS] = about[origin.BASE_DIGEST]
        multihost.need_same({WEIGHTS: facts[WEIGHTS]})
    with multihost.together():  # only now is nothing left that a change can be refused for
        memory = remat.settle(config, pipe, features, mesh)
        chosen = build.chosen(pipe)
        own = multihost.is_first(), ALLOW_CHANGES.value, program.typed("train")
        open_workdir(workdir, config, facts, *own, chosen)
    parts.end("encoding")

    # ---- State and step.
    with jax.set_mesh(mesh):
        plan = build.make_plan(config, pipe, mesh, early.plan)
    parts.end("weights")
    multihost.say("\n".join([*plan.describe(), *features.describe(), *memory.describe()]))
    with multihost.together():
        judge = CheckpointScores(config, pipe, features, held_out, scorers.values())
    previews = Previews(pipe, features, rows_of(dataset, config.sample_rows), workdir)
    with multihost.together():
        write_training_pictures(features, rows, workdir)
    scores = run_scores.begin(own_judge, config, pipe, dataset)
    initial = pipe.hand_over()
    parts.end("base model's pictures")

    # ---- Restore.
    restored = checkpoints.restore(plan.abstract_state)
    if restored is None:
        first, state = 0, plan.initial_state(initial)
    else:
        first, state = restored
        multihost.say(f"resuming at step {first}")
    del initial
    train_step = multihost.begin_together(plan.step)
    with multihost.together():
        note = lambda line: progress.note(line)
        writer = MetricsWriter(workdir, first, write=multihost.is_first(), say=note)
    trackers = Trackers(config, workdir, first, multihost.say, write=multihost.is_first())
    guard = Guard(writer.kept)
    results = Results(workdir, config)
    checkpoint_scores = None
    if held_out:
        own = config, workdir, plan, pipe, features, held_out, mesh, first
        with multihost.together():
            checkpoint_scores = heldout.Heldout(
                *own, lambda line: progress.note(line), judge, order_of(config, scorers)
            )

    def export(step: int) -> None:
        weights = getattr(state, config.export_weights)
        plan.trained.export(pipe.folder, workdir, step, weights, about)
        results.record(plan.trained.export_paths(workdir, step))

    def score(step: int) -> None:
        files = plan.trained.export_paths(workdir, step)
        trackers.numbers({"step": step, **checkpoint_scores.score(step, state, files)})

    def mend(step: int) -> None:
        faults = results.faults(plan.trained.export_paths(workdir, step))
        if faults:
            multihost.say("\n".join(f"{fault}; it is written again" for fault in faults))
            export(step)

    def save(step: int) -> None:
        writer.flush()
        checkpoints.save(step, state)  # first: no fault of the files below costs what was learned
        if plan.trained.is_export_step(step):
            export(step)
        if checkpoint_scores:
            score(step)

    def report() -> None:
        if multihost.is_first():
            try:
                write_report(workdir)
            except (UserError, OSError) as error:  # of files that the run does not need
                progress.note(f"no report: {error}")

    def show(step: int, saved: bool = False) -> None:
        teacher = state.student if state.teacher is None else state.teacher
        tuned = getattr(state, config.export_weights)
        if saved:  # what the file gives, so that a fault of the file is seen
            places = jax.tree.map(lambda leaf: leaf.sharding, tuned)
            with multihost.together():
                tuned = plan.trained.written(workdir, step, tuned)
            tuned = jax.device_put(tuned, places)
        path = previews.write(step, tuned, teacher)
        trackers.picture(step, "samples", path)
        progress.note(f"pictures: {path}")

    # ---- Loop. Metrics are read one step late, so that the device never waits for the host.
    places = sharding.own_samples(mesh, config.batch_size)
    own = lambda index: index.part(places, config.accumulate)
    anchors = features.anchors
    places_of_anchors = anchors and sharding.own_samples(mesh, anchors.micro.size)
    load = lambda index: (
        index.shape.bucket,
        features.batch(own(index), config.accumulate),
        anchors and anchors.batch(index, places_of_anchors),
    )
    rate = lambda steps: f"{steps * effective_batch:.3g} images/s"
    quiet = not multihost.is_first()
    progress = Progress("step", config.steps, done=first, rate=rate, quiet=quiet)
    pending = None
    parts.end("state and resuming")

    def record_of(step: int, metrics, waited: float) -> dict:
        metrics = jax.device_get(metrics)
        shown = {"loss": "loss", "gap": "gap", "anchor_gap": "anchor gap"}
        numbers = [f"{text} {metrics[name]:.5g}" for name, text in shown.items() if name in metrics]
        memory = device_memory()
        numbers += [f"{size(memory)} of memory"] if memory else []
        if step > first + 1 and waited > WAIT_TOLD:
            numbers.append(f"{waited:.2g} s waited for input")
        seconds = progress.advance(text="  ".join(numbers))
        speed = {"seconds": seconds, "images_per_second": effective_batch / seconds}
        speed |= {"input_seconds": waited}
        speed |= {"peak_bytes": memory} if memory else {}
        verdict = guard.look(metrics)
        del metrics["finite"]  # the verdict names the parts
        record = {"step": step, **metrics, **verdict, **speed}
        writer.write(record)
        trackers.numbers(record)
        if checkpoint_scores:
            checkpoint_scores.look(metrics)
        return record

    def finish(step: int, metrics, waited: float) -> None:
        record = record_of(step, metrics, waited)
        fault = guard.fault(record)
        if fault is None:
            return
        if multihost.is_first():
            prompts = anchors.texts(step - 1) if anchors else ()
            batch = batches.batch(step - 1)
            path = write_incident(workdir, fault, record, batch, dataset, prompts)
            progress.note(f"step {step}: {fault}; its batch: {path}")
        if guard.must_stop(config.nonfinite):
            kept = int(state.step)  # what is not finite never enters the state
            advice = guard.advice(record, config.nonfinite, kept)
            if pending and step < pending[0] <= kept:  # the state counts a skipped step
                record_of(*pending)
            if kept > 0:
                save(kept)
                report()
            raise multihost.SharedError(advice)

    step = first
    with StopRequest() as stop, writer, trackers, checkpoints:  # it ends after the last save
        if first == 0:
            show(0)
        elif plan.trained.is_export_step(first):
            mend(first)  # the run ended before that, or other weights are exported now
        if first and checkpoint_scores and not checkpoint_scores.ranking.knows(first):
            score(first)
        parts.end("first pictures")
        early.finish()
        parts.beside["compiling"] = early.saved
        progress.skip()
        ended = checkpoint_scores and checkpoint_scores.ranking.over()
        steps = first if ended else config.steps
        inputs = Waits(prefetch(batches, load, first, steps))
        for n, (bucket, batch, held) in inputs:
            latent = (config.batch_size, *pipe.latent_shape(bucket.height, bucket.width))
            with jax.set_mesh(mesh):
                batch = sharding.put_batch(batch, mesh, config.batch_size)
                held = anchors and sharding.put_batch(held, mesh, anchors.micro.size)
                state, metrics = train_step(state, pipe.split[2], batch, n, held, latent=latent)
            if n == first:
                parts.end("compiling")
                jax.block_until_ready(metrics)
                parts.end("first step")
                progress.note(parts.describe())
                if multihost.is_first():
                    parts.write(workdir)
            before, pending = pending, (n + 1, metrics, inputs.seconds)
            step = n + 1
            if before:
                finish(*before)
            if checkpoints.failed:  # what is trained from here on could not be saved either
                finish(*pending)
                writer.flush()
                checkpoints.rescue(step, state)
            stopped, last = stop.reached(step), step == config.steps
            save_now = last or stopped or is_due(step, config.checkpoint_every)
            show_now = last or (is_due(step, config.sample_every) and not stopped)
            if save_now or show_now:
                finish(*pending)
                pending = None
                if save_now:
                    save(step)
                if show_now:
                    show(step, saved=save_now)
                if save_now and not last:
                    report()
                progress.skip()
            ended = save_now and checkpoint_scores and checkpoint_scores.ranking.over()
            if ended and not plan.trained.is_export_step(step):
                export(step)  # it became the last one when it was scored
            if (stopped and not last) or ended:
                break
        drawn = multihost.gather(sample_path(workdir, step).exists())[0]
        if not drawn and (ended or step == config.steps):
            show(step, saved=True)  # the run was killed before that, or ended between two grids
    if ended:
        progress.note(f"ended at step {step}: {checkpoint_scores.why_ended()}")
    elif step < config.steps:
        progress.note(f"stopped after step {step}, which is saved; the same command goes on")
        return STOPPED_EXIT
    for line in run_scores.finish(scores, getattr(state, config.export_weights), workdir):
        multihost.say(line)
    if checkpoint_scores:
        multihost.say("\n".join(checkpoint_scores.result()))
    mend(step)
    for path in plan.trained.export_paths(workdir, step):
        multihost.say(f"result: {path}")
    if multihost.is_first():
        print(f"report: {write_report(workdir)}", flush=True)
    return None


def device_memory() -> int | None:
    """The most bytes that a device has held so far; None where it does not tell, as a CPU."""
    found = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    return max((n for n in found if n), default=None)


def is_due(step: int, every: int) -> bool:
    """Whether `step` is an `every`-th one; 0 is never."""
    return bool(every) and step % every == 0


if __name__ == "__main__":
    cluster.run(main)
