"""The page docs/results.md from the records of paper.py: nothing in it is not in a record."""

from collections.abc import Sequence
from pathlib import Path

import paper_claims
from paper_arms import (
    ABLATION_SEEDS,
    ABLATIONS,
    BATCH,
    CONCEPTS,
    LOOKS,
    METHODS,
    RATES,
    SEEDS,
    SEQUENCE,
)
from paper_records import MEASURES, Records, read

from dopsd_jax.scores.statistics import Estimate

HEAD = f"""# The paper's experiment at small scale

Made by `python benchmarks/paper.py` from `docs/results.jsonl`; do not edit. The model is the
trained miniature of examples/miniature: everything here is about a small network in a drawn world,
and says nothing about Z-Image-Turbo's 6 billion parameters.

Every run teaches one new concept from six pictures, as the quickstart does: the data, the method
and the step are those of `dopsd_jax.train` with `configs/zimage.py:tiny`, but {LOOKS[-1]} steps of
{BATCH} pictures.
{CONCEPTS} concepts, {SEEDS} seeds each ({ABLATION_SEEDS} in the ablations): the seed draws the
adapters' start and the training's noise; prompts and noise of the scores are a concept's own and
the same for all.
* **concept**: IoU of shape and colours with the true picture, in arrangements that were not shown;
* **crispness**: of the edges in the concept's pictures, relative to the base model's;
* **shape**, **retention**: share of ordinary prompts with the right shape; with the right shape and
  colour.

Steps, batch and the adapters' rates were chosen after single runs of `dopsd` and `sft` on the first
two of these concepts, so that both methods learn within the steps; the full rates without any run.

Intervals are Student's t at 95 % over the {CONCEPTS} concepts, seeds averaged: they cover other
concepts.
"""


def write(results: Path, page: Path) -> None:
    """Writes the page and its figures beside it."""
    import paper_figures  # needs matplotlib

    records = Records(read(results))
    names = paper_figures.draw(records, page.parent)
    parts = [
        HEAD,
        "## The paper's claims\n\n" + "\n".join(paper_claims.table(records)) + "\n",
        "## The goals\n\n" + "\n".join(paper_claims.goals(records)) + "\n",
    ]
    for train, title in (("lora", "LoRA"), ("full", "Full fine-tuning")):
        parts += [f"## {title}\n\n" + "\n".join(_methods(records, train)) + "\n"]
        parts += [f"![{title}]({names[train]})\n"] if train in names else []
    parts += ["## Beside the paper's tables\n\n" + "\n".join(paper_claims.beside(records)) + "\n"]
    parts += ["## Ablations\n\n" + "\n".join(_ablations(records)) + "\n"]
    parts += [f"![Ablations]({names['ablations']})\n"] if "ablations" in names else []
    parts += ["## One concept after another\n\n" + "\n".join(_sequences(records)) + "\n"]
    page.write_text("\n".join(parts), encoding="utf-8")


def shown(found: Estimate | None) -> str:
    """A number with its interval."""
    if found is None:
        return "not run"
    return f"{found.value:.3f}" + ("" if found.half is None else f" ± {found.half:.3f}")


def _methods(records: Records, train: str) -> list[str]:
    head = ["| method | rate | runs | concept | crispness | shape | retention | CPU s a run |"]
    head += ["|---|---|---|---|---|---|---|---|"]
    base = [f"| base | | | {_row(records.base(train))} | |"] if records.any(train) else []
    teacher = records.teacher(train)
    if teacher:
        base += [f"| teacher, before | | | {shown(teacher[0])} | {shown(teacher[1])} | | | |"]
    rows = []
    for method in METHODS:
        for rate in RATES[train]:
            arm = records.arm(method, train, rate)
            cost = f"{arm.cost:.0f}" if arm else ""
            count = arm.count if arm else 0
            found = [arm.final(m) if arm else None for m in MEASURES]
            rows.append(f"| {method} | {rate:g} | {count} | {_row(found)} | {cost} |")
    return head + base + rows


def _row(found: Sequence[Estimate | None]) -> str:
    return " | ".join(shown(one) for one in found)


def _ablations(records: Records) -> list[str]:
    rate = RATES["lora"][0]
    lines = [
        f"Adapters, rate {rate:g}. Differences are from `dopsd` with the same concepts and seeds.",
        "",
        "| run | concept | crispness | concept, difference | crispness, difference |",
        "|---|---|---|---|---|",
    ]
    own = records.arm("dopsd", "lora", rate)
    for name in ("dopsd", *ABLATIONS):
        arm = records.arm(name, "lora", rate)
        found = [arm.final(m) if arm else None for m in MEASURES[:2]]
        if name != "dopsd":
            found += [arm.less(own, m) if arm and own else None for m in MEASURES[:2]]
        cells = [shown(one) for one in found] + [""] * (4 - len(found))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _sequences(records: Records) -> list[str]:
    count = len(SEQUENCE)
    lines = [
        f"{count} concepts, one after another with the same student, {LOOKS[-1]} steps each;",
        f"{SEEDS} seeds, intervals over seeds. After each one: IoU of every concept, crispness of",
        "the last one's pictures relative to the base's, and retention.",
        "",
        "| method | train | after | "
        + " | ".join(f"concept {k + 1}" for k in range(count))
        + " | crispness | retention |",
        "|---" * (count + 5) + "|",
    ]
    for method, train, rounds in records.sequences():
        for k, row in enumerate(rounds):
            cells = " | ".join(shown(one) for one in row)
            lines.append(f"| {method} | {train} | {k + 1} | {cells} |")
    return lines
