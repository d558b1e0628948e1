"""The page docs/results.md: figures from the records of paper.py, and our reading of them."""

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
    STYLE_BATCH,
    STYLE_CAPTIONS,
    STYLE_METHODS,
    STYLE_RATE,
    STYLE_STEPS,
)
from paper_records import (
    CONCEPT,
    CRISP,
    MEASURES,
    ORDINARY_CRISP,
    RETENTION,
    STYLE_MEASURES,
    Records,
    read,
)

from dopsd_jax.evaluation.statistics import Estimate

READING = Path(__file__).parent / "paper_reading.md"  # ours, of the tables; not of the records
LEVEL = 0.6  # concept score at which methods are compared: more than half of them reach it

HEAD = f"""# The paper's experiment at small scale

Made by `python benchmarks/paper.py` from `docs/results.jsonl`; do not edit. The model is the
*first* trained miniature (examples/miniature of version 85cf58e): everything here is about a small
network in a drawn world, and says nothing about Z-Image-Turbo's 6 billion parameters. It lacks
three things that make a model like the real one: its first clean estimate is no picture, its
captions leave nothing open, its teacher copies pixels. The miniature that replaced it has them
(README.md shows one run of it). These runs were not repeated on it.

Every run, except those of a style, teaches a new concept (a sequence: three) from six pictures, as
the quickstart does: the data, the method and the step are those of `dopsd_jax.train` with
`configs/zimage.py:tiny`, but {LOOKS[-1]} steps of
{BATCH} pictures.
{CONCEPTS} concepts, {SEEDS} seeds each ({ABLATION_SEEDS} in the ablations): the seed draws the
initial adapters and the training's noise; prompts and noise of the scores depend on the concept
alone, so they are the same for all methods.
* **concept**: IoU of shape and colours with the target, in arrangements that were not shown;
* **crispness**: of the edges in the concept's pictures, relative to the base model's;
* **shape**, **retention**: share of ordinary prompts with the right shape; with the right shape and
  colour;
* **crispness, ordinary**: of the edges in those prompts' pictures, relative to the base model's.

Steps, batch and the adapters' rates were chosen after single runs of `dopsd` and `sft` on the first
two of these concepts, so that both methods learn within the steps; the rates of full fine-tuning
after one run of each of the two on the first at 0.0001, 0.0003 and 0.001.

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
    parts += ["## Why\n\n" + READING.read_text(encoding="utf-8")]
    for train, title in (("lora", "LoRA"), ("full", "Full fine-tuning")):
        parts += [f"## {title}\n\n" + "\n".join(_methods(records, train)) + "\n"]
        parts += [f"![{title}]({names[train]})\n"] if train in names else []
        parts += ["### At equal concept score\n\n" + "\n".join(_equal(records, train)) + "\n"]
    parts += ["## Beside the paper's tables\n\n" + "\n".join(paper_claims.beside(records)) + "\n"]
    parts += ["## Ablations\n\n" + "\n".join(_ablations(records)) + "\n"]
    parts += [f"![Ablations]({names['ablations']})\n"] if "ablations" in names else []
    parts += ["## What the student is taught\n\n" + "\n".join(_targets(records)) + "\n"]
    parts += ["## Many pictures of a style\n\n" + "\n".join(_styles(records)) + "\n"]
    parts += ["## One concept after another\n\n" + "\n".join(_sequences(records)) + "\n"]
    page.write_text("\n".join(parts), encoding="utf-8")


def shown(found: Estimate | None) -> str:
    """A number with its interval."""
    if found is None:
        return "not run"
    return f"{found.value:.3f}" + ("" if found.half is None else f" ± {found.half:.3f}")


def _methods(records: Records, train: str) -> list[str]:
    head = [
        "| method | rate | runs | concept | crispness | shape | retention | crispness, ordinary "
        "| CPU s a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    if records.any(train):
        head += [f"| base | | | {_row(records.base(train))} | |"]
        head += [f"| teacher | | | {_row(records.teacher(train))} | | | | |"]
    rows = []
    for method in METHODS:
        for rate in RATES[train]:
            arm = records.arm(method, train, rate)
            cost = f"{arm.cost:.0f}" if arm else ""
            count = arm.count if arm else 0
            found = [arm.final(m) if arm else None for m in MEASURES]
            rows.append(f"| {method} | {rate:g} | {count} | {_row(found)} | {cost} |")
    return head + rows


def _equal(records: Records, train: str) -> list[str]:
    lines = [
        f"What each method has lost where its mean concept score first reaches {LEVEL:g}, on",
        "straight lines between the steps that were scored.",
        "",
        "| method | rate | crispness | retention | crispness, ordinary |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        for rate in RATES[train]:
            arm = records.arm(method, train, rate)
            found = [
                arm.when(LEVEL, m) if arm else None for m in (CRISP, RETENTION, ORDINARY_CRISP)
            ]
            missing = "not reached" if arm else "not run"
            cells = " | ".join(missing if v is None else f"{v:.3f}" for v in found)
            lines.append(f"| {method} | {rate:g} | {cells} |")
    return lines


def _targets(records: Records) -> list[str]:
    lines = [
        "The teacher's clean estimates for the four concepts, before any training, at the states",
        "where the two methods ask it: concept score and crispness of what the student is taught.",
        "",
        "| states | noise level | concept | crispness |",
        "|---|---|---|---|",
    ]
    rows = [
        f"| {name} | {sigma:.3g} | {_row(found)} |" for name, sigma, *found in records.targets()
    ]
    return lines + (rows or ["| not run | | | |"])


def _styles(records: Records) -> list[str]:
    lines = [
        f"Every weight, rate {STYLE_RATE:g}, {STYLE_STEPS} steps of {STYLE_BATCH}, on 64 pictures",
        "of ordinary objects in a style that captions never name (outlined or shaded, on a",
        "gradient or lines): four styles, one run each, scored on 48 other scenes. Captions say",
        "the `whole` but the style, or are `short`: colour and shape; place, size and ground are",
        "left to chance. **FID**: Fréchet distance to the style's own pictures, lower is better",
        "(docs/evaluation.md); **crispness**: relative to theirs, raised by noise, too;",
        "**retention**: shape and colour right.",
        "",
        "| captions | method | runs | FID | crispness | retention |",
        "|---|---|---|---|---|---|",
    ]
    for kind in STYLE_CAPTIONS:
        if records.any("full", kind):
            lines += [f"| {kind} | base | | {_row(records.base('full', kind))} |"]
            lines += [f"| {kind} | teacher | | {_row(records.teacher('full', kind))} |"]
        for method in STYLE_METHODS:
            arm = records.arm(method, "full", STYLE_RATE, kind)
            found = [arm.final(m) if arm else None for m in STYLE_MEASURES]
            lines.append(f"| {kind} | {method} | {arm.count if arm else 0} | {_row(found)} |")
    return lines


def _row(found: Sequence[Estimate | None]) -> str:
    return " | ".join(shown(one) for one in found)


def _ablations(records: Records) -> list[str]:
    rate = RATES["lora"][0]
    lines = [
        f"Adapters, rate {rate:g}. Differences are from `dopsd` with the same concepts and seeds.",
        "",
        "| run | concept | crispness | retention | concept, difference | crispness, difference "
        "| retention, difference |",
        "|---|---|---|---|---|---|---|",
    ]
    own = records.arm("dopsd", "lora", rate)
    for name in ("dopsd", *ABLATIONS):
        arm = records.arm(name, "lora", rate)
        compared = CONCEPT, CRISP, RETENTION
        found = [arm.final(m) if arm else None for m in compared]
        if name != "dopsd":
            found += [arm.less(own, m) if arm and own else None for m in compared]
        cells = [shown(one) for one in found] + [""] * (6 - len(found))
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
