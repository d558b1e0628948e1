"""The paper's experiment on the miniature: which method learns a concept, and what it costs.

    python benchmarks/paper.py                 # trains what is missing, then writes the page
    python benchmarks/paper.py --only=page     # the page alone
    python benchmarks/paper.py --arms=dopsd,sft --train=lora --seeds=1

Every run is a line of docs/results.jsonl; a second call goes on where the first was stopped.
`--students=endpoint=DIR` names folders of students that are not shipped. The page is
docs/results.md, its pictures are beside it; they need `pip install -e '.[bench]'`.
"""

import dataclasses
import functools
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import managers
from pathlib import Path

import paper_arms
from absl import app, flags
from paper_arms import Arm
from paper_records import append, read

from dopsd_jax.common.progress import Progress

DOCS = Path(__file__).parents[1] / "docs"
# Two processes of a thread each do more than one of two threads; and for narrow networks.
COMPILER = (
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 "
    "--xla_cpu_prefer_vector_width=512 --xla_cpu_enable_fast_math=true"
)
ONLY = flags.DEFINE_enum("only", "all", ["all", "runs", "page"], "what to do")
RESULTS = flags.DEFINE_string("results", str(DOCS / "results.jsonl"), "a line a run; added to")
PAGE = flags.DEFINE_string("page", str(DOCS / "results.md"), "the page")
FOLDER = flags.DEFINE_string("folder", "runs/paper", "data sets and features")
WORKERS = flags.DEFINE_integer("workers", 2, "processes, of one thread each", lower_bound=1)
ARMS = flags.DEFINE_list("arms", [], "only these arms")
TRAIN = flags.DEFINE_list("train", [], "only lora or full")
SEEDS = flags.DEFINE_integer("seeds", paper_arms.SEEDS, "only so many seeds", lower_bound=1)
CONCEPTS = flags.DEFINE_integer("concepts", paper_arms.CONCEPTS, "only so many", lower_bound=1)
STUDENTS = flags.DEFINE_list("students", [], "name=folder of other students; else not run")


def main(_) -> None:
    if ONLY.value != "page":
        run_all()
    if ONLY.value != "runs":
        import paper_page

        try:
            paper_page.write(Path(RESULTS.value), Path(PAGE.value), Path(FOLDER.value))
        except ModuleNotFoundError as error:
            sys.exit(f"error: {error}; the figures need: pip install -e '.[bench]'")


def run_all() -> None:
    """Trains every run that has no line yet."""
    known = {arm.name for arm in paper_arms.arms()}
    wrong = [f"--arms: {name!r} is not one of {', '.join(sorted(known))}"
             for name in ARMS.value if name not in known]  # fmt: skip
    wrong += [f"--train: {name!r} is not lora or full"
              for name in TRAIN.value if name not in paper_arms.RATES]  # fmt: skip
    students = dict(text.partition("=")[::2] for text in STUDENTS.value)
    wrong += [f"--students: {name!r} is not one of {', '.join(paper_arms.STUDENTS)}"
              for name in students if name not in paper_arms.STUDENTS]  # fmt: skip
    if wrong:
        sys.exit("\n".join(f"error: {line}" for line in wrong))
    done = {record["key"] for record in read(Path(RESULTS.value))}
    wanted = [
        arm
        for arm in paper_arms.arms()
        if (not ARMS.value or arm.name in ARMS.value)
        and (not TRAIN.value or arm.train in TRAIN.value)
        and arm.student in {paper_arms.SHIPPED, *students}
    ]
    missing, total = [], 0  # some runs of an arm at a time: they share a program
    for arm in wanted:
        runs = [
            (arm, c, s)
            for c, s in arm.runs
            if c < CONCEPTS.value and s < SEEDS.value and arm.key(c, s) not in done
        ]
        missing += [runs] if runs else []
        total += len(runs)
    progress = Progress("run", total, every=0)
    print(f"{total} runs to do", flush=True)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILER}"
    spawn = multiprocessing.get_context("spawn")
    with (
        managers.SyncManager(ctx=spawn) as manager,
        ProcessPoolExecutor(WORKERS.value, spawn, end_with_parent) as pool,
    ):
        finished = manager.Queue()
        tasks = [
            pool.submit(run_some, runs, FOLDER.value, students, RESULTS.value, finished)
            for runs in missing
        ]
        while progress.done < total:
            failed = next((t.exception() for t in tasks if t.done() and t.exception()), None)
            if failed:
                print(f"error: {failed!r}; ends when the runs under way are done", flush=True)
                pool.shutdown(cancel_futures=True)
                raise failed
            try:
                line = finished.get(timeout=5)
            except queue.Empty:
                continue
            progress.advance(text=line)


def run_some(
    runs: Sequence[tuple[Arm, int, int]],
    folder: str,
    students: Mapping[str, str],
    results: str,
    finished,
) -> None:
    """Runs that share a program, in one process."""
    import paper_run  # imports jax, which reads XLA_FLAGS once
    import paper_states
    import paper_words

    from dopsd_jax.common import compile_cache

    compile_cache.keep()
    bench = paper_run.bench(Path(folder), tuple(students.items()))
    states, words = (functools.partial(part.run, bench) for part in (paper_states, paper_words))
    ways = {
        "alone": bench.run, "sequence": bench.sequence, "states": states, "words": words
    }  # fmt: skip
    for arm, concept, seed in runs:
        begun = time.process_time()
        found = ways[arm.kind](arm, concept, seed)
        record = {"key": arm.key(concept, seed), **dataclasses.asdict(arm), "concept": concept,
                  "seed": seed, **found,
                  "cpu_seconds": round(time.process_time() - begun, 1)}  # fmt: skip
        append(Path(results), record)
        finished.put(f"{record['key']}: {paper_run.shown(found)}")


def end_with_parent() -> None:
    """This process does not outlive the one that started it, however that one ends."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    app.run(main)
