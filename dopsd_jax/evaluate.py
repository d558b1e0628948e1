"""Scores with intervals: python -m dopsd_jax.evaluate --config FILE[:ARG] [--workdir RUN] ...

Draws the same prompts from the same noise with the base model, the teacher (the base model that is
also shown the target picture) and the tuned model, and compares them. The tuned model is the newest
result of a run (--workdir), a LoRA file (--lora) or a model folder (--model); without any of these,
base and teacher alone are compared. What was drawn and scored is kept in --out: the same command
again does only what is missing. See docs/evaluation.md.
"""

import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dopsd_jax.common import program
from dopsd_jax.common.files import expand
from dopsd_jax.config.flags import CONFIG, WORKDIR, parse
from dopsd_jax.evaluation import seeds

OPTIONS = program.options(__name__)
LORA = OPTIONS.loras(
    "lora", [], "LoRA file of the tuned model, or FILE:STRENGTH; given several times, they add up"
)
MODEL = OPTIONS.path("model", None, "model folder of a full run, the tuned model")
OUT = OPTIONS.path("out", None, "folder of the evaluation; default: WORKDIR/evaluation")
PROMPTS = OPTIONS.path("prompts", None, "file of test prompts: .txt, one per line, or .jsonl")
CLASS_WORD = OPTIONS.string("class_word", "", "class of [V], such as dog, for scorers of texts")
ROWS = OPTIONS.integer("rows", 4, "largest number of rows of the data set", 1, 10**6)
COUNT = OPTIONS.integer("count", 24, "prompts, for data sets with a judge", 1, 10**6)
SEEDS = OPTIONS.integer("seeds", 4, "pictures per prompt", 1, seeds.MOST)
FIRST_SEED = OPTIONS.integer("first_seed", seeds.BASE, "first seed of the noise", 0, 2**31 - 1)
SCORERS = OPTIONS.list("scorers", None, "names, or module:attribute; default: all that apply")
CLIP = OPTIONS.path("clip", None, "folder or hub id of CLIP, for CLIP-S")
DINO = OPTIONS.path("dino", None, "folder or hub id of DINOv3, for DINO-D")
VGG = OPTIONS.path("vgg", None, "folder or hub id of VGG-16, for LPIPS-D")
LPIPS_WEIGHTS = OPTIONS.path("lpips_weights", None, "file of LPIPS's linear layers, safetensors")
TORCH_DEVICE = OPTIONS.string("torch_device", "cpu", "device of the PyTorch scorers")
BATCH = OPTIONS.integer("batch", None, "pictures drawn together", 1, 65536)

if __name__ == "__main__":
    parse(strict=False)  # wrong options end it here: the imports below take seconds

from ml_collections import ConfigDict

from dopsd_jax.common.atomic import write_text
from dopsd_jax.common.config_fields import highest
from dopsd_jax.common.errors import Attempts, UserError, raise_if
from dopsd_jax.conditioning.encoding import TO_BUCKET
from dopsd_jax.config import schema
from dopsd_jax.data.images import open_image
from dopsd_jax.data.prepared_parts import names_prepared
from dopsd_jax.evaluation import (
    appearance,
    data_judges,
    gathering,
    prompts,
    results,
    torch_scorers,
    verdict,
)
from dopsd_jax.evaluation import arms as models
from dopsd_jax.evaluation.arms import Arm, Tuned
from dopsd_jax.evaluation.data_judges import DataJudge
from dopsd_jax.evaluation.drawing import Shot
from dopsd_jax.evaluation.gallery import Gallery
from dopsd_jax.evaluation.page import page
from dopsd_jax.evaluation.results import Score
from dopsd_jax.evaluation.scorer import Case, Judge, PairScorer, judges, load_scorers
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods import registry
from dopsd_jax.parallel import sharding
from dopsd_jax.reporting.html_page import concept
from dopsd_jax.reporting.pictures import GridRow, filled, reference_columns
from dopsd_jax.run import build, data_set
from dopsd_jax.run.lock import exclusive_run
from dopsd_jax.run.workdir import versions


def main() -> None:
    attempt = Attempts()
    out = attempt(output_folder)
    attempt.end()
    with exclusive_run(out, "evaluation"):
        evaluate(CONFIG.value, out)


def evaluate(config: ConfigDict, out: Path) -> None:
    """Draws, scores and writes the evaluation to `out`."""
    # ---- Everything that can be wrong is found before anything is drawn.
    attempt = Attempts()
    gallery = Gallery(out)
    tuned = attempt(lambda: find_tuned(config))
    home = expand(WORKDIR.value) if WORKDIR.value else out
    own = attempt(lambda: find_judge(config, home))
    scorers = attempt(lambda: find_scorers(own)) or []
    tests = attempt(lambda: prompts.read_prompts(PROMPTS.value)) if PROMPTS.value else []
    mesh = attempt(lambda: sharding.make_mesh(config.mesh))
    opened = attempt(lambda: build.open_pipeline(config, home, mesh, True))
    attempt.end()
    pipe, origin = opened
    cases = find_cases(config, home, pipe, own, tests, scorers)
    cache = data_set.cache_folder(config, home)
    batch = BATCH.value or (config.batch_size if own is None else own.batch)
    every = models.make_arms(config, pipe, tuned, cache, batch)
    every[0].painter.check(cases)
    scorers = fitting(scorers, cases)

    # ---- Pictures, then scores; then the table.
    counted = {case.kind: sum(c.kind == case.kind for c in cases) for case in cases}
    kinds = ", ".join(f"{count} {kind}" for kind, count in counted.items())
    for note in pipe.notes():
        print(note)
    print(f"prompts: {kinds}; {SEEDS.value} pictures each of {', '.join(a.name for a in every)}")
    gathering.draw(every, cases, SEEDS.value, gallery)
    scores = [gathering.judge(s, every, cases, SEEDS.value, gallery) for s in scorers]
    cells, notes = results.table(scores, [a.name for a in every]), results.notes(scores)
    said = verdict.sentence(verdict.findings(scores))
    print("\n".join(["", *results.lines(cells), *notes, "", *([said, ""] if said else [])]))
    facts = {
        "verdict": said,
        "config": schema.flat(config),
        "facts": {**origin, "tuned": str(tuned) if tuned else None},
        "pictures": {
            "per_prompt": SEEDS.value,
            "first_seed": FIRST_SEED.value,
            "grid": list(every[0].painter.grid(cases[0])),
            "rule": "first_seed + 100 row (+ k + 1 for test k) + 1000000 picture",
        },
        "versions": versions(),
        "weights": {arm.name: arm.weights for arm in every},
    }
    tones = results.tones(scores, [a.name for a in every])
    write(out, cells, tones, notes, scores, every, cases, gallery, facts)


def output_folder() -> Path:
    """--out, or a folder in the work directory. Raises `UserError` if the options clash."""
    given = [f"--{f.name}" for f in (WORKDIR, LORA, MODEL) if f.value]
    faults = []
    if len(given) > 1:
        faults.append(f"{' and '.join(given)}: each names the tuned model; give one of them")
    if not OUT.value and not WORKDIR.value:
        faults.append("--out: is needed without --workdir; name a folder for pictures and scores")
    raise_if(faults)
    return expand(OUT.value or Path(WORKDIR.value) / "evaluation")


def find_tuned(config: ConfigDict) -> Tuned | None:
    """What the options name, looked for but not loaded."""
    if WORKDIR.value:
        return models.of_run(WORKDIR.value, config)
    if LORA.value:
        missing = [path for path, _ in LORA.value if not os.path.exists(path)]
        raise_if(f"--lora {path}: no such file" for path in missing)
        return Tuned(tuple(LORA.value))
    if MODEL.value:
        path = expand(MODEL.value)
        if not os.path.isdir(path / "transformer"):
            raise UserError(f"--model {MODEL.value}: is no model folder (it has no transformer/)")
        return Tuned(model=path)
    return None


def find_judge(config: ConfigDict, home: Path) -> DataJudge | None:
    """The data set's own judge; None for most data sets."""
    if names_prepared(config.data.path):
        raise UserError(
            f"config.data.path {config.data.path}: is prepared and has no pictures; name the data "
            "set that it was made from"
        )
    return data_judges.find(*data_set.data_paths(config, home))


def find_scorers(judge: DataJudge | None) -> list[Judge]:
    """Those of --scorers, or all that fit the data set."""
    own = {} if judge is None else dict(judge.scorers())
    usual = appearance.scorers() | torch_scorers.scorers(
        CLIP.value or torch_scorers.CLIP,
        DINO.value or torch_scorers.DINO,
        VGG.value or torch_scorers.VGG,
        LPIPS_WEIGHTS.value or "",
        TORCH_DEVICE.value,
    )
    names = SCORERS.value or list(own or usual)
    if not SCORERS.value and not own and not LPIPS_WEIGHTS.value:
        names.remove("lpips")
        print("LPIPS-D is left out: it needs --lpips_weights, see docs/evaluation.md")
    return load_scorers(names, own | usual)


def fitting(scorers: Sequence[Judge], cases: Sequence[Case]) -> list[Judge]:
    """Those that have something to judge. Raises `UserError` for others that the user named."""
    faults = {}
    for scorer in scorers:
        least = scorer.least if isinstance(scorer, PairScorer) else 1
        if not any(judges(scorer, case) for case in cases):
            faults[scorer.name] = "judges none of these prompts"
        elif SEEDS.value < least:
            faults[scorer.name] = f"needs --seeds={least} or more pictures of a prompt"
    if SCORERS.value:
        raise_if(f"--scorers: {name} {fault}; leave it out" for name, fault in faults.items())
    for name, fault in faults.items():
        print(f"{name} is left out: it {fault}")
    return [scorer for scorer in scorers if scorer.name not in faults]


def find_cases(
    config: ConfigDict,
    home: Path,
    pipe: Pipeline,
    own: DataJudge | None,
    tests: Sequence[prompts.Test],
    scorers: Sequence[Judge],
) -> list[Case]:
    """The prompts to draw."""
    config = unvaried(config)
    if own is None:
        dataset = data_set.open_data(config, home, pipe)
        return prompts.cases(
            dataset,
            tests,
            rows=ROWS.value,
            class_word=CLASS_WORD.value,
            limits=data_set.limits(config),
            scored_text=any("prompt" in scorer.needs for scorer in scorers),
            first_seed=FIRST_SEED.value,
            words=(config.anchor.concept_word, config.data.trigger),
            teacher_key=registry.teacher_key(config),
            cuts_references=config.data.reference_crop == TO_BUCKET,
        )
    if tests:
        raise UserError(
            "--prompts: this data set's own judge chooses the prompts; leave it out, or set --count"
        )
    rows = data_set.open_rows(config, home).rows
    shown = [open_image(row.image, data_set.limits(config)) for row in rows]
    return own.cases(COUNT.value, shown, FIRST_SEED.value)


def unvaried(config: ConfigDict) -> ConfigDict:
    """The configuration with every picture in one row: whole, not mirrored, at its largest.

    So that rows have the same numbers, and with them the same noise, whatever a run makes of them.
    """
    plain = config.copy_and_resolve_references()
    plain.data.flip, plain.data.crops, plain.data.folder_repeats = False, 1, False
    with plain.ignore_type():
        plain.data.resolution = highest(config.data.resolution)
    return plain


def write(
    out: Path,
    cells: list[list[str]],
    tones: list[list[str]],
    notes: list[str],
    scores: Sequence[Score],
    every: Sequence[Arm],
    cases: Sequence[Case],
    gallery: Gallery,
    facts: dict[str, Any],
) -> None:
    """scores.json and evaluation.html."""
    asked = [
        {"kind": c.kind, "prompt": c.prompt, "text": c.text, "seed": c.seed,
         "height": c.height, "width": c.width}
        for c in cases
    ]  # fmt: skip
    content = {"format": 2, **facts, "prompts": asked}
    content["scores"] = {score.name: score.as_json() for score in scores}
    write_text(out / "scores.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    rows, references = [], reference_columns(case.references for case in cases)
    for case in cases:
        shown = [
            gallery.picture(arm.key(Shot(case, 0))) if arm.painter.asked(case, arm.role) else None
            for arm in every
        ]
        edited = filled(case.references, len(references))
        rows.append(GridRow(f"{case.kind}: {case.prompt}", (*edited, case.target, *shown)))
    text = {
        name: value if isinstance(value, str) else json.dumps(value)
        for part in ("facts", "pictures", "versions", "weights", "config")
        for name, value in facts[part].items()
    }
    columns = [*references, "target", *(arm.name for arm in every)]
    tuned = facts["facts"]["tuned"]
    about = [f"tuned: {tuned}" if tuned else "base and teacher alone", f"{len(cases)} prompts"]
    about += [f"{SEEDS.value} pictures each", datetime.date.today().isoformat()]
    told = about, facts["verdict"], cells, tones, notes, columns, rows, text
    content = page(concept(facts["config"], out.name), *told, program.typed("evaluate"))
    write_text(out / "evaluation.html", content.encode("utf-8", "replace").decode())
    print(f"scores: {out / 'scores.json'}\npage: {out / 'evaluation.html'}", flush=True)


if __name__ == "__main__":
    program.run(main)
