"""The picture that opens README.md: python benchmarks/front.py

Teaches the miniature the quickstart's word by plain fine-tuning, by D-OPSD, and by D-OPSD with
anchors, then draws five prompts with each model in the deployed steps, from the same noise. Under
each column stand the scores of the quickstart's exam. Some five minutes on two cores.
"""

from pathlib import Path

import numpy as np
import paper_run
from absl import app, flags

from dopsd_jax.conditioning.encoding import STUDENT
from dopsd_jax.data.images import open_image
from dopsd_jax.evaluation.drawing import Shot
from dopsd_jax.evaluation.scorer import Case
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.miniature import concepts, world, world_scorers
from dopsd_jax.miniature.exam import Exam, ModelScores
from dopsd_jax.reporting.pictures import GridRow, save_grid
from dopsd_jax.run import data_set

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "miniature" / "dax"
ARMS = {
    "SFT": {"method": "sft"},
    "D-OPSD": {},
    "D-OPSD + anchor": {"anchor.share": 0.25},  # the quickstart
}
PROMPTS, SEED = 12, 5
OUT = flags.DEFINE_string("out", str(ROOT / "docs" / "front.png"), "the picture")
FOLDER = flags.DEFINE_string("folder", "runs/paper", "features")


def five(concept: world.Concept, word: str) -> list[Case]:
    """The word alone, in two arrangements, and two named objects."""
    asked = {"concepts": 2, "ordinary": 0, "bare": 1, "opened": 2, "seed": SEED}
    return world_scorers.cases(concept, word, **asked)


def note(scores: ModelScores, base: ModelScores) -> str:
    kept = "-" if scores.retention is None else f"{scores.retention / base.retention:.2f}"
    crisp = scores.crispness / base.crispness
    return f"identity {scores.identity:.2f}\ncrispness {crisp:.2f}\nretention {kept}"


def draw(exam: Exam, cases: list[Case], trained) -> list[np.ndarray]:
    shots = [Shot(case, 0) for case in cases]
    found = {id(shot.case): image for shot, image in exam.painter.draw(trained, shots, STUDENT)}
    return [found[id(case)] for case in cases]


def exam_of(pipe: Pipeline, config, concept, word) -> Exam:
    rows = data_set.open_rows(config, DATA).rows
    shown = [open_image(row.image, data_set.limits(config)) for row in rows]
    asked = {"concepts": PROMPTS, "ordinary": 2 * PROMPTS, "shown": shown}
    return Exam(pipe, config.teacher, world_scorers.cases(concept, word, **asked))


def main(_) -> None:
    word, concept = concepts.read_concept(DATA / concepts.FILE)
    bench = paper_run.bench(Path(FOLDER.value))
    config = bench.config(DATA, {})
    pipe, start = bench.pipe_of(config), bench.start(config, 0)
    exam, cases = exam_of(pipe, config, concept, word), five(concept, word)
    for _ in exam.painter.encode(cases, STUDENT):
        pass
    true = [world.pictures([case.truth])[0] for case in cases]
    base = exam.student("base", start)
    columns = {"a true picture": true, "base": draw(exam, cases, start)}
    notes = ["", note(base, base)]
    for name, fields in ARMS.items():
        student, _ = bench.train(bench.config(DATA, fields), 0, start, {})
        scores = exam.student(name, student)
        columns[name] = draw(exam, cases, student)
        notes.append(note(scores, base))
        print(name, notes[-1].replace("\n", ", "), flush=True)
    cells = zip(*columns.values(), strict=True)
    rows = [GridRow(case.prompt, images) for case, images in zip(cases, cells, strict=True)]
    save_grid(OUT.value, list(columns), rows, notes=notes, cell=192)
    print(OUT.value)


if __name__ == "__main__":
    app.run(main)
