"""FLUX.2-klein's fields of the configuration: how the teacher is shown the picture.

Imports no JAX.
"""

from collections.abc import Mapping
from typing import Any

from dopsd_jax.common.config_fields import Field

CONTEXTS = {"edit_ref": True}  # the picture as a reference, with an instruction behind the caption

_REFERENCE = {"teacher.context": ("edit_ref",)}
# Our own words; the released code asks for the same: the subject, the place and the composition.
INSTRUCTION = (
    "Show what the reference image shows: the same subject with the same details, in the same "
    "surroundings and arrangement."
)
# fmt: off
FIELDS = (
    Field("teacher.instruction", INSTRUCTION, "what is said to the teacher behind the caption",
          when=_REFERENCE),
    Field("teacher.reference_pixels", 1024 * 1024,
          "area of the reference, at most; a larger picture is made smaller", low=64 * 64,
          high=2024 * 2024, unit="pixels", when=_REFERENCE),
)
# fmt: on


def faults(given: Mapping[str, Any]) -> list[str]:
    """What does not go together: nothing."""
    return []
