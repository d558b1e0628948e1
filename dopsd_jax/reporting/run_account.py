"""What the page of a run says in words: how the gap went, what went wrong, what to look at."""

from collections.abc import Mapping, Sequence
from typing import Any

from dopsd_jax.methods.method import TO_TEACHER
from dopsd_jax.reporting import html_page
from dopsd_jax.reporting.charts import drawable, number
from dopsd_jax.reporting.run_settings import text_of

HAZY = 0.9  # below this share of the teacher's velocity pictures are visibly hazy
LISTED = 20  # incidents that are listed


def sentence(records: Sequence[Mapping], gap: str) -> str:
    """How far the run came, by its own measure; empty where it cannot be said.

    gap: between what, as the method says: one to noised pictures depends on the noise that was
    drawn, and tells nothing. Both ends are means over a tenth of the steps.
    """
    values, anchors = _finite(records, "gap"), _finite(records, "anchor_gap")
    said = []
    if gap == TO_TEACHER and len(values) > 1:
        first, last = _ends(values)
        went = "fell" if last < first else "did not fall"
        said.append(f"the gap ({gap}) {went}: {number(first)} at the start, {number(last)} now")
    if anchors:
        said.append(
            f"on ordinary prompts the student is {number(_ends(anchors)[1])} from the start"
        )
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}." if said else ""


def warnings(
    records: Sequence[Mapping],
    incidents: Sequence[tuple[str, Mapping[str, Any]]],
    count: int,
    ranking: Mapping[str, Any],
    gap: str,
) -> str:
    """What the reader should know before trusting the result; nothing if there is nothing.

    incidents: file names and contents of the first `LISTED`, of `count`. gap: as in `sentence`; the
    velocity that fits noised pictures best is shorter than theirs, and no haze.
    """
    found = []
    skipped = sum("nonfinite" in record for record in records)
    if skipped:
        found.append(f"{_times(skipped, 'step')} not finite and left out")
    spikes = sum(record.get("spike") is True for record in records)
    if spikes:
        found.append(f"{_times(spikes, 'step')} a spike of the loss")
    ratios = _finite(records, "norm_ratio")
    if gap == TO_TEACHER and ratios and _ends(ratios)[1] < HAZY:
        found.append(
            f"the student's velocity is {_ends(ratios)[1]:.2f} as long as what it is pulled to: "
            "pictures may be hazy"
        )
    checkpoints, best = ranking.get("checkpoints"), ranking.get("best")
    last = checkpoints[-1] if isinstance(checkpoints, list) and checkpoints else None
    if best is not None and isinstance(last, dict) and last.get("step") != best:
        found.append(f"the last checkpoint is not the best, which is that of step {text_of(best)}")
    if not found and not incidents:
        return ""
    items = "".join(f"<li>{html_page.text(line[0].upper() + line[1:])}.</li>" for line in found)
    lines = f"<ul>{items}</ul>" if items else ""
    if incidents:
        lines += html_page.folded(f"incidents: {count}", _listed(incidents, count))
    return f'<aside class="warnings"><h2>Look at this</h2>{lines}</aside>'


def _listed(incidents: Sequence[tuple[str, Mapping[str, Any]]], count: int) -> str:
    rows = []
    for name, content in incidents:
        samples = content.get("samples")
        samples = samples if isinstance(samples, list) else []
        images = [text_of(own.get("image", "")) for own in samples if isinstance(own, dict)]
        rows.append((name, text_of(content.get("why", "")), ", ".join(images)))
    more = [f"{count - len(rows)} more are in incidents/."] if count > len(rows) else []
    table = html_page.table(("file", "why", "pictures of the step"), rows, "settings")
    return table + html_page.remark(*more)


def _times(count: int, what: str) -> str:
    return f"1 {what} was" if count == 1 else f"{count} {what}s were"


def _finite(records: Sequence[Mapping], field: str) -> list[float]:
    return [record[field] for record in records if drawable(record.get(field))]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last tenth."""
    count = max(1, len(values) // 10)
    return sum(values[:count]) / count, sum(values[-count:]) / count
