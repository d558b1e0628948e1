"""A LoRA file as options name it: FILE, or FILE:STRENGTH."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dopsd_jax.common.atomic import path_fault
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import expand


class LoraOption(NamedTuple):
    """A file or PEFT folder, and the factor that its change is multiplied with."""

    path: Path
    strength: float = 1.0


def lora_option(text: str) -> LoraOption:
    """`dog.safetensors:0.8` and the like. Raises ValueError with what is wrong.

    What follows the last colon is a strength if it is a number and no file has the whole name.

    Examples:
      >>> lora_option("dog.safetensors:0.8").strength
      0.8
      >>> lora_option("dog.safetensors").strength
      1.0
    """
    if fault := path_fault(text):
        raise ValueError(fault)
    path, colon, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        colon = ""
    if not colon or os.path.exists(text):
        path, strength = text, 1.0
    if not path:
        raise ValueError("names no file; write FILE or FILE:STRENGTH")
    if not math.isfinite(strength):
        raise ValueError(f"has the strength {number}; give a finite number")
    return LoraOption(expand(path), strength)


def lora_options(given: str | Sequence[str | LoraOption]) -> tuple[LoraOption, ...]:
    """The files that an argument of a function names: one, or several. Raises `UserError`."""
    several = [given] if isinstance(given, str) else given
    try:
        return tuple(x if isinstance(x, LoraOption) else lora_option(str(x)) for x in several)
    except ValueError as error:
        raise UserError(f"LoRA {given}: {error}") from None
