"""FLUX.2-klein's fields of the configuration: how the teacher is shown the picture.

Imports no JAX.
"""

from collections.abc import Mapping
from typing import Any

from dopsd_jax.common.config_fields import Field

# The picture as a reference, with an instruction behind the caption: by itself, or after the
# references that the row edits; or another picture of its concept.
CONTEXTS = {"edit_ref": True, "gt_ref": True, "other": True}
EDITING = ("gt_ref",)
REFERENCE_PIXELS = 1024 * 1024  # the area of a reference, at most

_REFERENCE = {"teacher.context": tuple(CONTEXTS)}
# Our own words for what the released code asks for.
INSTRUCTIONS = {
    "edit_ref": "Show what the reference image shows: the same subject with the same details, in "
    "the same surroundings and arrangement.",
    "gt_ref": "The last reference image is the wanted result: come as close to it as you can, and "
    "keep to the first reference image and to the instruction.",
    "other": "Show the subject of the reference image with the same details. The reference shows "
    "it on another occasion: surroundings, arrangement and view are others here.",
}
# fmt: off
FIELDS = (
    Field("teacher.instruction", "",
          "what is said to the teacher behind the caption; empty: the context's own words",
          when=_REFERENCE),
    Field("teacher.reference_pixels", REFERENCE_PIXELS,
          "area of the row's picture as the teacher's reference, at most; a larger one is made "
          "smaller", low=64 * 64, high=2024 * 2024, unit="pixels", when=_REFERENCE),
)
# fmt: on


def faults(given: Mapping[str, Any]) -> list[str]:
    """What does not go together: nothing."""
    return []
