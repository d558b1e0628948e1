"""The methods by name, and what each needs of a configuration. Imports no JAX.

A method is one record here, its loss in `losses`, and a line in docs/methods.md.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from dopsd_jax.common.config_fields import Field, as_list, name_or_list
from dopsd_jax.methods import anchor
from dopsd_jax.methods.method import TO_TEACHER, Config, Count, Method, Needs, Passes, Teacher
from dopsd_jax.methods.options import (
    DISTANCE,
    LEVELS,
    NODES,
    OTHER_CAPTION,
    ROUNDED,
    TEACHER,
    TOLD,
)

if TYPE_CHECKING:
    from dopsd_jax.dopsd import Denoiser
    from dopsd_jax.methods.losses import Schedule

# Decays with which D-OPSD was seen to end in pictures of nothing; docs/results.md, "Many steps".
COLLAPSING = 0.9


def _loss(name: str) -> Callable:
    """The function of `methods.losses`, which is imported when it is first called."""
    module = f"{__package__}.losses"
    return lambda *args: getattr(importlib.import_module(module), name)(*args)


def _weight(name: str, default: float, help: str) -> Field:
    return Field(name, default, help, low=0, high=10**6)


def _offpolicy_passes(config: Config, n: Count) -> Passes:
    whole = config["offpolicy"]["states"] == "teacher"
    asked, untold = (n.steps, n.untold) if whole else (n.loss_steps, n.untold_loss)
    return Passes(
        n.loss_steps, untold, asked - untold, captions=int(n.untold > 0), teacher_captions=1
    )


_RECORDS = (
    Method(
        name="dopsd",
        summary="the student learns the teacher's velocity at every state of its own rollout",
        source="arXiv 2605.05204",
        fields=(*NODES, *DISTANCE, *TEACHER, *TOLD),
        needs=lambda config: Needs(teacher=True),
        keeps="teacher",
        passes=lambda config, n: Passes(
            n.loss_steps,
            n.steps - n.loss_steps + n.untold_loss,
            n.loss_steps - n.untold_loss,
            captions=int(n.untold > 0),
            teacher_captions=1,
        ),
        loss=_loss("dopsd"),
        gap=TO_TEACHER,
        start_only=True,
    ),
    Method(
        name="sft",
        summary="flow matching on the pictures",
        source="flow matching",
        fields=LEVELS,
        needs=lambda config: Needs(target=True),
        keeps="none",
        passes=lambda config, n: Passes(n.samples),
        loss=_loss("sft"),
        base=True,
    ),
    Method(
        name="sft_teacher",
        summary="flow matching on pictures that the teacher draws",
        source="ablation of arXiv 2605.05204",
        fields=(*LEVELS, *TEACHER),
        needs=lambda config: Needs(teacher=True),
        keeps="teacher",
        passes=lambda config, n: Passes(n.samples, teacher_forward=n.steps, teacher_captions=1),
        loss=_loss("sft_teacher"),
    ),
    Method(
        name="offpolicy",
        summary="the loss of dopsd, at states that are not the student's",
        source="ablation of arXiv 2605.05204",
        fields=(
            *NODES,
            *DISTANCE,
            *TEACHER,
            *TOLD,
            Field(
                "offpolicy.states",
                "teacher",
                "teacher: states of the teacher's rollouts; targets: noised pictures of the data",
                choices=("teacher", "targets"),
            ),
        ),
        needs=lambda config: Needs(True, target=config["offpolicy"]["states"] == "targets"),
        keeps="teacher",
        passes=_offpolicy_passes,
        loss=_loss("offpolicy"),
        gap=TO_TEACHER,
    ),
    Method(
        name="pso",
        summary="preference of the data set's pictures over the model's own",
        source="arXiv 2410.03190",
        fields=(
            *NODES,
            _weight("pso.beta", 5.0, "factor inside the logistic loss"),
            _weight("pso.kappa", 1.0, "weight of the negative's error in the difference of a pair"),
            _weight("pso.prior", 0.5, "weight of the negative's error as a loss of its own"),
            Field(
                "pso.negatives",
                "student",
                "who draws the negatives: the current student, or the untrained network (start)",
                choices=("student", "start"),
            ),
        ),
        needs=lambda config: Needs(target=True),
        keeps="start",
        passes=lambda config, n: Passes(2 * n.loss_steps, n.steps + 2 * n.loss_steps, captions=2),
        loss=_loss("pso"),
        together=2,
    ),
    Method(
        name="dreambooth",
        summary="flow matching with prior preservation",
        source="arXiv 2208.12242",
        fields=(
            *LEVELS,
            Field(
                "dreambooth.concept_word",
                "[V]",
                "word that stands for the concept in every caption",
            ),
            Field(
                "dreambooth.class_word",
                "",
                "word, such as dog, that replaces the concept word in class prompts",
            ),
            _weight("dreambooth.weight", 1.0, "weight of the prior preservation loss"),
        ),
        needs=lambda config: Needs(target=True, prior=True),
        keeps="start",
        passes=lambda config, n: Passes(2 * n.samples, n.steps, captions=1, backward_captions=2),
        loss=_loss("dreambooth"),
        requires={
            "dreambooth.concept_word": "name the word that stands for the concept in the captions",
            "dreambooth.class_word": "name what the concept is an example of, such as dog",
        },
    ),
)
METHODS = {record.name: record for record in _RECORDS}


def method(config: Config) -> Method:
    """The record of config.method."""
    return METHODS[config["method"]]


def needs(config: Config) -> Needs:
    """What config.method asks of the data set."""
    return method(config).needs(config)


def teacher_key(config: Config) -> str | None:
    """The key of the teacher's captions; None: the teacher gets the student's captions."""
    other = needs(config).teacher and config["teacher"]["context"] == OTHER_CAPTION
    return config["teacher"]["prompt_key"] if other else None


def teacher(config: Config) -> Teacher:
    """The weights that are kept beside the student: config.teacher's, the initial ones, or none."""
    keeps = method(config).keeps
    if keeps == "teacher":
        return Teacher(**{name: config["teacher"][name] for name in Teacher._fields})
    return Teacher("frozen" if keeps == "start" else "live")


def rounds(config: Config) -> bool:
    """Whether the teacher's large products are rounded: config.teacher.products, if it is used."""
    return method(config).keeps == "teacher" and config["teacher"]["products"] == ROUNDED


def notes(config: Config) -> list[str]:
    """What to say of settings that are allowed and seldom meant."""
    found, weights, key = [], teacher(config), teacher_key(config)
    if key is not None and key in as_list(config["data"]["prompt_keys"]):
        found.append(
            f"warning: config.data.prompt_keys names the teacher's captions, {key!r}: student "
            "and teacher then read the same caption, and nothing is learned from it"
        )
    if config["method"] != "dopsd" or weights.weights == "frozen":
        return found
    if weights.weights == "live":
        name, what = "weights = live", "is the student itself"
    elif weights.decay <= COLLAPSING:
        name, what = f"decay = {weights.decay:g}", "is the student of a few steps before"
    else:
        return found
    return [
        *found,
        f"warning: config.teacher.{name}: the teacher {what}; such runs end in pictures of nothing "
        "after some hundred steps (docs/results.md); the recipes have ema, 0.9999",
    ]


def told(config: Config) -> str | tuple[int, ...]:
    """The nodes at which the teacher has its own context: config.teacher.told, if it is used."""
    used = any(field in TOLD for field in method(config).fields)
    return name_or_list(config["teacher"]["told"]) if used else "all"


def start(config: Config) -> str:
    """Where the step has the weights of the network before training; empty: nothing asks for them.

    Anchors ask for them, and a teacher that is not told everything at every node. `teacher`: the
    run keeps them beside the student anyway. `off`: they are the base's, with the adapters off.
    `copy`: of the student before training.
    """
    if not config["anchor"]["share"] and told(config) == "all":
        return ""
    by_teacher = config["anchor"]["share"] and config["anchor"]["teacher"] == "teacher"
    if by_teacher or teacher(config).weights == "frozen":
        return "teacher"
    return "off" if config["train"] == "lora" and not config["lora"]["init_from"] else "copy"


def passes(
    config: Config, grid: tuple[float, ...], devices: int = 1
) -> tuple[Passes, Passes | None]:
    """How often a step runs the network on an image, and on the anchors beside it, if any.

    devices: that samples are spread over.
    """
    import jax

    from dopsd_jax.dopsd import draw_loss_mask, told_mask

    steps, loss_steps = len(grid) - 1, name_or_list(config["loss_steps"])
    mask, own = draw_loss_mask(loss_steps, steps, jax.random.key(0)), told_mask(told(config), steps)
    chosen = int(mask.sum())
    untold = 0 if own is None else steps - int(own.sum())
    # Nodes that are drawn are these as often as others.
    drawn = isinstance(loss_steps, str)
    both = chosen * untold / steps if drawn or not untold else int((mask & ~own).sum())
    count = Count(steps, chosen, config["sft"]["samples"], untold, both)
    return method(config).passes(config, count), anchor.passes(config, count, devices)


def vision_dropout(config: Config) -> float:
    """The share of the picture's tokens that a step leaves out of the teacher's context."""
    unseen = not needs(config).teacher or config["teacher"]["context"] == OTHER_CAPTION
    return 0.0 if unseen else config["teacher"]["vision_dropout"]


def draw(config: Config) -> Callable:
    """What is random about the samples of a step; see `train_step.make_step`."""
    from dopsd_jax.methods import flow_matching

    start_only = method(config).start_only and not vision_dropout(config)
    return flow_matching.start_noise if start_only else flow_matching.draw


def loss_function(config: Config, net: "Denoiser", schedule: "Schedule") -> Callable:
    """(student, teacher, base, batch, draws, key) -> (losses, gradient), by config.method.

    `batch`: a `flow_matching.Batch` with what `needs` says. `draws`: what `draw` draws. See
    `train_step.make_step`.
    """
    loss, share = _at_size(method(config).loss, config, net, schedule), vision_dropout(config)
    if not share:
        return loss

    def run(student, teacher, base, batch, draws, key):
        batch = _loss("drop_picture")(net, share, batch, draws)
        draws = draws.start if method(config).start_only else draws
        return loss(student, teacher, base, batch, draws, key)

    return run


def anchor_loss(config: Config, net: "Denoiser", schedule: "Schedule") -> Callable:
    """(student, start, base, contexts, noise, key) -> (losses, gradient) of anchors."""
    return _at_size(_loss("anchor"), config, net, schedule)


def _at_size(loss: Callable, config: Config, net: "Denoiser", schedule: "Schedule") -> Callable:
    """`loss` with its `Setup`, which depends on the size of the pictures."""
    import jax

    from dopsd_jax.methods.losses import Setup

    def run(student, teacher, base, batch, draws, key):
        size = jax.tree.leaves(draws)[0].shape[1:3]  # the start noise [b, h, w, c] is the first
        setup = Setup(config, net, schedule.grid(*size), schedule.shift(*size))
        return loss(setup, student, teacher, base, batch, draws, key)

    return run
