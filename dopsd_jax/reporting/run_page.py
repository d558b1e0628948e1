"""report.html: one page about a run."""

import base64
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from PIL import Image

from dopsd_jax.common.atomic import write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_files import read_json
from dopsd_jax.common.progress import duration
from dopsd_jax.data.images import DECODE_ERRORS
from dopsd_jax.methods.registry import METHODS
from dopsd_jax.reporting.charts import Series, chart, number
from dopsd_jax.reporting.html_page import render
from dopsd_jax.reporting.metrics import FILE, read_metrics
from dopsd_jax.reporting.pictures import read_labels, sample_files
from dopsd_jax.training import ranking as checkpoint_ranking

CONFIG, SCORES, REPORT = "config.json", "scores.json", "report.html"
ROUNDS = 40  # at most so many grids are embedded: the first, the last, and some evenly between
SIDE = 1600  # grids are embedded as JPEG with sides up to this

# Field, title, note, and whether a logarithmic axis suits it.
CURVES = (
    ("loss", "Loss", "mean over noise levels", True),
    ("loss_per_step", "Loss per denoising step", "first to last", True),
    ("gap", "Gap", "{gap}, root mean square", True),
    (
        "norm_ratio",
        "Length of the velocity",
        "student over what it is pulled to; with a teacher, below 1: haze",
        False,
    ),
    ("anchor_gap", "Anchor gap", "student and start on ordinary prompts: what was forgotten", True),
    ("grad_norm", "Gradient norm", "before clipping", True),
    ("lr", "Learning rate", "", False),
    ("images_per_second", "Throughput", "images per second", False),
)
OF_SOME = ("anchor_gap", "norm_ratio")  # fields that only some runs have


def holds_run(workdir: str | os.PathLike) -> bool:
    """Whether a training wrote into this folder; a path that is no folder counts as one."""
    workdir = epath.Path(workdir).expanduser()
    return not workdir.is_dir() or any((workdir / name).exists() for name in (FILE, CONFIG))


def write_report(workdir: str | os.PathLike) -> epath.Path:
    """Writes `workdir`/report.html from metrics.jsonl, samples/ and config.json; returns its path.

    What is not there yet is said to be missing. Raises `UserError` for broken files.
    """
    workdir = epath.Path(workdir).expanduser()
    if not workdir.is_dir():
        raise UserError(f"{workdir}: is not a folder; give the --workdir of a run")
    records = read_metrics(workdir / FILE)
    config, scores = _read_object(workdir / CONFIG), _read_object(workdir / SCORES)
    ranking = _read_object(workdir / checkpoint_ranking.FILE)
    section = config.get("config")
    method = section.get("method") if isinstance(section, dict) else None
    gap = METHODS.get(str(method), METHODS["dopsd"]).gap
    curves = "".join(
        _curve(records, field, title, note.format(gap=gap), log)
        for field, title, note, log in CURVES
        if field not in OF_SOME or any(field in record for record in records)
    )
    parts = (
        _verdict(scores) + _summary(records, config) + _scores(scores) + _checkpoints(ranking),
        f'<h2>Curves</h2>\n<div id="curves">{curves}</div>',
        f"<h2>Samples</h2>\n{_samples(sample_files(workdir))}",
        f"<h2>Settings</h2>\n{_changes(config)}{_config(config)}",
    )
    page = render(workdir.name or workdir.resolve().name, "\n".join(parts), script=SCRIPT)
    write_text(workdir / REPORT, page)
    return workdir / REPORT


def _read_object(path: epath.Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    found, _ = read_json(path, again="restore or remove it")
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; restore or remove it")
    return found


def _summary(records: Sequence[Mapping], config: Mapping[str, Any]) -> str:
    if not records:
        return "<p>No step has been recorded yet.</p>"
    last = records[-1]
    section = config.get("config")
    total = section.get("steps") if isinstance(section, dict) else None
    facts = [("step", f"{last['step']} of {total}" if total else str(last["step"]))]
    labels = {"loss": "last loss", "gap": "last gap", "anchor_gap": "last anchor gap"}
    for field, label in (labels | {"lr": "learning rate"}).items():
        if _is_number(last.get(field)):
            facts.append((label, number(last[field])))
    rates = sorted(
        r["images_per_second"] for r in records if _is_number(r.get("images_per_second"))
    )
    if rates:
        facts.append(("images/s, median", number(rates[len(rates) // 2])))
    seconds = [r["seconds"] for r in records if _is_number(r.get("seconds"))]
    if seconds:
        facts.append(("time in steps", duration(sum(seconds))))
    items = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts)
    return f"<dl>{''.join(items)}</dl>"


def _verdict(scores: Mapping[str, Any]) -> str:
    said = scores.get("verdict")
    return f'<p class="verdict">{html.escape(said)}</p>' if isinstance(said, str) and said else ""


def _scores(scores: Mapping[str, Any]) -> str:
    """The table that a run on the miniature ends with."""
    rows = scores.get("rows")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not rows:
        return ""
    note = html.escape(str(scores.get("note", "")))
    return f'<h2>Scores</h2>{_grid(rows)}<p class="remark">{note}</p>'


def _checkpoints(ranking: Mapping[str, Any]) -> str:
    """The checkpoints' scores, as `training.ranking` keeps them."""
    rows = ranking.get("checkpoints")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} for row in rows]
    if not names:
        return ""
    best = html.escape(str(ranking.get("best")))
    by = ranking.get("ranked_by")
    by = by if isinstance(by, dict) else {}
    score, end = str(by.get("score")), "highest" if by.get("better") == "higher" else "lowest"
    score = "gap" if score in (checkpoint_ranking.GAP, "None") else html.escape(score)
    note = f"The {score} on pictures that are not trained on is {end} at step {best}."
    return f'<h2>Checkpoints</h2>{_grid(rows)}<p class="remark">{note}</p>'


def _grid(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same names."""
    number = lambda v: f"{v:.3f}" if isinstance(v, float) else str(v)
    cell = lambda v: "" if v is None else number(v) if _is_number(v) else html.escape(str(v))
    line = lambda tag, values: f"<tr>{''.join(f'<{tag}>{v}</{tag}>' for v in values)}</tr>"
    head = line("th", map(html.escape, rows[0]))
    return f"<table>{head}{''.join(line('td', map(cell, row.values())) for row in rows)}</table>"


def _curve(records: Sequence[Mapping], field: str, title: str, note: str, log: bool) -> str:
    """The chart of one field; a field that holds lists has a curve for each element."""
    found = [(record["step"], record[field]) for record in records if field in record]
    steps = [step for step, _ in found]
    width = max((len(value) for _, value in found if isinstance(value, list)), default=0)
    if not width:
        values = [value if _is_number(value) else None for _, value in found]
        return chart(title, note, [Series(title, steps, values)], log=log)
    series = []
    for i in range(width):
        column = [v[i] if isinstance(v, list) and i < len(v) else None for _, v in found]
        values = [value if _is_number(value) else None for value in column]
        # A step outside loss_steps is null throughout: it has no curve, rather than a gap.
        if any(value is not None for value in values):
            series.append(Series(str(i + 1), steps, values))
    return chart(title, note, series, log=log)


def _is_number(value: Any) -> bool:
    """Whether it can be drawn: charts add and subtract, which overflows near the largest float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e150


def _samples(files: Sequence[tuple[int, epath.Path]]) -> str:
    if not files:
        return "<p>No samples have been drawn yet.</p>"
    shown = files
    if len(files) > ROUNDS:
        last = len(files) - 1
        shown = [files[round(i * last / (ROUNDS - 1))] for i in range(ROUNDS)]
    rounds = "".join(_round(step, path) for step, path in shown)
    left_out = len(files) - len(shown)
    remark = f"<p class='remark'>{left_out} further rounds are in samples/.</p>" if left_out else ""
    slider = (
        f'<label hidden id="pick">step <output></output><input type="range" min="0" '
        f'max="{len(shown) - 1}" value="{len(shown) - 1}" aria-label="round of samples"></label>'
    )
    return f'{slider if len(shown) > 1 else ""}<div id="rounds">{rounds}</div>{remark}'


def _round(step: int, path: epath.Path) -> str:
    try:
        with path.open("rb") as file, Image.open(file) as image:
            labels = read_labels(image)
            picture = image.convert("RGB")
    except DECODE_ERRORS as error:
        text = html.escape(f"step {step}: {path.name} cannot be read ({error})")
        return f'<section data-step="{step}"><p class="remark">{text}</p></section>'
    picture.thumbnail((SIDE, 4 * SIDE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=88)
    data = base64.b64encode(encoded.getvalue()).decode()
    columns = ", ".join(labels.columns) if labels else "samples"
    alt = html.escape(f"{columns} at step {step}")
    captions = ""
    if labels and any(labels.captions):
        items = "".join(f"<li>{html.escape(text)}</li>" for text in labels.captions)
        captions = f"<details><summary>prompts in full</summary><ol>{items}</ol></details>"
    return (
        f'<section data-step="{step}"><h3>step {step}</h3>'
        f'<img loading="lazy" width="{picture.width}" height="{picture.height}" alt="{alt}" '
        f'src="data:image/jpeg;base64,{data}">{captions}</section>'
    )


def _changes(config: Mapping[str, Any]) -> str:
    """The fields that were changed when the run went on: `--allow_changes`."""
    changes = config.get("changes")
    rows = [row for row in changes if isinstance(row, dict)] if isinstance(changes, list) else []
    if not rows:
        return ""
    cells = lambda tag, values: f"<tr>{''.join(f'<{tag}>{v}</{tag}>' for v in values)}</tr>"
    fields = ("step", "field", "old", "new")
    body = "".join(
        cells("td", (html.escape(_text(row.get(field, "")))[:200] for field in fields))
        for row in rows
    )
    return f"<h3>Changed on the way</h3><table>{cells('th', fields)}{body}</table>"


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return "<p>There is no config.json.</p>"
    tables, loose = [], {}
    for section, values in config.items():
        if section == "changes":
            continue
        if isinstance(values, dict):
            tables.append(_table(section, dict(_flat(values))))
        else:
            loose[section] = values
    if loose:
        tables.append(_table("other", loose))
    return "".join(tables)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value))
    return pairs


def _table(name: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(_text(value))}</td></tr>"
        for key, value in values.items()
    )
    is_open = " open" if name == "config" else ""
    return (
        f"<details{is_open}><summary>{html.escape(name)}</summary><table>{rows}</table></details>"
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Without scripts all rounds stand one below the other.
SCRIPT = """
const pick = document.getElementById("pick");
if (pick) {
  const rounds = [...document.querySelectorAll("#rounds section")];
  const input = pick.querySelector("input"), output = pick.querySelector("output");
  const show = () => rounds.forEach((round, i) => {
    round.hidden = i != input.value;
    if (!round.hidden) output.value = round.dataset.step;
  });
  input.oninput = show;
  pick.hidden = false;
  show();
}
"""
