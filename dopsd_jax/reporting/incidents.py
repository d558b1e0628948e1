"""incidents/step_N.json: the batch of a step that went wrong."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dopsd_jax.common.atomic import make_folder, write_text
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.loader import BatchIndex
from dopsd_jax.reporting.metrics import plain
from dopsd_jax.training.nonfinite import FOLDER


def write_incident(
    workdir: epath.Path,
    why: str,
    metrics: Mapping[str, Any],
    batch: BatchIndex,
    dataset: Dataset,
    anchors: Sequence[str] = (),
) -> epath.Path:
    """Writes incidents/step_N.json: which rows, files and captions the step saw; returns its path.

    `metrics`: the step's record, with `step`. `anchors`: prompts of the step's anchors.
    """
    samples = []
    dropped = batch.dropped or (False,) * len(batch.rows)
    drawn = zip(batch.rows, batch.prompt_keys, batch.captions, dropped, strict=True)
    for row, key, caption, gone in drawn:
        content = dataset.rows[row]
        samples.append(
            {
                "row": content.where,
                "image": str(content.image),
                "prompt_key": key,
                "caption": content.captions[caption][1],
            }
            | ({"student's caption": ""} if gone else {})
        )
    step = metrics["step"]
    record = {
        "why": why,
        "metrics": {name: plain(value) for name, value in metrics.items()},
        "size": list(batch.shape.bucket),
        "samples": samples,
        "anchors": list(anchors),
    }
    path = workdir / FOLDER / f"step_{step}.json"
    make_folder(path.parent)
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path
