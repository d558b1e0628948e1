"""Makes docs/gpus.md: what fits on which GPU, counted from shapes.

    python benchmarks/gpus.py

No GPU is needed, and nothing is measured on one: tests/test_counted.py says how far such an
estimate is from what a compiler needs. A few minutes.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app

from dopsd_jax.common.progress import Progress
from dopsd_jax.estimation import abstract_step, counted_step
from dopsd_jax.families.base import STUDENT, TEACHER

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpus.md"
CARDS = (12, 16, 24, 32, 48, 80, 140)
SIDES = (1024, 768, 512)
LORA = [{"base_dtype": kind} for kind in ("bfloat16", "int8", "nf4")]
FULL = [
    {},
    {"moments_dtype": "bfloat16", "offload": "teacher"},
    {"optimizer": "adafactor", "offload": "teacher"},
]
MODELS = (
    ("Z-Image-Turbo", "zimage", "lora", "full"),
    ("FLUX.2-klein 4B", "flux2_klein", "4b", "4b_identity_full"),
    ("FLUX.2-klein 9B", "flux2_klein", "9b", "9b_identity_full"),
)
HEAD = f"""# What fits on which GPU

Made by `python benchmarks/gpus.py`; do not edit. Memory of one device in GiB for a step of one
image (larger batches by `accumulate`), full rematerialisation, LoRA of rank 64. **Estimates,
counted from shapes; none was measured on a GPU.** What the arrays take is exact; for what a
compiler needs beside them stands a rule that is within 4 % of the steps that were compiled
([scaling.md](scaling.md), tests/test_counted.py). Of a card's memory {counted_step.USABLE:.0%}
count as free for arrays. For your own configuration:

```sh
python -m dopsd_jax.estimate --config configs/zimage.py --config.batch_size=1 --device 24GB
```

*smallest card*: of {", ".join(map(str, CARDS))} GiB.

| model | trained | pixels | settings | GiB | smallest card |
|---|---|---|---|--:|---|
"""


def main(_) -> None:
    jax.config.update("jax_platforms", "cpu")
    todo = list(cases())
    progress = Progress("case", len(todo))
    rows = [row(*case) for case in progress.over(todo)]
    PAGE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"wrote {PAGE}")


def cases() -> Iterator[tuple[str, str, str, int, dict[str, Any]]]:
    """Model, family, preset, side of the picture, changed fields."""
    for model, family, lora, full in MODELS:
        for side in SIDES:
            for fields in LORA:
                yield model, family, lora, side, fields
        for fields in FULL:
            yield model, family, full, SIDES[0], fields


def row(model: str, family: str, preset: str, side: int, fields: dict[str, Any]) -> str:
    """A line of the table."""
    path = ROOT / "configs" / f"{family}.py"
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(preset)
    config.update_from_flattened_dict({"batch_size": 1, "data.resolution": side, **fields})
    config.mesh.data, config.mesh.fsdp = 1, 1
    found, size, _ = abstract_step.find_network(config, full_size=True)
    students, teachers = found.ROWS[STUDENT], found.ROWS[TEACHER]
    case = abstract_step.Workload(
        found, size, height=side, width=side, rows_student=students, rows_teacher=teachers
    )
    report = counted_step.count_step(config, case, counted_step.find_gpu("80GB"))
    needed = report.needed
    fits = [c for c in CARDS if needed <= counted_step.find_gpu(f"{c}GB").usable]
    settings = ", ".join(f"`{k}={v}`" for k, v in fields.items()) or "defaults"
    return (
        f"| {model} | {config.train} | {side} x {side} | {settings} | {needed / 2**30:.1f} | "
        f"{fits[0] if fits else 'none'} |"
    )


if __name__ == "__main__":
    app.run(main)
