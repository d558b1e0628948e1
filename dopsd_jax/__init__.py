"""D-OPSD for few-step image models, in JAX: tune them without losing their few steps."""

import os
from collections.abc import Sequence
from typing import Any

# transformers advises to install PyTorch; of it we use tokenizers only.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"


def load_pipeline(
    path: str,
    dtype: str = "float32",
    lora: str | Sequence[str] | None = None,
    vlm: str | None = None,
    base_dtype: str | None = None,
) -> Any:
    """The model at `path`: a Hugging Face-layout folder, a converted checkpoint or a hub id.

    dtype: type of activations: float32, bfloat16 or float16. lora: a LoRA file to apply, FILE or
    FILE:STRENGTH, or several, whose changes add up. vlm: folder or hub id of the vision-language
    model that the teacher's context needs; None: the folder `vlm` of the model. base_dtype: what
    the transformer's weights are stored in: bfloat16, float32, or quantised: int8, nf4, fp8 (extra
    `quant`); None: as in the folder.
    Returns a `families.pipeline.Pipeline`. Raises `errors.UserError`.
    """
    from dopsd_jax.common.lora_options import lora_options
    from dopsd_jax.families.pipeline import pipeline
    from dopsd_jax.weights import hub

    loras = lora_options(lora or ())
    folder = hub.resolve(path).path
    beside = {"vlm": hub.resolve(vlm, patterns=hub.ROOT).path} if vlm else None
    pipe = pipeline(folder, beside=beside, dtype=dtype, base_dtype=base_dtype)
    pipe.use_attention("auto")
    pipe.plan_loras(loras)
    return pipe
