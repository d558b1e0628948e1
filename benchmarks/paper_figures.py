"""The figures of docs/results.md. Needs matplotlib: pip install -e '.[bench]'."""

from pathlib import Path

import matplotlib
from paper_arms import ABLATIONS, LOOKS, METHODS, RATES
from paper_records import CONCEPT, CRISP, RETENTION, Records

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMES = {
    "lora": "results_lora.png",
    "full": "results_full.png",
    "ablations": "results_ablations.png",
}
_SHADES = "#c1272d", "#0000a7", "#008176", "#eecc16", "#7b3294", "#707070"
COLOURS = dict(zip(METHODS, _SHADES, strict=True))


def draw(records: Records, folder: Path) -> dict[str, str]:
    """Draws what has records; returns the files' names."""
    drawn = {}
    for train in RATES:
        if records.any(train):
            _methods(records, train, folder / NAMES[train])
            drawn[train] = NAMES[train]
    if records.arm("dopsd", "lora", RATES["lora"][0]):
        _ablations(records, folder / NAMES["ablations"])
        drawn["ablations"] = NAMES["ablations"]
    return drawn


def _methods(records: Records, train: str, path: Path) -> None:
    """Crispness and retention against the concept's score, along the steps."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True)
    for axis, measure in zip(axes, (CRISP, RETENTION), strict=True):
        for method in METHODS:
            for rate, style in zip(RATES[train], ("-", "--"), strict=True):
                arm = records.arm(method, train, rate)
                if arm is None:
                    continue
                points = [
                    (arm.curve(CONCEPT, n).mean(), arm.curve(measure, n).mean())
                    for n in (0, *LOOKS)
                ]
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    color=COLOURS[method],
                    marker="o",
                    markersize=3,
                    label=f"{method}, {rate:g}",
                )
        axis.set_xlabel("concept: IoU in arrangements that were not shown")
    axes[0].set_ylabel("crispness, relative to the base")
    axes[1].set_ylabel("retention: ordinary prompts right")
    axes[1].legend(fontsize=7, handlelength=3)
    figure.suptitle(f"After 0, {', '.join(map(str, LOOKS))} steps; means of all runs ({train})")
    _save(figure, path)


def _ablations(records: Records, path: Path) -> None:
    """Concept and crispness over steps."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharex=True)
    rate, steps = RATES["lora"][0], (0, *LOOKS)
    for name in ("dopsd", "offpolicy", "sft", "sft_teacher", *ABLATIONS):
        arm = records.arm(name, "lora", rate)
        if arm is None:
            continue
        style = {"color": COLOURS[name], "linewidth": 2} if name in COLOURS else {"linestyle": ":"}
        for axis, measure in zip(axes, (CONCEPT, CRISP), strict=True):
            axis.plot(steps, [arm.curve(measure, n).mean() for n in steps], label=name, **style)
    for axis, label in zip(axes, ("concept", "crispness, relative to the base"), strict=True):
        axis.set_xlabel("steps")
        axis.set_ylabel(label)
    axes[1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.suptitle(f"Adapters, rate {rate:g}; means of all runs")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
