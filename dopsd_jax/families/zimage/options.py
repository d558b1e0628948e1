"""Z-Image's fields of the configuration: how the teacher is shown the picture. Imports no JAX."""

from collections.abc import Mapping
from typing import Any

from dopsd_jax.common.config_fields import Field

# The row's picture through the vision-language model, or another one of its concept.
CONTEXTS = {"vlm": True, "other": True}
EDITING = ()
MIN_PIXELS, MAX_PIXELS = 512 * 512, 768 * 768  # upstream's bounds

_VLM = {"teacher.context": tuple(CONTEXTS)}
_AREA = {"low": 1, "high": 2**28, "unit": "pixels", "when": _VLM}
# fmt: off
FIELDS = (
    Field("teacher.doubled_template", False,
          "the prompt is put into its template twice, as in the released code", when=_VLM),
    Field("teacher.min_pixels", MIN_PIXELS,
          "smallest area of the picture that the vision tower gets", **_AREA),
    Field("teacher.max_pixels", MAX_PIXELS,
          "largest area of the picture that the vision tower gets", **_AREA),
)
# fmt: on


def faults(given: Mapping[str, Any]) -> list[str]:
    """What does not go together."""
    low, high = given["teacher.min_pixels"], given["teacher.max_pixels"]
    if high >= low:
        return []
    return [f"config.teacher.max_pixels: {high} is below config.teacher.min_pixels, {low}"]
