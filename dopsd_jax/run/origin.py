"""What a LoRA file says of the run that made it: see `weights.lora_header` for the names.

No date, no machine's path: the same run gives the same file, and a shared file tells nothing of its
maker's disk.
"""

import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from dopsd_jax.common.config_fields import as_paths
from dopsd_jax.common.files import expand
from dopsd_jax.conditioning.cached import DIGESTS
from dopsd_jax.config.changes import WEIGHTS
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.run import data_set
from dopsd_jax.weights.lora_settings import EDITS, OWN

BASE_DIGEST = f"{OWN}{WEIGHTS}"


def header_strings(
    config: ConfigDict,
    pipe: Pipeline,
    cache: Path,
    pictures: int,
    edits: bool,
    data: str,
    revision: str | None,
) -> dict[str, str]:
    """The header strings of the LoRA files of a run; none for one that trains the whole network.

    pictures, edits, data: how many are trained on, whether they edit others, and the digest of the
    data set. revision: of config.model on the hub. The model's digest is computed once and kept in
    `cache`, like those of the encoders.
    """
    if config.train == "full":
        return {}
    size, name = data_set.largest_size(config), Path(as_paths(config.data.path)[0]).stem
    model = Path(config.model).name if os.path.exists(expand(config.model)) else config.model
    model = f"{model}@{revision}" if revision else model
    steps = pipe.family.DEPLOYED_STEPS
    found = {
        "modelspec.title": name,
        "modelspec.resolution": str(size),
        "modelspec.usage_hint": f"{steps} steps, no guidance (cfg 1; diffusers: 0), strength 1",
        "ss_sd_model_name": model,
        "ss_resolution": str(tuple(size)),
        "ss_num_train_images": str(pictures),
        f"{OWN}base_model": model,
        BASE_DIGEST: pipe.part_digest("transformer", cache / DIGESTS),
        f"{OWN}data_digest": data,
        f"{OWN}method": config.method,
        f"{OWN}sampling_steps": str(steps),
        f"{OWN}guidance": "1",
    }
    if edits:
        found[EDITS] = "True"
    if config.data.trigger:
        found["modelspec.trigger_phrase"] = config.data.trigger
        # The field in which ComfyUI extensions look for trigger words.
        found["ss_tag_frequency"] = json.dumps({name: {config.data.trigger: pictures}})
    return found
