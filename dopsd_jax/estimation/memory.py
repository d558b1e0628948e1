"""Memory of one device during a step, counted from shapes: without a compiler, without arrays."""

import math
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from dopsd_jax.estimation.abstract_step import Program
from dopsd_jax.methods import registry
from dopsd_jax.parallel.sharding import HOST, sample_devices

# Steps are counted as for a TPU: every kernel that keeps no probabilities keeps the same arrays.
PLATFORM = "tpu"
STUDENT = {"lora": "adapters", "full": "master"}  # what config.train's parameters are called


class Account(NamedTuple):
    """Bytes of one device.

    live: what lives as long as the run, by kind. host: the same of what lies in its host's memory.
    gradient: of one micro-batch, for all that is trained. activations: kept by the student's
    forward pass for its backward pass. fetched: of a base in the host's memory, what is on the
    device at one time: a layer, and the next one on its way. summed: the gradients of earlier
    micro-batches, of rows or of anchors, as one sum; 0 in a step of one micro-batch.
    """

    live: dict[str, int]
    host: dict[str, int]
    gradient: int
    activations: int
    fetched: int = 0
    summed: int = 0

    @property
    def lasting(self) -> int:
        return sum(self.live.values())

    @property
    def total(self) -> int:
        """A lower bound of what the step needs: there are other temporaries.

        The peak is the larger of two gradients, what is summed and the activations, and one
        gradient and the state that the update brings from host memory.
        """
        teach = 2 * self.gradient + self.summed + self.activations + self.fetched
        update = self.gradient + sum(held for kind, held in self.host.items() if kind != "base")
        return self.lasting + max(teach, update)


def countable(config: ConfigDict) -> ConfigDict:
    """The same step for `PLATFORM`: a GPU's kernel can be traced only where there is one."""
    config = config.copy_and_resolve_references()
    if config.attention == "cudnn":
        config.attention = "auto"
    return config


def count(config: ConfigDict, program: Program, mesh: Mesh | AbstractMesh) -> Account:
    """The account of a program on one device of `mesh`."""
    like = program.plan.abstract_state
    kinds = {
        "base": program.base,
        STUDENT[config.train]: like.student,
        "teacher": like.teacher,
        "start": like.start,
        "optimizer": like.opt_state,
        "batch": (program.batch, program.anchors),
    }
    gradient = _bytes(like.student)
    several = config.accumulate > 1 or program.anchors is not None
    return Account(
        live={kind: _bytes(tree) for kind, tree in kinds.items()},
        host={kind: held for kind, tree in kinds.items() if (held := _bytes(tree, host=True))},
        gradient=gradient,
        activations=_activations(config, program, mesh),
        fetched=2 * _largest_layer(program.base),
        summed=gradient if several else 0,
    )


def _bytes(tree, host: bool = False) -> int:
    """Bytes of `tree` on one device: in its own memory, or in that of its host."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * jax.dtypes.itemsize_bits(x.dtype) // 8
        for x in jax.tree.leaves(tree)
        if (x.sharding.memory_kind == HOST) == host
    )


def _largest_layer(base: nnx.State) -> int:
    """Bytes on one device of a layer of the stacks that lie in the host's memory."""
    stacks: Counter[str] = Counter()
    for path, leaf in nnx.to_flat_state(base):
        if held := _bytes(leaf, host=True):
            stacks[str(path[0])] += held // leaf.shape[0]
    return max(stacks.values(), default=0)


def _activations(config: ConfigDict, program: Program, mesh: Mesh | AbstractMesh) -> int:
    """What jax keeps of one forward pass of a device's samples, split over the context axis."""
    rows = max(program.latent[0] // sample_devices(mesh), 1)
    bare = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    student, base = bare(program.plan.abstract_state.student), bare(program.base)
    context = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[2:]), x.dtype),
        program.batch.contexts.student,
    )
    noise = jax.ShapeDtypeStruct((rows, *program.latent[1:]), jnp.float32)
    net = program.plan.net

    def kept(student, base, noise, context):
        precomputed = net.precompute(student, base, context)
        velocity = lambda s, h: net.velocity(s, base, noise, jnp.float32(1), context, h)
        return jax.vjp(velocity, student, precomputed)[1]

    residuals = jax.tree.leaves(jax.eval_shape(kept, student, base, noise, context))
    weights = {(x.shape, x.dtype) for x in jax.tree.leaves((student, base))}
    total = sum(
        math.prod(x.shape) * jax.dtypes.itemsize_bits(x.dtype) // 8
        for x in residuals
        if (x.shape, x.dtype) not in weights
    )
    return registry.method(config).together * total // mesh.shape["context"]
