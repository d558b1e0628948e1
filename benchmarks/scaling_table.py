"""The page docs/scaling.md from the records of scaling.py: nothing in it is not in a record."""

import math

HEAD = """# What a step takes on TPU slices

Made by `python benchmarks/scaling.py` from `docs/scaling.jsonl`; do not edit. The numbers are those
of the TPU compiler (libtpu), which compiled the step for each slice; **no step has been run on a
TPU**. Z-Image-Turbo, 6.15 billion parameters, with captions of 512 and 1024 tokens; *klein*:
FLUX.2-klein, 3.88 and 9.08 billion parameters, texts of 512 tokens and the teacher's reference.
All at 1024 x 1024, four rollout steps, one image per device, full rematerialisation; LoRA of rank
64, or full fine-tuning with float32 weights, an EMA teacher and AdamW, unless the name says
otherwise. One micro-batch per step, and no anchors.

Names count **chips**. Google's own names do too for v5e and v6e; for v5p and 7x they count
TensorCores, two per chip: v5p-4 here is its v5p-8, v5p-64 its v5p-128, and tpu7x-4 its tpu7x-8.
`python -m dopsd_jax.estimate --topology` takes Google's names, and chips as in `v5p:2x2x1`.

What follows counts **devices**, as JAX does. A chip of v5e, v5p and v6e is one device. A chip of 7x
([Ironwood](https://docs.cloud.google.com/tpu/docs/tpu7x)) is two, with a TensorCore and half of its
192 GiB each: the four chips of tpu7x-4 are eight devices, and take eight images a step. What the
two devices of a chip send each other is counted as what they send to other chips.

*does not fit* without a peak: the arrays that stay for the whole run are already larger than the
device's memory (then nothing was compiled), or the compiler found no schedule that fits
(full v5e-8).
*not compiled*: not tried yet.
"""
MEASURES = ("TFLOP executed", "GiB at the peak", "GiB received", "collectives")
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def page(rows: list[tuple[str, dict | None]]) -> str:
    """The Markdown page. `rows`: names of cases and their records, None if there is none."""
    records = dict(rows)
    parts = [
        HEAD,
        "## Goals\n\n" + "\n".join(_goals(records)) + "\n",
        "## Memory and work of one device\n\n" + "\n".join(_memory(rows)) + "\n",
        "## Collectives of one step, per device\n\n" + "\n".join(_traffic(rows)) + "\n",
        "## From few chips to many: what one device does\n\n" + "\n".join(_growth(records)) + "\n",
        "## Compiled with less effort\n\n" + "\n".join(_quick(rows)) + "\n",
        "## Versions\n\n" + "\n".join(_versions(rows)) + "\n",
    ]
    return "\n".join(parts)


def _goals(records) -> list[str]:
    goals = (
        ("LoRA on one v6e chip, base in bfloat16", "lora v6e-1"),
        ("LoRA on one 16 GB v5e chip, base in int8", "lora v5e-1 int8"),
        ("full fine-tuning on four v5p chips (Google's v5p-8)", "full v5p-4"),
    )
    return [f"* {text}: {_verdict(records.get(name))}" for text, name in goals]


def _verdict(record: dict | None) -> str:
    if record is None:
        return "not compiled"
    report = record["report"]
    if report["needed"] is None:
        return f"**does not fit**: {report['problem']}, a device has {_gib(report['capacity'])}"
    verdict = "fits" if record["fits"] else "**does not fit**"
    return f"{verdict}, {_gib(report['needed'])} of {_gib(report['capacity'])} GiB"


def _memory(rows) -> list[str]:
    lines = [
        "GiB, and TFLOP of one step. Weights: base and adapters, or the master. On 7x the compiler",
        "writes nearly all of a LoRA run's base once more, in another layout, as a step starts",
        "(seen in the program of klein 4b): a second base is among the temporaries there.",
        "",
        "| case | mesh | weights | teacher | optimizer | temporaries | peak | device | | model |"
        " executed |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    for name, record in rows:
        if record is None:
            lines.append(f"| {name} | | | | | | | | not compiled | | |")
            continue
        report, needed = record["report"], record["report"]["needed"]
        live = report["account"]["live"]
        weights = sum(live.get(kind, 0) for kind in ("base", "adapters", "master"))
        rest = "" if needed is None else _gib(needed - sum(live.values()))
        devices = math.prod(report["mesh"].values())
        work = [f * report["images"] / devices / 1e12 for f in report["work"].values()]
        cells = [
            name,
            ", ".join(f"{a} {n}" for a, n in report["mesh"].items() if n > 1) or "one device",
            *(_gib(n) for n in (weights, live["teacher"], live["optimizer"])),
            rest,
            "" if needed is None else _gib(needed),
            _gib(report["capacity"]),
            "fits" if record["fits"] else "**does not fit**",
            *(f"{w:.0f}" for w in work),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _traffic(rows) -> list[str]:
    lines = [
        "GiB in results of collectives, and how often each runs; a loop's body counts as often as",
        "it runs. A reduce-scatter results in a device's share of a gradient. *of activations*:",
        "what of these has an axis of tokens; the others are weights, gradients and numbers.",
        "Klein 9b is as wide as its image has tokens, 4096: pieces of its weights are counted too.",
        "",
        f"| case | {' | '.join(KINDS)} | of activations |",
        f"|---|{'--:|' * (len(KINDS) + 1)}",
    ]
    for name, record in rows:
        if record is None or "unknown_loops" not in record["report"]:
            continue
        report = record["report"]
        cells = []
        for kind in KINDS:
            sent = report["sent"].get(kind)
            cells.append(f"{_gib(sent['bytes'])} ({sent['count']})" if sent else "0")
        found = report["activations"].values()
        total, count = (sum(f[key] for f in found) for key in ("bytes", "count"))
        cells.append(f"{total / 2**20:.1f} MiB ({count})" if found else "0")
        note = f" (at least: {report['unknown_loops']} loops)" if report["unknown_loops"] else ""
        lines.append(f"| {name}{note} | {' | '.join(cells)} |")
    return [*lines, *_shares(rows)]


def _shares(rows) -> list[str]:
    """How much of all results are activations, and how much of a full run's is summed whole."""
    total = lambda found: sum(traffic["bytes"] for traffic in found.values())
    reports = [
        (name, record["report"])
        for name, record in rows
        if record is not None and record["report"]["sent"]
    ]
    lines = []
    if reports:
        share, name = max((total(r["activations"]) / total(r["sent"]), n) for n, r in reports)
        most = f"Activations are at most {share:.3%} of the results, in {name}."
        lines += ["", most if share else "None of them are activations."]
    summed = [
        (r["sent"].get("all-reduce", {"bytes": 0})["bytes"], n)
        for n, r in reports
        if n.startswith("full") and r["mesh"]["data"] == 1
    ]
    if summed:
        most, name = max(summed)
        lines += [
            "",
            f"Full fine-tuning with all weights split sums at most {most / 2**20:.0f} MiB whole on",
            f"every device ({name}); its gradients are reduce-scattered.",
        ]
    return lines


def _growth(records) -> list[str]:
    lines = [
        "*At least*: the program of the few chips has loops of which the compiler does not say how",
        "often they run; each counts once.",
        "",
        "| | | few chips | many | ratio |",
        "|---|---|--:|--:|--:|",
    ]
    for slices, few, many in (("v6e", 8, 256), ("v5p", 4, 64)):
        for train in ("lora", "full"):
            name = f"{train} {slices}-{few} to {many}"
            pair = [records.get(f"{train} {slices}-{n}") for n in (few, many)]
            if None in pair or None in [record["report"]["sent"] for record in pair]:
                lines.append(f"| {name} | | not compiled | | |")
                continue
            unknown = pair[0]["report"]["unknown_loops"]
            measures = zip(MEASURES, *(_of_one_device(r["report"]) for r in pair), strict=True)
            for measure, a, b in measures:
                least = unknown and measure in MEASURES[2:]
                ratio = "" if least else f"{b / a:.4f}" if a else "1"
                shown = f"at least {a:.2f}" if least else f"{a:.2f}"
                lines.append(f"| {name} | {measure} | {shown} | {b:.2f} | {ratio} |")
    return lines


def _of_one_device(report: dict) -> list[float]:
    """What `MEASURES` names."""
    devices = math.prod(report["mesh"].values())
    sent = report["sent"].values()
    return [
        report["work"]["executed"] * report["images"] / devices / 1e12,
        report["needed"] / 2**30,
        sum(traffic["bytes"] for traffic in sent) / 2**30,
        sum(traffic["count"] for traffic in sent),
    ]


def _quick(rows) -> list[str]:
    lines = [
        "`estimate` asks the compiler for less effort than a run does, and once more for the whole",
        "where the peak is within 3 % of the device's memory. GiB at the peak, and seconds of the",
        "compiler on two cores; only those of one row can be compared.",
        "",
        "| case | peak | with less | ratio | seconds | with less | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, record in rows:
        if record is None or not record.get("quick"):
            continue
        cells = []
        for key, form in (("needed", _gib), ("seconds", "{:.0f}".format)):
            full, less = record["report"][key], record["quick"][key]
            cells += [form(full), form(less), f"{less / full:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _versions(rows) -> list[str]:
    lines = [
        "Commit: where a case was compiled; checked: the last at which the compiler would be given",
        "the same program.",
        "",
        "| case | commit | checked | jax | libtpu |",
        "|---|---|---|---|---|",
    ]
    for name, record in rows:
        if record is not None:
            versions = record["versions"]
            lines.append(
                f"| {name} | {record['commit']} | {record['checked']} | {versions['jax']} |"
                f" {versions['libtpu']} |"
            )
    return lines


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"
