"""The page docs/results.md: figures from the records of paper.py, and our reading of them."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import paper_claims
from paper_arms import (
    ABLATIONS,
    ANCHORED,
    APART,
    BOTH,
    CONCEPTS,
    DROPPED,
    FULL,
    LONG,
    LONG_LOOKS,
    LOOKS,
    METHODS,
    MORE,
    NEW_WORDS,
    OPEN,
    PICTURES,
    RATES,
    SEEDS,
    SEQUENCE,
    SHARES,
    SHIPPED,
    STUDENTS,
    WHOLE,
)
from paper_arms import BATCH as SIZE
from paper_claims import signed
from paper_records import (
    COMPOSITION,
    CONTRAST,
    CRISP,
    IDENTITY,
    LEAK,
    MEASURES,
    ORDINARY_CRISP,
    RETENTION,
    Records,
    Runs,
    read,
)

from dopsd_jax.evaluation import statistics
from dopsd_jax.evaluation.statistics import Estimate

READING = Path(__file__).parent / "paper_reading.md"  # ours, of the tables; not of the records
LEVELS = (0.7, 0.8)  # identities at which methods are compared
LEAST = 3  # concepts of which an interval says something
NAMES = {
    IDENTITY: "identity",
    CRISP: "crispness",
    CONTRAST: "contrast",
    ORDINARY_CRISP: "ordinary crispness",
    COMPOSITION: "composition",
    RETENTION: "retention",
    LEAK: "leak",
}

HEAD = """# When D-OPSD keeps the few steps, and when it does not

Made by `python benchmarks/paper.py` from `docs/results.jsonl`; do not edit. The model is the
trained miniature (examples/miniature): everything here is about a small network in a drawn world.
It has what makes a model like the real one: distilled by distribution matching, captions that leave
much open, a teacher that takes from its picture what is shown and not the pixels.
"""

SETTING = f"""## What was run

A new concept is taught from {PICTURES} pictures, by the data, the method and the step of
`dopsd_jax.train` with `configs/zimage.py:tiny`, in {LOOKS[-1]} steps of {SIZE} pictures. Captions
are *open*: the new word alone; place, size and ground differ from picture to picture and are not
said. Up to {CONCEPTS} concepts and {SEEDS} seeds; each table says how many runs there are. The seed
draws the first adapters and the noise of training; the prompts and noise of the scores depend on
the concept alone, so they are the same for all methods. Intervals are Student's t at 95 % over the
concepts, seeds averaged: they cover other concepts. Of two concepts the means stand alone.

* **identity**: likeness of outline and colours to the concept, its arrangement factored out, in
  pictures of the word alone;
* **crispness**, **contrast**: of these pictures, relative to true pictures of the concept where the
  picture has it. Before training they are those of other objects, and no measure;
* **ordinary crispness**: the same of prompts with named shapes;
* **composition**: how much of the base's picture from the same noise is kept in prompts without the
  word (1: all; 0: as far from it as another noise);
* **retention**: share of these prompts whose shape and colour are both right;
* **leak**: IoU with the concept under other new words, which should stay the base's.
"""


def write(results: Path, page: Path, folder: Path) -> None:
    """Writes the page and its figures beside it; folder: of the runs, with their pictures."""
    import paper_figures  # needs matplotlib

    records = Records(read(results))
    names = paper_figures.draw(records, page.parent, folder)
    figure = lambda key, title: [f"![{title}]({names[key]})\n"] if key in names else []
    part = lambda title, lines: [f"## {title}\n\n" + "\n".join(lines) + "\n"]
    parts = [HEAD, READING.read_text(encoding="utf-8")]
    parts += figure("pictures", "Pictures of the word alone, before and after training")
    parts += figure("map", "Open captions and copying teachers")
    parts += [SETTING]
    parts += part("The goals", paper_claims.goals(records))
    parts += part("The paper's claims", paper_claims.table(records))
    parts += part("LoRA", methods(records, "lora", METHODS))
    parts += figure("lora", "Methods along their steps")
    parts += part("At equal identity", equal(records))
    parts += part("Full fine-tuning", methods(records, "full", FULL))
    parts += part("Captions and teachers", worlds(records))
    parts += part("Other students", students(records))
    parts += part("Ablations", ablations(records))
    parts += part("How many anchors, and which", anchors(records))
    parts += part("Leak after more steps", more(records))
    parts += part("Many steps", long(records))
    parts += part("One concept after another", sequences(records))
    parts += part("What the student is taught", targets(records))
    parts += part("What a word is to the student", words(records))
    page.write_text("\n".join(parts), encoding="utf-8")


def shown(found: Estimate | None) -> str:
    """A number; with its interval, if it is of enough concepts."""
    if found is None:
        return ""
    return f"{found.value:.3f}" + (f" ± {found.half:.3f}" if found.prompts >= LEAST else "")


def head(first: Sequence[str], last: Sequence[str] = ()) -> list[str]:
    columns = [*first, *NAMES.values(), *last]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def row(first: Sequence[object], found: Iterable[Estimate | None], last: Sequence[object] = ()):
    return f"| {' | '.join([*map(str, first), *map(shown, found), *map(str, last)])} |"


def final(arm: Runs | None) -> list[Estimate | None]:
    return [arm.final(m) if arm else None for m in MEASURES]


def count(arm: Runs | None) -> str:
    return str(arm.count) if arm else "not run"


def before(records: Records, train: str = "lora", student: str = SHIPPED) -> list[str]:
    """The rows of base and teacher."""
    if records.any(train, student) is None:
        return []
    base = [records.base(m, train, student) for m in MEASURES]
    base[1] = base[2] = None  # of other objects
    teacher = [records.teacher(m, student) for m in MEASURES] if train == "lora" else []
    rows = [row(["*base*", "", ""], base, [""])]
    return rows + (
        [row(["*teacher, shown the picture*", "", ""], teacher, [""])] if teacher else []
    )


def methods(records: Records, train: str, names: Iterable[str]) -> list[str]:
    lines = head(["method", "rate", "runs"], ["CPU s a run"]) + before(records, train)
    for name in names:
        for rate in RATES[train]:
            arm = records.arm(name, train, rate)
            cost = f"{arm.cost:.0f}" if arm else ""
            lines.append(row([name, f"{rate:g}", count(arm)], final(arm), [cost]))
    return lines


def equal(records: Records) -> list[str]:
    looks = ", ".join(map(str, LOOKS))
    lines = ["Where a method's mean identity first reaches a level, on straight lines between the",
             f"steps that were scored ({looks}), or at the first of them.", ""]  # fmt: skip
    compared = CRISP, CONTRAST, ORDINARY_CRISP, COMPOSITION, RETENTION, LEAK
    columns = ["identity", "method", "rate", *(NAMES[m] for m in compared)]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    arms = [(n, r, records.arm(n, rate=r)) for n in METHODS for r in RATES["lora"]]
    beyond = []
    for level in LEVELS:
        left = []
        for name, rate, arm in arms:
            found = [arm.when(level, m) for m in compared] if arm else []
            if None in found:
                left.append(f"{name} ({rate:g})")
            elif found:
                cells = " | ".join(f"{v:.3f}" for v in found)
                lines.append(f"| {level:g} | {name} | {rate:g} | {cells} |")
        beyond += [f"{level:g} is not reached by {', '.join(left)}."] if left else []
    return [*lines, "", *beyond]


def worlds(records: Records) -> list[str]:
    """Openness of the captions, and how much of the picture the teacher is shown."""
    lines = ["`teacher.vision_dropout` leaves out a share of the picture's tokens at random.", ""]
    lines += head(["captions", "run", "runs"])
    for captions in (OPEN, WHOLE):
        for name in ("dopsd", *DROPPED, "sft"):
            arm = records.arm(name, captions=captions)
            lines.append(row([captions, name, count(arm)], final(arm)))
    return lines


def students(records: Records) -> list[str]:
    lines = [
        "The same training on other students (benchmarks/paper_students.py): *not distilled*, the",
        "shipped one taken back to a many-step model by flow matching; from it, *segment*, which",
        "learned the mean velocity between nodes, and *endpoint*, after the regression alone;",
        "*words apart*, whose text encoder tells invented words apart; and the shipped one.",
        "",
        *head(["student", "run", "runs"]),
    ]
    for student in (*STUDENTS, SHIPPED):
        if records.any("lora", student):
            base = [records.base(m, "lora", student) for m in MEASURES]
            base[1] = base[2] = None  # of other objects
            lines.append(row([student, "*base*", ""], base))
            teacher = [records.teacher(m, student) for m in MEASURES]
            lines.append(row([student, "*teacher*", ""], teacher))
        for name in ("dopsd", "sft", *(ANCHORED if student == APART else ())):
            arm = records.arm(name, student=student)
            lines.append(row([student, name, count(arm)], final(arm)))
        if whole := records.arm(NEW_WORDS, captions=WHOLE, student=student):
            title = f"{NEW_WORDS}, whole captions"
            lines.append(row([student, title, count(whole)], final(whole)))
    return lines


def ablations(records: Records) -> list[str]:
    lines = ["The second row of each is the difference from `dopsd`, same concepts and seeds.", ""]
    lines += head(["run", "runs"])
    own = records.arm("dopsd")
    lines.append(row(["dopsd", count(own)], final(own)))
    for name in ABLATIONS:
        arm = records.arm(name)
        lines.append(row([name, count(arm)], final(arm)))
        if arm and own:
            cells = [signed(arm.less(own, m)) for m in MEASURES]
            lines.append(f"| | | {' | '.join(cells)} |")
    return lines


def anchors(records: Records) -> list[str]:
    lines = [
        "Ordinary prompts (examples/miniature/ordinary.txt), beside the rows of the data set; *new",
        "words*: the captions with words that mean nothing.",
        "",
        *head(["anchors", "runs"]),
    ]
    names = {"none": "dopsd", "1/4 anchors": "dopsd + anchor"} | dict.fromkeys(SHARES, "")
    for title, name in names.items():
        arm = records.arm(name or title)
        lines.append(row([title, count(arm)], final(arm)))
    return lines


def long(records: Records) -> list[str]:
    lines = [
        f"D-OPSD, unless said, for {LONG_LOOKS[-1]} steps, with other weights of the teacher.",
        "",
    ]
    lines += head(["teacher", "steps", "runs"])
    for name in LONG:
        lines += on_the_way([name.removeprefix("long, ")], records.arm(name))
    return lines


def more(records: Records) -> list[str]:
    lines = [
        "Whether a word that leaked comes back to what it was. *Both*: every other caption is the",
        "word alone, the rest say the arrangement. *Identity, told*: of pictures whose prompts say",
        "the arrangement.",
        "",
        *head(["student", "captions", "run", "steps", "runs"], ["identity, told"]),
    ]
    for student, told, name in itertools.product((APART, SHIPPED), (OPEN, WHOLE, BOTH), MORE):
        arm = records.arm(name, captions=told, student=student)
        if arm or told == OPEN:
            title = name.partition(" steps")[2].removeprefix(", ") or "dopsd"
            lines += on_the_way([student, told, title], arm, ["identity"])
    return lines


def on_the_way(first: Sequence[str], arm: Runs | None, more: Sequence[str] = ()) -> list[str]:
    """A row for each step at which the student was scored; more: measures besides the usual."""
    asked = [*MEASURES, *more]
    if arm is None:
        return [row([*first, "", "not run"], []) + " |" * len(asked)]
    return [
        row([*first, step, arm.count], [statistics.mean(arm.curve(m, step)) for m in asked])
        for step in arm.steps[1:]
    ]


def sequences(records: Records) -> list[str]:
    found = records.sequences()
    lines = [
        f"{len(SEQUENCE)} concepts with one student, {LOOKS[-1]} steps each unless said, whole "
        "captions. Every",
        "run begins with the last result; with anchors, half of their prompts are the captions of",
        "the earlier concepts (a third, with new words), and their teacher is the student as the",
        "run found it. *Kept*: a concept's identity after the last run, relative to that after its",
        "own (the mean over concepts but the last, and the least).",
        "",
        "| student | method | rate | runs | own identity | kept | least kept | retention "
        "| composition | ordinary crispness | identity of each after the last |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    mean = lambda values: f"{np.mean(values):.3f}"
    for (name, rate, student), seeds in found.items():
        own = [[rounds[k][k]["identity"] for k in range(len(rounds))] for rounds in seeds]
        last = [[scores["identity"] for scores in rounds[-1]] for rounds in seeds]
        kept = (np.array(last) / np.array(own))[:, :-1]
        ends = RETENTION, COMPOSITION, ORDINARY_CRISP
        end = " | ".join([mean([[s[m] for s in r[-1]] for r in seeds]) for m in ends])
        each = ", ".join(f"{v:.2f}" for v in np.mean(last, axis=0))
        lines.append(
            f"| {student} | {name} | {rate:g} | {len(seeds)} | {mean(own)} | {mean(kept)} "
            f"| {kept.min():.3f} | {end} | {each} |"
        )
    return lines if found else [*lines, "| not run | | | | | | | | | | |"]


def targets(records: Records) -> list[str]:
    lines = [
        "Clean estimates of teacher and student before training, at the states where the two",
        f"methods ask the teacher; means over {len(records.targets)} concepts.",
        "",
        "| states | noise level | teacher: identity | crispness | student: identity | crispness |",
        "|---|---|---|---|---|---|",
    ]
    if not records.targets:
        return [*lines, "| not run | | | | | |"]
    names = [
        f"{who} {what}" for who in ("teacher", "student") for what in ("identity", "crispness")
    ]
    for states, nodes in records.targets[0].items():
        for k, node in enumerate(nodes):
            means = [np.mean([t[states][k][name] for t in records.targets]) for name in names]
            cells = " | ".join(f"{value:.3f}" for value in means)
            lines.append(f"| {states} | {node['sigma']:.3g} | {cells} |")
    return lines


def words(records: Records) -> list[str]:
    lines = [
        "How far its pictures from the same noise are apart when one word differs, before",
        "training: levels of 255, the mean of all pixels and pairs, and that of the nearest pair.",
        "",
        "| student | captions | what differs | mean | nearest pair |",
        "|---|---|---|---|---|",
    ]
    if not records.words:
        return [*lines, "| not run | | | | |"]
    return lines + [
        f"| {student} | {form} | {kind} | {apart['mean']:.2f} | {apart['least']:.2f} |"
        for student, forms in records.words.items()
        for form, kinds in forms.items()
        for kind, apart in kinds.items()
    ]
