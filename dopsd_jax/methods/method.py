"""What a method is: one record. Imports no JAX: errors of a configuration are reported at once."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dopsd_jax.common.config_fields import Field

Config = Mapping[str, Any]


class Needs(NamedTuple):
    """What a method asks of the data set, besides the prompts.

    teacher: the teacher's context. target: clean latents of the pictures. prior: class prompts.
    """

    teacher: bool = False
    target: bool = False
    prior: bool = False


class Teacher(NamedTuple):
    """The weights kept beside the student: `ema`, `frozen` or `live` (the student's own, no copy).

    For the first `warmup_steps` steps an EMA decays with `warmup_decay` instead of `decay`.
    """

    weights: str = "ema"
    decay: float = 0.9999
    warmup_steps: int = 0
    warmup_decay: float = 0.999


class Passes(NamedTuple):
    """How often a step runs the network on one image.

    backward: by the student, with a backward pass. forward: without one, with the student's caption
    and any weights. teacher_forward: with the teacher's caption. captions, teacher_captions: how
    many captions of each length are refined without a backward pass; backward_captions: with one.
    """

    backward: float
    forward: float = 0
    teacher_forward: float = 0
    captions: float = 0
    backward_captions: float = 1
    teacher_captions: float = 0


class Count(NamedTuple):
    """What decides how often a step runs the network.

    steps: nodes of the grid, K. loss_steps: those with a loss, T. samples: noise levels of a
    picture, config.sft.samples, M. untold: nodes at which the teacher has not its own context;
    untold_loss: those of them with a loss, on average.
    """

    steps: int
    loss_steps: int
    samples: int
    untold: int = 0
    untold_loss: float = 0


# The two velocities that the metric `gap` compares.
TO_TEACHER, TO_NOISED = "student and teacher", "velocity and noise - picture"


@dataclasses.dataclass(frozen=True)
class Method:
    """A method; add it to `registry.METHODS`, and config, estimate, report and documents know it.

    summary: its loss in words. source: where it is published. fields: those of the configuration
    that have an effect with it, shared or its own; other methods refuse them on the command line.
    needs: of a configuration. keeps: the weights beside the student: `teacher` (config.teacher),
    `start` (a copy of the network before training), `none`. passes: of a step. loss: (setup,
    student, teacher, base, batch, draws, key) -> (losses, gradient), see `losses`. gap: the two
    velocities that the metric `gap` compares. requires: fields that must not be empty, and what to
    write there. start_only: the start noise of a rollout is all that is random about a sample.
    together: pictures that one backward pass differentiates. base: whether it is for models that
    are not distilled too.
    """

    name: str
    summary: str
    source: str
    fields: tuple[Field, ...]
    needs: Callable[[Config], Needs]
    keeps: str
    passes: Callable[[Config, Count], Passes]
    loss: Callable
    gap: str = TO_NOISED
    requires: Mapping[str, str] = dataclasses.field(default_factory=dict)
    start_only: bool = False
    together: int = 1
    base: bool = False
