"""The methods by name: what each needs, what its step runs, and its loss (docs/methods.md)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from dopsd_jax import dopsd
from dopsd_jax.config import schema
from dopsd_jax.dopsd import Denoiser
from dopsd_jax.estimation.flops import Passes, dopsd_passes
from dopsd_jax.methods import baselines, flow_matching
from dopsd_jax.methods.flow_matching import Levels
from dopsd_jax.training import state

Config = Mapping[str, Any]


class Needs(NamedTuple):
    """What a method asks of the data set, besides the prompts.

    teacher: the teacher's context. target: clean latents of the pictures. prior: class prompts.
    """

    teacher: bool
    target: bool
    prior: bool


def needs(config: Config) -> Needs:
    """What config.method asks of the data set."""
    method = config["method"]
    off_target = method == "offpolicy" and config["offpolicy"]["states"] == "targets"
    return Needs(
        teacher=method in schema.TEACHES,
        target=method in ("sft", "pso", "dreambooth") or off_target,
        prior=method == "dreambooth",
    )


def sees_image(config: Config) -> bool:
    """Whether a teacher sees pictures: only then the vision-language model is needed."""
    return needs(config).teacher and config["teacher"]["context"] == "vlm"


def teacher_key(config: Config) -> str | None:
    """The key of the captions that the teacher is told; None: it is told the student's."""
    told = needs(config).teacher and config["teacher"]["context"] == "prompt"
    return config["teacher"]["prompt_key"] if told else None


def teacher(config: Config) -> state.Teacher:
    """The network that is kept beside the student: config.teacher's, the start, or none."""
    if config["method"] in schema.TEACHES:
        return state.Teacher(**{f: config["teacher"][f] for f in state.Teacher._fields})
    return state.Teacher("frozen" if config["method"] in schema.KEEPS_START else "live")


def passes(config: Config, grid: tuple[float, ...]) -> Passes:
    """How often a step runs the network on one image."""
    method, steps, samples = config["method"], len(grid) - 1, config["sft"]["samples"]
    loss_steps = schema.values(config["loss_steps"])
    taught = int(dopsd.taught_steps(loss_steps, steps, jax.random.key(0)).sum())
    rolled = config["offpolicy"]["states"] == "teacher"
    return {
        "dopsd": dopsd_passes(steps, taught),
        "sft": Passes(samples),
        "sft_teacher": Passes(samples, ask=steps, teacher_captions=1),
        "offpolicy": Passes(taught, ask=steps if rolled else taught, teacher_captions=1),
        "pso": Passes(2 * taught, follow=steps + 2 * taught, captions=2),
        "dreambooth": Passes(2 * samples, follow=steps, captions=1, learned_captions=2),
    }[method]


def draw(config: Config) -> Callable:
    """What is random about the samples of a step; see `train_step.make_step`."""
    return state.start_noise if config["method"] == "dopsd" else flow_matching.draw


def loss_function(config: Config, net: Denoiser, grid: tuple[float, ...], shift: float) -> Callable:
    """(student, teacher, base, batch, draws, key) -> (losses, gradient), by config.method.

    `batch`: a `points.Batch` with what `needs` says. `draws`: what `draw` draws. `shift`: the
    model's. See `train_step.make_step`.
    """
    loss, loss_steps = schema.values(config["loss"]), schema.values(config["loss_steps"])
    every = loss_steps == "all"
    nodes = lambda key: dopsd.make_nodes(grid, loss, loss_steps, key)
    levels = Levels(config["sft"]["sigma"], config["sft"]["samples"], grid, shift)
    preference = baselines.Preference(**config["pso"])
    states, weight = config["offpolicy"]["states"], config["dreambooth"]["weight"]

    def with_dopsd(student, teacher, base, batch, noise, key):
        return dopsd.loss_and_gradient(
            net, student, teacher, base, batch.contexts, noise, nodes(key), every
        )

    def with_sft(student, teacher, base, batch, draws, key):
        return baselines.sft(net, student, base, batch, draws, levels)

    def with_sft_teacher(student, teacher, base, batch, draws, key):
        return baselines.sft_teacher(net, student, teacher, base, batch, draws, levels, grid)

    def with_offpolicy(student, teacher, base, batch, draws, key):
        return baselines.offpolicy(
            net, student, teacher, base, batch, draws, nodes(key), states, every
        )

    def with_pso(student, start, base, batch, draws, key):
        return baselines.pso(
            net, student, start, base, batch, draws, nodes(key), grid, preference, every
        )

    def with_dreambooth(student, start, base, batch, draws, key):
        return baselines.dreambooth(net, student, start, base, batch, draws, levels, grid, weight)

    return {
        "dopsd": with_dopsd,
        "sft": with_sft,
        "sft_teacher": with_sft_teacher,
        "offpolicy": with_offpolicy,
        "pso": with_pso,
        "dreambooth": with_dreambooth,
    }[config["method"]]
