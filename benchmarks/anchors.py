"""How many anchors, and which: D-OPSD on the miniature with none, some and many.

    python benchmarks/anchors.py                   # trains what is missing, then writes the page
    python benchmarks/anchors.py --part=0 --parts=2   # half of the arms; another process the rest
    python benchmarks/anchors.py --only_page

Every run is a line of docs/anchors.jsonl; a second call goes on where the first was stopped. The
page is docs/anchors.md. Concepts, prompts and noise are those of paper.py.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from paper_records import append, read

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "anchors.jsonl", DOCS / "anchors.md"
CONCEPTS, SEEDS = (0, 1, 2), (0, 1)
STEPS, BATCH, OTHERS = 100, 6, 12
WORLD_PROMPTS, WORLD_SEED = 96, 515
# Name: share of anchors, and the kinds of their prompts; `world`: ordinary ones of the miniature.
ARMS = {
    "none": (0.0, ""),
    "1/8": (0.125, "world"),
    "1/4": (0.25, "world"),
    "1/2": (0.5, "world"),
    "1/4, half of them new words": (0.25, "world,new_words"),
    "1/2, half of them new words": (0.5, "world,new_words"),
}
COLUMNS = {
    "concept IoU": "concept",
    "concept crispness": "its crispness",
    "retention": "retention",
    "ordinary crispness": "ordinary crispness",
    "leaked concept": "leak",
}
HEAD = f"""# How many anchors, and which

Made by `python benchmarks/anchors.py` from `docs/anchors.jsonl`; do not edit. The quickstart's
D-OPSD on the miniature: {STEPS} steps of {BATCH} rows, {len(CONCEPTS)} concepts and {len(SEEDS)}
seeds; means over the runs, and their standard deviations.

*concept*: IoU with the target in unseen arrangements; *its crispness*: of the edges, relative to
the targets'; *retention*: ordinary prompts whose shape and colour are still right; *leak*: IoU with
the concept under {OTHERS} other new words, which should stay the base's.
"""
PART = flags.DEFINE_integer("part", 0, "which part of the runs, from 0", lower_bound=0)
PARTS = flags.DEFINE_integer("parts", 1, "of how many", lower_bound=1)
FOLDER = flags.DEFINE_string("folder", "runs/paper", "data sets and features")
ONLY_PAGE = flags.DEFINE_bool("only_page", False, "train nothing")


def key(arm: str, concept: int, seed: int) -> str:
    return f"{arm}|{concept}|{seed}"


def main(_) -> None:
    known = {record["key"] for record in read(RESULTS)}
    arms = list(ARMS)[PART.value :: PARTS.value]  # by arm: each is compiled in one process only
    runs = [(arm, c, s) for s in SEEDS for c in CONCEPTS for arm in arms]
    todo = [run for run in runs if key(*run) not in known]
    if todo and not ONLY_PAGE.value:
        train(todo)
    write_page(read(RESULTS))


def train(todo: Sequence[tuple[str, int, int]]) -> None:
    """Runs and records each of them."""
    import paper_run

    from dopsd_jax.conditioning.encoding import TEACHER
    from dopsd_jax.miniature.exam import Exam

    bench, exams = paper_run.bench(Path(FOLDER.value)), {}
    prompts = world_prompts(Path(FOLDER.value))
    for number, (arm, concept, seed) in enumerate(todo, 1):
        lesson, (share, kinds) = bench.lesson(concept), ARMS[arm]
        fields = {"steps": STEPS, "batch_size": BATCH}
        if share:
            kinds = kinds.replace("world", str(prompts))
            fields |= {"anchor.share": share, "anchor.prompts": kinds}
            fields |= {"anchor.concept_word": lesson.word}
        config = bench.config(lesson.path, fields)
        pipe, start = bench.pipe("lora", config.lora.rank), bench.start(config, seed)
        if concept not in exams:
            own = Exam(
                pipe, config.teacher, lesson.concept, lesson.word, count=paper_run.PROMPTS,
                others=OTHERS,
            )  # fmt: skip
            base, teacher = own.values(start), own.values(start, TEACHER)
            exams[concept] = own, paper_run.means(base), paper_run.means(teacher)
        exam, base, teacher = exams[concept]
        student, _ = bench.train(config, seed, start, {})
        found = paper_run.means(exam.values(student))
        record = {"key": key(arm, concept, seed), "arm": arm, "concept": concept, "seed": seed}
        append(RESULTS, record | {"scores": found, "base": base, "teacher": teacher})
        shown = ", ".join(f"{COLUMNS[name]} {found[name]:.3f}" for name in COLUMNS)
        print(f"{number}/{len(todo)} {record['key']}: {shown}", flush=True)


def world_prompts(folder: Path) -> Path:
    """A file of ordinary prompts of the miniature's world; none is of the exams."""
    from dopsd_jax.miniature import captions, world

    rng = np.random.default_rng(WORLD_SEED)
    scenes = [world.random_scene(rng) for _ in range(WORLD_PROMPTS)]
    path = folder / "world_prompts.txt"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{captions.caption(scene, rng)}\n" for scene in scenes))
    return path


def write_page(records: Sequence[dict]) -> None:
    """docs/anchors.md."""
    by_arm = defaultdict(list)
    for record in records:
        by_arm[record["arm"]].append(record["scores"])
    if not by_arm:
        sys.exit(f"error: {RESULTS}: holds no runs yet")
    base = [record["base"] for record in records]
    teacher = [record["teacher"] for record in records]
    lines = [
        HEAD,
        "| anchors | runs | " + " | ".join(COLUMNS.values()) + " |",
        "|---|--:|" + "--:|" * len(COLUMNS),
    ]
    row = lambda name, scores: (
        f"| {name} | {len(scores)} | "
        + " | ".join(_cell(scores, column) for column in COLUMNS)
        + " |"
    )
    lines += [row("*base, not trained*", base), row("*teacher, with the picture*", teacher)]
    lines += [row(arm, by_arm[arm]) for arm in ARMS if by_arm[arm]]
    PAGE.write_text("\n".join(lines) + "\n")
    print(f"page: {PAGE}")


def _cell(scores: Sequence[dict], column: str) -> str:
    values = [own[column] for own in scores if column in own]
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}" if values else ""


if __name__ == "__main__":
    app.run(main)
