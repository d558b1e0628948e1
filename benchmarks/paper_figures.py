"""The figures of docs/results.md. Needs matplotlib: pip install -e '.[bench]'."""

from pathlib import Path

import matplotlib
import numpy as np
from paper_arms import DROPPED, METHODS, OPEN, RATES, WHOLE, Arm
from paper_records import CRISP, IDENTITY, RETENTION, Records
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMES = {
    "pictures": "results_pictures.png",
    "map": "results_map.png",
    "lora": "results_lora.png",
}
# Rows of the figure of pictures: title, and the arm whose strip it is.
RATE = RATES["lora"][0]
STRIPS = {
    "base": "base lora model",
    "teacher": "teacher lora model",
    "D-OPSD": Arm("dopsd", "lora", RATE),
    "D-OPSD + anchor": Arm("dopsd + anchor", "lora", RATE),
    "SFT": Arm("sft", "lora", RATE),
    "SFT, grid's levels": Arm("sft at the grid's levels", "lora", RATE),
    "off-policy": Arm("off-policy", "lora", RATE),
    "PSO": Arm("pso", "lora", RATE),
    "DreamBooth": Arm("dreambooth", "lora", RATE),
}
SIDE = 64


def draw(records: Records, folder: Path, runs: Path) -> dict[str, str]:
    """Draws what there are records or pictures of; returns the files' names by figure."""
    drawn = {}
    if _pictures(runs / "pictures", folder / NAMES["pictures"]):
        drawn["pictures"] = NAMES["pictures"]
    if records.arm("dopsd", captions=WHOLE):
        _map(records, folder / NAMES["map"])
        drawn["map"] = NAMES["map"]
    if records.any("lora"):
        _methods(records, folder / NAMES["lora"])
        drawn["lora"] = NAMES["lora"]
    return drawn


def _pictures(strips: Path, path: Path) -> bool:
    """A row for each model; whether there is such a figure, now or from an earlier call."""
    found = {}
    for title, arm in STRIPS.items():
        name = arm if isinstance(arm, str) else arm.key(0, 0).replace("|", " ")
        file = strips / f"{name}.png"
        if file.exists():
            with Image.open(file) as image:
                found[title] = np.asarray(image)
    if missing := [title for title in STRIPS if title not in found]:
        if path.exists():  # of a call with other runs in its folder
            print(f"{path.name}: left as it is; {strips} has nothing of {', '.join(missing)}")
            return True
        if not found:
            return False
    figure, axes = plt.subplots(len(found), 1, figsize=(8, 1.15 * len(found)), squeeze=False)
    columns = max(image.shape[1] for image in found.values()) // SIDE
    for axis, (title, image) in zip(axes[:, 0], found.items(), strict=True):
        blank = np.full((SIDE, columns * SIDE - image.shape[1], 3), 255, np.uint8)
        axis.imshow(np.concatenate([image, blank], axis=1), interpolation="nearest")
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    titles = ("the word", "the word", "the word", "placed", "ordinary", "ordinary")
    for number, title in enumerate(titles[:columns]):
        axes[0, 0].text((number + 0.5) * SIDE, -4, title, ha="center", fontsize=8)
    _save(figure, path)
    return True


def _map(records: Records, path: Path) -> None:
    """Identity and crispness by openness of the captions and copying of the teacher."""
    teachers = {"the whole picture": "dopsd", **{name: name for name in DROPPED}}
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8))
    for axis, measure, title in zip(
        axes, (IDENTITY, CRISP), ("identity", "crispness, true pictures = 1"), strict=True
    ):
        table = np.full((2, len(teachers)), np.nan)
        for i, captions in enumerate((OPEN, WHOLE)):
            for j, name in enumerate(teachers.values()):
                arm = records.arm(name, captions=captions)
                if arm:
                    table[i, j] = arm.final(measure).value
        axis.imshow(table, cmap="viridis", vmin=0, vmax=1.2, aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white")
        axis.set_xticks(range(len(teachers)), teachers, fontsize=8)
        axis.set_yticks(range(2), ("open captions", "whole captions"), fontsize=8)
        axis.set_title(title, fontsize=9)
    figure.suptitle("D-OPSD: what captions leave open, and what the teacher is shown", fontsize=10)
    _save(figure, path)


def _methods(records: Records, path: Path) -> None:
    """Crispness and retention against identity, along the steps."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharex=True)
    colours = plt.get_cmap("tab10").colors
    for axis, measure in zip(axes, (CRISP, RETENTION), strict=True):
        for number, method in enumerate(METHODS):
            for rate, style in zip(RATES["lora"], ("-", "--"), strict=True):
                arm = records.arm(method, rate=rate)
                if arm is None:
                    continue
                steps = arm.steps[1:] if measure == CRISP else arm.steps
                points = [(arm.curve(IDENTITY, n).mean(), arm.curve(measure, n).mean())
                          for n in steps]  # fmt: skip
                axis.plot(*zip(*points, strict=True), style, color=colours[number], marker="o",
                          markersize=3, label=f"{method}, {rate:g}")  # fmt: skip
        axis.set_xlabel("identity, pictures of the word alone")
    axes[0].set_ylabel("their crispness, true pictures = 1")
    axes[1].set_ylabel("retention: ordinary prompts right")
    axes[1].legend(fontsize=6, handlelength=3, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.suptitle("Along the steps; means of all runs (LoRA)")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
