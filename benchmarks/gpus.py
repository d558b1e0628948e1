"""Makes docs/gpus.md: a configuration for each card, and what fits on which GPU.

    python benchmarks/gpus.py

No GPU is needed, and nothing is measured on one: tests/test_counted.py says how far such an
estimate is from what a compiler needs. A few minutes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app
from ml_collections import ConfigDict

from dopsd_jax.common import gpu_memory
from dopsd_jax.common.progress import Progress
from dopsd_jax.config.loading import load
from dopsd_jax.config.schema import flat
from dopsd_jax.estimation import abstract_step, counted_step, encoders, flops
from dopsd_jax.estimation.abstract_step import Workload
from dopsd_jax.estimation.compiled_step import Report
from dopsd_jax.families.base import STUDENT, TEACHER

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpus.md"
CARDS = (12, 16, 24, 32, 48, 80, 140)
# The cards with a configuration of their own, and one of each size, whose rate the hours are for.
PACKAGED = {12: "RTX 4070", 16: "RTX 4080", 24: "RTX 4090", 48: "L40S", 80: "H100"}
REACHED = 0.4  # share of that rate
MARGIN = 0.1  # share of the usable memory that a packaged configuration leaves
SIDES = (1024, 768, 512)
LORA = [
    *({"base_dtype": kind} for kind in ("bfloat16", "int8", "nf4")),
    {"base_dtype": "bfloat16", "offload": "base"},
]
FULL = [
    {},
    {"moments_dtype": "bfloat16", "offload": "teacher"},
    {"optimizer": "adafactor", "offload": "teacher"},
]
# Name, family, presets: the recipe, for a card, of full fine-tuning.
MODELS = (
    ("Z-Image-Turbo", "zimage", "lora", "{}gb", "full"),
    ("FLUX.2-klein 4B", "flux2_klein", "4b", "4b_{}gb", "4b_identity_full"),
    ("FLUX.2-klein 9B", "flux2_klein", "9b", "9b_{}gb", "9b_identity_full"),
)
HEAD = f"""# What fits on which GPU

Made by `python benchmarks/gpus.py`; do not edit. **Estimates, counted from shapes; none was
measured on a GPU**; what is will be in [on_gpu.md](on_gpu.md). What the arrays take is exact; for
what a compiler needs beside them stands a
rule that is within 4 % of the steps that were compiled for TPUs ([scaling.md](scaling.md),
tests/test_counted.py). The programs let JAX use {100 * gpu_memory.SHARE:.0f} % of a card's memory,
unless `XLA_CLIENT_MEM_FRACTION` says otherwise (JAX alone stops at 75 %). Lower it where the screen
or another program, as PyTorch with `evaluate --torch_device=cuda`, needs more.

## A configuration for each card

```sh
python -m dopsd_jax.estimate --config configs/zimage.py:24gb --device 24GB
python -m dopsd_jax.train --config configs/zimage.py:24gb --config.data.path=photos \\
    --workdir runs/dog
```

Each is the recipe, less what it must give up to leave {100 * MARGIN:.0f} % or more of the usable
memory free (tests/test_cards.py), in this order: the four images of a step one after another, which
is the same training; a base in 8 bits, whose error is small ([quantised.md](quantised.md);
`pip install 'dopsd_jax[quant]'`); smaller pictures and rank; a base in 4 bits, whose error is not
small. Where one image at a time leaves the room, what its products gave is kept (`remat=dots`): by
the count a step then has a fifth less to do. For rows that edit pictures a step needs more:
`estimate` counts one reference, or those of `--references`.

| card | model | configuration | instead of the recipe's | GiB | free | encoder | s a step | hours |
|---|---|---|---|--:|--:|--:|--:|--:|
"""
BETWEEN = f"""
*GiB*: of the step. *free*: of what is usable. *encoder*: GiB of the text encoder, before the first
step, when nothing else is loaded; **CPU**: it does not fit, see below. *s a step*, *hours*: for all
steps of the configuration ({{steps}}), if they reach {100 * REACHED:.0f} % of the rate in the data
sheet of {{examples}}; what they do reach has not been measured. Smaller pictures and fewer steps
save most.

Where the text encoder does not fit, let the CPU encode, once, in the host's memory. Training then
needs no encoder; the prompts of anchors are encoded with the rest. Leave out `sample_prompts`,
which needs one:

```sh
JAX_PLATFORMS=cpu python -m dopsd_jax.prepare --config configs/flux2_klein.py:9b_16gb \\
    --config.data.path=photos --out=features
python -m dopsd_jax.train --config configs/flux2_klein.py:9b_16gb --config.data.path=features \\
    --workdir runs/dog
```

## Any settings

GiB for a step of one image, full rematerialisation, LoRA of rank 64 with the recipe's anchors.
Larger batches by `accumulate`: without anchors, as where all is trained, they take one gradient
more (of Z-Image 23 GiB). *smallest card*: of {", ".join(map(str, CARDS))} GiB.
`offload=base`: the frozen layers lie in the host's memory and are copied to the device one at a
time, in every forward and backward pass ([running.md](running.md#layers-in-the-hosts-memory)); two
layers are counted on the device, which was compared with no compiled step of this size. No
configuration above uses it, because it has not run on a GPU.

| model | trained | pixels | settings | GiB | smallest card |
|---|---|---|---|--:|---|
"""


class Packaged(NamedTuple):
    """A configuration for a card of so many GiB, and the recipe that it is made from."""

    card: int
    model: str
    spec: str
    recipe: str

    def config(self) -> ConfigDict:
        return read(self.spec)

    def changes(self) -> dict[str, Any]:
        """The fields in which it differs from the recipe."""
        recipe = flat(read(self.recipe))
        return {k: v for k, v in flat(self.config()).items() if v != recipe[k]}

    def report(self) -> tuple[Report, Workload]:
        """Of its step on the published network."""
        config = self.config()
        case = workload(config, config.data.resolution)
        return counted_step.count_step(config, case, counted_step.find_gpu(f"{self.card}GB")), case


def main(_) -> None:
    jax.config.update("jax_platforms", "cpu")
    cards, others = packaged(), list(cases())
    progress = Progress("case", len(cards) + len(others))
    of_cards = list(progress.over(map(card_row, cards)))
    rows = list(progress.over(row(*case) for case in others))
    steps = {one.config().steps for one in cards}
    between = BETWEEN.format(
        steps=" or ".join(map(str, sorted(steps))),
        examples=", ".join(PACKAGED.values()),
    )
    PAGE.write_text(
        HEAD + "\n".join(of_cards) + "\n" + between + "\n".join(rows) + "\n", encoding="utf-8"
    )
    print(f"wrote {PAGE}")


def packaged() -> list[Packaged]:
    """The configurations for cards, the smallest card first."""
    return [
        Packaged(card, model, f"{family}:{preset.format(card)}", f"{family}:{recipe}")
        for card in PACKAGED
        for model, family, recipe, preset, _ in MODELS
    ]


def read(spec: str) -> ConfigDict:
    """A configuration of this clone, by its name."""
    family, _, preset = spec.partition(":")
    return load(f"{ROOT / 'configs' / family}.py:{preset}")


def workload(config: ConfigDict, side: int) -> Workload:
    """A square picture on the published network, with long captions."""
    family, size, *_ = abstract_step.find_network(config, full_size=True)
    rows = family.ROWS
    return Workload(
        family,
        size,
        height=side,
        width=side,
        rows_student=rows[STUDENT],
        rows_teacher=rows[TEACHER],
    )


def free(report: Report) -> float:
    """Share of the usable memory that a step leaves."""
    return 1 - report.needed / report.capacity


def settings(fields: dict[str, Any]) -> str:
    return ", ".join(f"`{k}={v}`" for k, v in fields.items())


def card_row(one: Packaged) -> str:
    """A line of the first table."""
    config, (report, case) = one.config(), one.report()
    weights = encoders.text_encoder(config, case)
    encoder = f"{weights / 2**30:.1f}" if encoders.fits(weights, report.capacity) else "**CPU**"
    rate = REACHED * flops.peak_rate(counted_step.find_gpu(PACKAGED[one.card]).name)
    seconds = report.work.executed * report.images / rate
    return (
        f"| {one.card} GB | {one.model} | `{one.spec}` | {settings(one.changes()) or 'nothing'} | "
        f"{report.needed / 2**30:.1f} | {free(report):.0%} | {encoder} | {seconds:.0f} | "
        f"{seconds * config.steps / 3600:.0f} |"
    )


def cases() -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Model, configuration, side of the picture, changed fields."""
    for model, family, lora, _, full in MODELS:
        for side in SIDES:
            for fields in LORA:
                yield model, f"{family}:{lora}", side, fields
        for fields in FULL:
            yield model, f"{family}:{full}", SIDES[0], fields


def row(model: str, spec: str, side: int, fields: dict[str, Any]) -> str:
    """A line of the second table."""
    config = read(spec).copy_and_resolve_references()
    config.update_from_flattened_dict({"batch_size": 1, "data.resolution": side, **fields})
    config.mesh.data, config.mesh.fsdp = 1, 1
    report = counted_step.count_step(config, workload(config, side), counted_step.find_gpu("80GB"))
    fits = smallest(report.needed, CARDS)
    return (
        f"| {model} | {config.train} | {side} x {side} | {settings(fields) or 'defaults'} | "
        f"{report.needed / 2**30:.1f} | {fits or 'none'} |"
    )


def smallest(needed: int, cards: Sequence[int]) -> int | None:
    """The smallest of the cards, in GiB, whose usable memory is enough."""
    usable = {card: counted_step.find_gpu(f"{card}GB").usable for card in cards}
    return next((card for card in cards if needed <= usable[card]), None)


if __name__ == "__main__":
    app.run(main)
