"""The losses of the methods, each with one signature, so that the step runs any of them.

(setup, student, teacher, base, batch, draws, key) -> (losses, gradient)

setup: what is the same for all steps. student, base: the network's parameters, trained and frozen.
teacher: those that the run keeps beside the student, or `dopsd.Teachers`. batch: a
`flow_matching.Batch` with what the method needs. draws: what is random about each sample. key: what
is random about the step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Key

from dopsd_jax.common.config_fields import name_or_list
from dopsd_jax.common.errors import UserError
from dopsd_jax.dopsd import (
    Contexts,
    Denoiser,
    Distance,
    Losses,
    Nodes,
    loss_and_gradient,
    make_nodes,
    mean_square,
    told_mask,
)
from dopsd_jax.methods import baselines
from dopsd_jax.methods.distance import Decoupled
from dopsd_jax.methods.flow_matching import Batch, Draws, Levels, folded
from dopsd_jax.methods.method import Config
from dopsd_jax.methods.options import DECOUPLED

Tree = Any
PICTURE = 3  # the name of the keys that choose the tokens of the teacher's picture
Result = tuple[Losses, Tree]


class Schedule(NamedTuple):
    """Functions of a latent's height and width: the grid of noise levels, and their shift."""

    grid: Callable[[int, int], tuple[float, ...]]
    shift: Callable[[int, int], float]


class Setup(NamedTuple):
    """config: of the run. net: the network. grid: of the rollouts. shift: the model's.

    Grid and shift are those of the pictures' size, which is known when a step is traced.
    """

    config: Config
    net: Denoiser
    grid: tuple[float, ...]
    shift: float

    def nodes(self, key: Key[Array, ""]) -> Nodes:
        """The nodes of one rollout, by config.loss and config.loss_steps."""
        loss, steps = name_or_list(self.config["loss"]), name_or_list(self.config["loss_steps"])
        return make_nodes(self.grid, loss, steps, key)

    def told_nodes(self, key: Key[Array, ""]) -> Nodes:
        """The same, with config.teacher.told."""
        told = told_mask(name_or_list(self.config["teacher"]["told"]), len(self.grid) - 1)
        return self.nodes(key)._replace(told=told)

    @property
    def distance(self) -> Distance:
        """The distance of student and teacher, by config.loss."""
        own = self.config["loss"] == DECOUPLED
        return Decoupled(**self.config["decoupled"]) if own else mean_square

    @property
    def every_step(self) -> bool:
        """Whether all nodes are learned."""
        return name_or_list(self.config["loss_steps"]) == "all"

    @property
    def levels(self) -> Levels:
        """The noise levels of config.sft."""
        options = self.config["sft"]
        return Levels(options["sigma"], options["samples"], self.grid, self.shift)


def drop_picture(net: Denoiser, share: float, batch: Batch, draws: Draws) -> Batch:
    """The batch with config.teacher.vision_dropout, `share`, of its teacher's picture left out."""
    if net.drop_picture is None:
        raise UserError(
            "config.teacher.vision_dropout: models of this family cannot leave out tokens of the "
            "teacher's picture; set it to 0"
        )
    keys = folded(draws.keys, PICTURE)
    left = net.drop_picture(batch.contexts.teacher, keys, share)
    return batch._replace(contexts=batch.contexts._replace(teacher=left))


def dopsd(setup: Setup, student, teacher, base, batch: Batch, noise, key) -> Result:
    networks, nodes = (setup.net, student, teacher, base), setup.told_nodes(key)
    return loss_and_gradient(
        *networks, batch.contexts, noise, nodes, setup.every_step, setup.distance, batch.region
    )


def sft(setup: Setup, student, teacher, base, batch: Batch, draws, key) -> Result:
    return baselines.sft(setup.net, student, base, batch, draws, setup.levels)


def sft_teacher(setup: Setup, student, teacher, base, batch: Batch, draws, key) -> Result:
    return baselines.sft_teacher(
        setup.net, student, teacher, base, batch, draws, setup.levels, setup.grid
    )


def offpolicy(setup: Setup, student, teacher, base, batch: Batch, draws, key) -> Result:
    states = setup.config["offpolicy"]["states"]
    networks, nodes = (setup.net, student, teacher, base), setup.told_nodes(key)
    return baselines.offpolicy(
        *networks, batch, draws, nodes, states, setup.every_step, setup.distance
    )


def pso(setup: Setup, student, start, base, batch: Batch, draws, key) -> Result:
    preference = baselines.Preference(**setup.config["pso"])
    networks, nodes = (setup.net, student, start, base), setup.nodes(key)
    return baselines.pso(*networks, batch, draws, nodes, setup.grid, preference, setup.every_step)


def dreambooth(setup: Setup, student, start, base, batch: Batch, draws, key) -> Result:
    weight = setup.config["dreambooth"]["weight"]
    return baselines.dreambooth(
        setup.net, student, start, base, batch, draws, setup.levels, setup.grid, weight
    )


def anchor(setup: Setup, student, start, base, contexts, noise, key) -> Result:
    """Holds the student to the velocity of `start`, which is told the same prompts.

    Nothing is rounded: the student would be pulled away from a start that it has not left.
    """
    both, net = Contexts(contexts, contexts), setup.net._replace(rounded=None)
    networks, nodes = (net, student, start, base), setup.nodes(key)
    return loss_and_gradient(*networks, both, noise, nodes, setup.every_step, setup.distance)
