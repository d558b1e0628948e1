"""The page docs/on_gpu.md from the records of on_gpu.py: nothing in it is not in a record."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gpu_cases import BASES, MODELS, SECTIONS, SIDES, Case

HEAD = """# Measured on a GPU

Made by `python benchmarks/on_gpu.py` from `docs/on_gpu.jsonl`; do not edit.{state}

Weights and captions are random, sizes are the published ones: 1024² pixels, four nodes, LoRA of
rank 64 on all layers of the blocks, captions of 128 and 704 rows for Z-Image, texts of 512 rows and
one reference for klein, bfloat16, no anchors, unless a table says otherwise. Each case runs in a
process of its own.

*s*: the median of the timed steps. *peak*: GiB of the device at most, by the account of JAX's or
PyTorch's allocator. *counted*: GiB that `estimate` says. *ceiling*: model work in a second, as a
share of the rate of one product of 8192 x 8192 matrices in bfloat16.
"""
TITLES = {
    "ceiling": "The ceiling",
    "step": "A step",
    "switch": "One switch alone",
    "torch": "PyTorch: diffusers and peft, the same step",
    "full": "Full fine-tuning on one device",
    "card": "What fits on smaller cards",
    "sampling": "Sampling, with decoding",
    "filling": "Filling the cache",
    "start": "From the command to the first step",
}
GOALS = {
    "step": "Goal: at least 70 % of the ceiling.",
    "torch": "Goals: at least 2.0 for the fastest of them at equal memory, and at least 2.5 for\n"
    "*checkpointing*, which is how the released code computes.",
    "sampling": "Goal: a ratio of at most 0.6.",
}
Records = Mapping[str, dict]


def page(cases: Sequence[Case], records: Records) -> str:
    """The Markdown page."""
    known = [case for case in cases if case.name in records]
    state = "" if known else " **It has not been run yet**: there was no GPU to run it on."
    parts = [HEAD.format(state=state)]
    for section in SECTIONS:
        own = [case for case in known if case.section == section]
        if own:
            lines = TABLES[section]([records[case.name] for case in own], records)
            goal = [GOALS[section], ""] if section in GOALS else []
            text = "\n".join((*goal, *lines))
            parts.append(f"## {TITLES[section]}\n\n{text}\n")
    missing = [case for case in cases if case.name not in records and not case.group]
    if known and missing:
        names = "\n".join(f"* {case.name}" for case in missing)
        parts.append(f"## Not measured\n\n{names}\n")
    if known:
        parts.append("## Versions\n\n" + "\n".join(_versions(records)) + "\n")
    return "\n".join(parts)


def brief(record: dict) -> str:
    """A record in a few words."""
    result = record["result"]
    if record["outcome"] != "done":
        return " ".join(result.get("said", [])[-1:])[:160]
    shown = {k: v for k, v in result.items() if isinstance(v, int | float | str)}
    text = ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()
    )
    return f"{text}; {record['wall']} s in all"


def _ceiling(rows: list[dict], records: Records) -> Iterator[str]:
    for row in rows:
        rate = row["result"].get("rate")
        yield f"{row['device']}: {rate / 1e12:.0f} TFLOP/s." if rate else row["outcome"]


def _steps(rows: list[dict], records: Records) -> Iterator[str]:
    yield "| case | s | images/s | peak | counted | ceiling | compile, s |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        found, name = row["result"], _short(row["name"])
        if row["outcome"] != "done":
            yield f"| {name} | {row['outcome']} | | | | | |"
            continue
        if name.endswith("auto"):
            name += f" ({found['remat']})"
        if "teacher_error" in found:
            name += f" (velocity off by {found['teacher_error']:.1%})"
        top = _rate(records, row["device"])
        share = f"{found['model_flop'] / found['median'] / top:.0%}" if top else ""
        yield (
            f"| {name} | {_seconds(found)} | {found['images'] / found['median']:.3g} | "
            f"{_gib(found['peak_bytes'])} | {_gib(found['counted_bytes'])} | {share} | "
            f"{found['compile']:.0f} |"
        )


def _torch(rows: list[dict], records: Records) -> Iterator[str]:
    yield "*ratio*: to our fastest step of the same images; *equal memory*: to our fastest of those"
    yield "that need no more memory than this one."
    yield ""
    yield "| case | s | images/s | peak | ratio | equal memory |"
    yield "|---|--:|--:|--:|--:|--:|"
    for row in rows:
        found, name = row["result"], _short(row["name"])
        if row["outcome"] != "done":
            yield f"| {name} | {row['outcome']} | | | | |"
            continue
        same = ", ".join(name.split(", ")[:2])
        ours = [
            r["result"]
            for n, r in records.items()
            if n.startswith(f"step: {same},") and r["outcome"] == "done"
        ]
        peak = found["peak_bytes"]
        small = [o for o in ours if peak and o["peak_bytes"] and o["peak_bytes"] <= peak]
        ratios = [
            f"{found['median'] / min(o['median'] for o in own):.2f}" if own else ""
            for own in (ours, small)
        ]
        yield (
            f"| {name} | {_seconds(found)} | {found['images'] / found['median']:.3g} | "
            f"{_gib(peak)} | {' | '.join(ratios)} |"
        )


def _cards(rows: list[dict], records: Records) -> Iterator[str]:
    yield "One image, full rematerialisation. In each cell the smallest card, in GB, on which a"
    yield "step was run, with the allocator limited to what the programs use of such a card;"
    yield "seconds, on the device here; peak. *streamed*: `offload=base`."
    yield ""
    yield "| model | pixels | " + " | ".join(BASES) + " |"
    yield "|---|---|" + "---|" * len(BASES)
    for model in MODELS:
        for side in SIDES[::-1]:
            cells = [_card([r for r in rows if r["group"] == f"card: {model}, {side}, {base}"])
                     for base in BASES]  # fmt: skip
            if any(cells):
                yield f"| {model} | {side}² | {' | '.join(cells)} |"


def _card(rows: list[dict]) -> str:
    fits = sorted((row for row in rows if row["outcome"] == "done"), key=lambda row: row["card"])
    if fits:
        found = fits[0]["result"]
        return f"{fits[0]['card']}: {_seconds(found)} s, {_gib(found['peak_bytes'])}"
    if not rows:
        return ""
    last = max(rows, key=lambda row: row["card"])
    return f"{last['card']}: {last['outcome']}"


def _sampling(rows: list[dict], records: Records) -> Iterator[str]:
    yield "Noise to pictures, texts encoded before. *ratio*: ours to diffusers'."
    yield ""
    yield "| case | s | of which decoding | peak | ratio |"
    yield "|---|--:|--:|--:|--:|"
    for row in rows:
        found, name = row["result"], _short(row["name"])
        if row["outcome"] != "done":
            yield f"| {name} | {row['outcome']} | | | |"
            continue
        other, ratio = records.get(row["name"].replace(", ours", ", diffusers")), ""
        if name.endswith("ours") and other and other["outcome"] == "done":
            ratio = f"{found['median'] / other['result']['median']:.2f}"
        yield (
            f"| {name} | {_seconds(found)} | {found['decode']:.3g} | {_gib(found['peak_bytes'])} | "
            f"{ratio} |"
        )


def _around(rows: list[dict], records: Records) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row["result"].get("parts", {})))
    yield f"| case | {' | '.join(columns)} |"
    yield "|---|" + "--:|" * len(columns)
    for row in rows:
        parts = row["result"].get("parts", {})
        cells = [f"{parts[c]:.3g}" if c in parts else "" for c in columns]
        if row["outcome"] != "done":
            cells = [row["outcome"], *cells[1:]]
        yield f"| {_short(row['name'])} | {' | '.join(cells)} |"


TABLES: dict[str, Callable[[list[dict], Records], Iterator[str]]] = {
    "ceiling": _ceiling,
    "step": _steps,
    "switch": _steps,
    "torch": _torch,
    "full": _steps,
    "card": _cards,
    "sampling": _sampling,
    "filling": _around,
    "start": _around,
}


def _versions(records: Records) -> Iterator[str]:
    """One line for all cases that have them in common."""
    groups: dict[str, int] = {}
    for row in records.values():
        packages = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        text = f"{row['device']}; {packages}; commit {row['commit']}; {row['day']}"
        groups[text] = groups.get(text, 0) + 1
    for text, count in groups.items():
        yield f"* {count} cases: {text}"


def _rate(records: Records, device: str) -> float | None:
    row = records.get("ceiling: product")
    return row["result"].get("rate") if row and row["device"] == device else None


def _short(name: str) -> str:
    return name.partition(": ")[2]


def _seconds(found: Mapping[str, Any]) -> str:
    return f"{found['median']:.3g}"


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.1f}"
