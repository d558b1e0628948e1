"""What the page draws: a prompt by the base model, and with LoRA files at several strengths."""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.files import can_enter
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.conditioning.padding import longest, padded_rows, shapes_of
from dopsd_jax.families.base import STUDENT, PaddedLengths, Tree
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.families.prompts import prompt_features
from dopsd_jax.families.sampling import start_noise
from dopsd_jax.reporting import parameters
from dopsd_jax.reporting.parameters import Lora, Parameters

BASE = "base"
MOST_STRENGTHS = 16  # of one request
MOST_STEPS = 1000
SUFFIX = ".safetensors"


class Drawn(NamedTuple):
    """A picture, what to write under it, and how it was made."""

    label: str
    image: UInt8[np.ndarray, "_h _w 3"]
    made: Parameters


class Studio:
    """One model, and the LoRA files of one folder: no others can be asked for.

    model: its name. folder: None: there are no LoRA files. One request is drawn at a time.
    """

    def __init__(self, pipe: Pipeline, model: str, folder: Path | None):
        self.pipe, self.model, self.folder = pipe, Path(model).name, folder
        if folder is not None and not can_enter(folder):
            raise UserError(
                f"--loras {folder}: is no folder that can be read; name one that has LoRA files"
            )
        self._turn = threading.Lock()
        self._rows: PaddedLengths = {}  # of the longest prompt so far: one sampler for most
        # With digests: a run may write another best.safetensors meanwhile.
        self._attached: tuple[list[LoraOption], tuple[Lora, ...]] = [], ()

    def files(self) -> dict[str, Path]:
        """The LoRA files that are in the folder now, by their names in it."""
        if self.folder is None:
            return {}
        found = sorted(path for path in self.folder.rglob(f"*{SUFFIX}") if os.path.isfile(path))
        names = {path.relative_to(self.folder).as_posix(): path for path in found}
        return {n: p for n, p in names.items() if not any(x[0] == "." for x in n.split("/"))}

    def draw(
        self,
        prompt: str,
        seed: int,
        names: Sequence[str] = (),
        strengths: Sequence[float] = (1.0,),
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
    ) -> Iterator[Drawn]:
        """The base model's picture, then one for each strength, all from the same noise.

        names: of `files`; their changes add up. strengths: what every change is multiplied with.
        height, width, steps: None: the model's own. Raises `UserError`.
        """
        height, width = height or self.pipe.own_size, width or self.pipe.own_size
        shape = self.pipe.latent_shape(height, width)
        loras = self._checked(prompt, seed, names, strengths, steps)
        used = parameters.used(loras)
        made = Parameters(prompt, 0, seed, width, height, self.model)
        made = made._replace(steps=len(self.pipe.deployed_grid(shape, steps)) - 1)
        context, noise = None, start_noise(seed, 1, shape)
        more = [strength for strength in dict.fromkeys(strengths) if strength and loras]
        for strength in (0.0, *more):
            with self._turn:  # not between two pictures: who asked may be gone
                if (loras, used) != self._attached:
                    self.pipe.use_loras(loras)
                    self._attached = loras, used
                if context is None:
                    context = self._context(prompt)
                image = self.pipe(
                    [prompt],
                    height=height,
                    width=width,
                    steps=steps,
                    latents=noise,
                    context=context,
                    strength=strength,
                )[0]
            own = tuple(lora._replace(strength=strength) for lora in used if strength)
            label = f"strength {strength:g}" if strength else BASE
            yield Drawn(label, image, made._replace(loras=own))

    def _context(self, prompt: str) -> Tree:
        """The student's context, padded to as much as any prompt has needed."""
        features = prompt_features(self.pipe, [prompt])
        own = padded_rows(map(shapes_of, features), self.pipe, STUDENT, "prompt")
        self._rows = longest(self._rows, own)
        return self.pipe.family.collate(features, self._rows)

    def _checked(self, prompt, seed, names, strengths, steps) -> list[LoraOption]:
        """The files of a request. Raises `UserError` for one that cannot be drawn."""
        files = self.files()
        strange = [name for name in names if name not in files]
        faults = [f"LoRA {name}: is not in the folder; choose one of its files" for name in strange]
        if not prompt.strip():
            faults.append("prompt: is empty; write what to draw")
        if not 0 <= seed < 2**32:
            faults.append(f"seed: {seed} is not from 0 to {2**32 - 1}")
        if len(strengths) > MOST_STRENGTHS or not all(map(math.isfinite, strengths)):
            faults.append(f"strengths: give at most {MOST_STRENGTHS} finite numbers")
        if steps is not None and not 1 <= steps <= MOST_STEPS:
            faults.append(f"steps: {steps} is not from 1 to {MOST_STEPS}")
        raise_if(faults)
        self.pipe.request(STUDENT, prompt)
        return [LoraOption(files[name]) for name in dict.fromkeys(names)]


def numbers(text: str) -> list[float]:
    """The strengths in a text, `0.5, 0.8, 1`. Raises `UserError`."""
    try:
        return [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise UserError(f"strengths: {text[:40]!r} are no numbers; write 0.5, 0.8, 1") from None
