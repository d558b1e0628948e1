"""report.html: one page about a run."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from PIL import Image

from dopsd_jax.common.atomic import write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import open_regular
from dopsd_jax.common.json_files import read_json
from dopsd_jax.common.progress import duration
from dopsd_jax.data.images import DECODE_ERRORS
from dopsd_jax.methods.registry import METHODS
from dopsd_jax.reporting import html_page, run_account, run_settings, shown_pictures
from dopsd_jax.reporting.charts import Series, chart, drawable, number
from dopsd_jax.reporting.metrics import FILE, read_metrics
from dopsd_jax.reporting.pictures import TRAINING, read_labels, sample_files
from dopsd_jax.reporting.shown_pictures import Round
from dopsd_jax.training import nonfinite
from dopsd_jax.training import ranking as checkpoint_ranking

CONFIG, SCORES, REPORT = "config.json", "scores.json", "report.html"
ROUNDS = 16  # at most so many rounds of pictures: the first, the last, and some evenly between

# Field, title, note, unit, and whether a logarithmic axis suits it.
CURVES = (
    ("loss", "Loss", "mean over noise levels", "loss", True),
    ("loss_per_step", "Loss per denoising step", "of each step of the sampler", "loss", True),
    ("gap", "Gap", "{gap}, root mean square", "gap", True),
    (
        "norm_ratio",
        "Length of the velocity",
        "student over what it is pulled to; with a teacher, below 1: haze",
        "ratio",
        False,
    ),
    (
        "anchor_gap",
        "Anchor gap",
        "student and start on ordinary prompts: what was forgotten",
        "gap",
        True,
    ),
    ("grad_norm", "Gradient norm", "before clipping", "norm", True),
    ("lr", "Learning rate", "", "rate", False),
    ("images_per_second", "Throughput", "training pictures", "images/s", False),
)
OF_SOME = ("anchor_gap", "norm_ratio")  # fields that only some runs have
FIRST_COMPILES = ("images_per_second",)  # whose first value after a start is no measure


def holds_run(workdir: str | os.PathLike) -> bool:
    """Whether a training wrote into this folder; a path that is no folder counts as one."""
    workdir = epath.Path(workdir).expanduser()
    return not workdir.is_dir() or any((workdir / name).exists() for name in (FILE, CONFIG))


def write_report(workdir: str | os.PathLike) -> epath.Path:
    """Writes `workdir`/report.html from what the run has written; returns its path.

    What is not there yet is said to be missing. What was written of later steps than the last one
    recorded is left out: the run went back behind it. Raises `UserError` for broken files.
    """
    workdir = epath.Path(workdir).expanduser()
    if not workdir.is_dir():
        raise UserError(f"{workdir}: is not a folder; give the --workdir of a run")
    records = read_metrics(workdir / FILE)
    content, scores = _read_object(workdir / CONFIG), _read_object(workdir / SCORES)
    last = records[-1]["step"] if records else math.inf
    ranking = _ranked(_read_object(workdir / checkpoint_ranking.FILE), last)
    config = content.get("config")
    config = config if isinstance(config, dict) else {}
    incidents = sorted(
        (p for p in (workdir / nonfinite.FOLDER).glob("step_*.json") if _step(p.stem) <= last),
        key=lambda p: (len(p.name), p.name),
    )
    listed = [(path.name, _read_object(path)) for path in incidents[: run_account.LISTED]]
    gap = METHODS.get(str(config.get("method")), METHODS["dopsd"]).gap
    parts = (
        _summary(records, config),
        run_account.warnings(records, listed, len(incidents), ranking, gap),
        html_page.section("Pictures", _samples(workdir, last)),
        _result(workdir, config, ranking, last),
        _scores(scores),
        _checkpoints(ranking),
        html_page.section("Curves", f'<div class="curves">{_curves(records, gap)}</div>'),
        _training_pictures(workdir),
        run_settings.command(content),
        html_page.section("Settings", run_settings.changes(content), run_settings.show(content)),
    )
    full = config.get("train") == "full"
    known = run_settings.text_of
    about = (
        known(content.get("started", "")),
        f"method {known(config['method'])}" if config.get("method") else "",
        f"base model {_short(known(config['model']))}" if config.get("model") else "",
        f"run {workdir.name or workdir.resolve().name}",
    )
    verdict = scores.get("verdict")
    if not isinstance(verdict, str) or not verdict:
        verdict = run_account.sentence(records, gap)
    title = html_page.concept(config, workdir.name or workdir.resolve().name)
    adapters = "LoKr" if config.get("lora.kind") == "lokr" else "LoRA"
    kind = "Fine-tuned model" if full else adapters
    write_text(workdir / REPORT, html_page.render(kind, title, about, verdict, parts))
    return workdir / REPORT


def _read_object(path: epath.Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    found, _ = read_json(path, again="restore or remove it")
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; restore or remove it")
    return found


def _ranked(ranking: Mapping[str, Any], last: float) -> Mapping[str, Any]:
    """The file of the ranking, without checkpoints after the step `last`."""
    rows = ranking.get("checkpoints")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    rows = [row for row in rows if not drawable(row.get("step")) or row["step"] <= last]
    best = ranking.get("best")
    known = any(row.get("step") == best for row in rows)
    return {**ranking, "checkpoints": rows, "best": best if known else None}


def _summary(records: Sequence[Mapping], config: Mapping[str, Any]) -> str:
    if not records:
        return "<p>No step has been recorded yet.</p>"
    last, total = records[-1], config.get("steps")
    facts = [("step", f"{last['step']} of {total}" if total else str(last["step"]))]
    labels = {"loss": "last loss", "gap": "last gap", "anchor_gap": "last anchor gap"}
    for field, label in (labels | {"lr": "learning rate"}).items():
        if drawable(last.get(field)):
            facts.append((label, number(last[field])))
    rates = sorted(r["images_per_second"] for r in records if drawable(r.get("images_per_second")))
    if rates:
        facts.append(("images/s, median", number(rates[len(rates) // 2])))
    seconds = [r["seconds"] for r in records if drawable(r.get("seconds"))]
    if seconds:
        facts.append(("time in steps", duration(sum(seconds))))
    if drawable(last.get("peak_bytes")):
        facts.append(("memory", f"{last['peak_bytes'] / 2**30:.1f} GiB"))
    return html_page.facts(facts)


def _short(path: str) -> str:
    """The last two parts of a path, or a hub's name."""
    return "/".join(path.split("/")[-2:])


def _file(workdir: epath.Path, step: int) -> epath.Path | None:
    """The weights that were written at a step, if they were."""
    places = (
        f"lora/step_{step}.safetensors",
        f"model/step_{step}",
        f"model/step_{step}.safetensors",
    )
    return next((workdir / place for place in places if (workdir / place).exists()), None)


def _step(stem: str) -> int:
    """The step in a file's name; 0 without one."""
    return int(stem[5:]) if stem[5:].isdecimal() else 0


def _steps(workdir: epath.Path, last: float) -> list[int]:
    """Steps whose weights were written, up to the step `last`."""
    names = [
        path.stem for folder in ("lora", "model") for path in (workdir / folder).glob("step_*")
    ]
    steps = {int(name[5:]) for name in names if name[5:].isdecimal()}
    return sorted(step for step in steps if step <= last and _file(workdir, step))


def _result(
    workdir: epath.Path, config: Mapping[str, Any], ranking: Mapping[str, Any], last: float
) -> str:
    """Where the newest weights are, or the best, and how to draw with them."""
    steps = _steps(workdir, last)
    if not steps:
        return ""
    path, why = _file(workdir, steps[-1]), f"step {steps[-1]}"
    best = workdir / "lora" / checkpoint_ranking.BEST
    if best.exists() and ranking["best"] is not None:  # else it may be of another ranking
        path, why = best, f"the best checkpoint, step {run_settings.text_of(ranking['best'])}"
    parts = [html_page.copied(str(path))]
    model = config.get("model")
    if path.parent.name == "lora" and isinstance(model, str) and model != "random":
        word = html_page.concept(config, "")
        parts.append(html_page.remark("Draw with it:"))
        edits = bool(config.get("data.references"))
        drawn = run_settings.sample_command(model, path, word, edits)
        parts.append(html_page.copied(drawn))
    return html_page.section(f"The file: {why}", *parts)


def _scores(scores: Mapping[str, Any]) -> str:
    """The table that a run on the miniature ends with: a score a row, a model a column."""
    rows = scores.get("rows")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not rows:
        return ""
    names = [
        name for name in dict.fromkeys(name for row in rows for name in row) if name != "model"
    ]
    models = [run_settings.text_of(row.get("model", "")) for row in rows]
    found = dict(zip(models, rows, strict=True))
    compared = {"base", "tuned"} <= found.keys()
    body = []
    for name in names:
        cells = [_cell(row.get(name)) for row in rows]
        if compared:
            pair = [found[model].get(name) for model in ("tuned", "base")]
            cells.append(f"{pair[0] - pair[1]:+.3f}" if all(map(drawable, pair)) else "")
        body.append((name, *cells))
    head = ("", *models, *(["tuned - base"] if compared else []))
    notes = str(scores.get("note", "")).split("; ")
    return html_page.section(
        "Scores", html_page.table(head, body, "scores"), html_page.remark(*filter(None, notes))
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    is_float = isinstance(value, float) and drawable(value)
    return f"{value:.3f}" if is_float else run_settings.text_of(value)


def _checkpoints(ranking: Mapping[str, Any]) -> str:
    """The checkpoints' scores, as `training.ranking` keeps them."""
    rows = ranking["checkpoints"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return ""
    body = [[_cell(row.get(name)) for name in names] for row in rows]
    best, by = run_settings.text_of(ranking.get("best")), ranking.get("ranked_by")
    by = by if isinstance(by, dict) else {}
    score, end = by.get("score"), "highest" if by.get("better") == "higher" else "lowest"
    score = "gap" if score in (checkpoint_ranking.GAP, None) else run_settings.text_of(score)
    note = f"The {score} on pictures that are not trained on is {end} at step {best}."
    return html_page.section(
        "Checkpoints", html_page.table(names, body, "scores"), html_page.remark(note)
    )


def _curves(records: Sequence[Mapping], gap: str) -> str:
    drawn = []
    for field, title, note, unit, log in CURVES:
        found = [(record["step"], record[field]) for record in records if field in record]
        if not found and field in OF_SOME:
            continue
        remark = ""
        if field in FIRST_COMPILES and len(found) > 2:
            remark, found = f"without step {found[0][0]}, which compiles", found[1:]
        if field == "lr" and len(found) > 1 and all(value == found[0][1] for _, value in found):
            continue  # a line that says nothing: the number is among the facts
        series = _series(found, title)
        drawn.append(chart(title, note.format(gap=gap), series, unit=unit, log=log, remark=remark))
    return "".join(drawn)


def _series(found: Sequence[tuple[int, Any]], title: str) -> list[Series]:
    """The curves of one field; one that holds lists has a curve for each element."""
    steps = [step for step, _ in found]
    width = max((len(value) for _, value in found if isinstance(value, list)), default=0)
    if not width:
        return [Series(title, steps, [value if drawable(value) else None for _, value in found])]
    series = []
    for i in range(width):
        column = [v[i] if isinstance(v, list) and i < len(v) else None for _, v in found]
        values = [value if drawable(value) else None for value in column]
        # A step outside loss_steps is null throughout: it has no curve, rather than a gap.
        if any(value is not None for value in values):
            ends = {0: " (noisiest)", width - 1: " (cleanest)"} if width > 1 else {}
            series.append(Series(f"{i + 1}{ends.get(i, '')}", steps, values))
    return series


def _samples(workdir: epath.Path, last: float) -> str:
    files = [(step, path) for step, path in sample_files(workdir) if step <= last]
    if not files:
        return "<p>No samples have been drawn yet.</p>"
    shown, remarks, rounds = files, [], []
    if len(files) > ROUNDS:
        last = len(files) - 1
        shown = [files[round(i * last / (ROUNDS - 1))] for i in range(ROUNDS)]
        remarks.append(f"{len(files) - ROUNDS} further rounds are in samples/.")
    for step, path in shown:
        opened = _opened(path)
        if isinstance(opened, str):
            remarks.append(f"step {step}: {path.name} {opened}")
        else:
            rounds.append(Round(step, str(_file(workdir, step) or ""), *opened))
    return (shown_pictures.show(rounds) if rounds else "") + html_page.remark(*remarks)


def _opened(path: epath.Path) -> tuple[Sequence[str], list[tuple[str, list]]] | str:
    """Columns and rows of a grid, or why there are none."""
    try:
        with open_regular(path) as file, Image.open(file) as image:
            labels, sheet = read_labels(image), image.convert("RGB")
    except UserError as error:
        return f"cannot be read ({str(error).removeprefix(f'{path}: ')})"
    except DECODE_ERRORS as error:
        return f"cannot be read ({error})"
    if labels is None:
        return "does not say where its pictures are"
    rows = [
        (caption, [None if cell is None else cell.cut(sheet) for cell in cells])
        for caption, cells in zip(labels.captions, labels.cells, strict=True)
    ]
    return labels.columns, rows


def _training_pictures(workdir: epath.Path) -> str:
    """Some of the pictures that the run learns from."""
    path = workdir / TRAINING
    if not path.exists():
        return ""
    opened = _opened(path)
    if isinstance(opened, str):
        return html_page.section("Training pictures", html_page.remark(f"{path.name} {opened}"))
    pictures = [picture for _, row in opened[1] for picture in row if picture is not None]
    return html_page.section("Training pictures", shown_pictures.thumbnails(pictures))
