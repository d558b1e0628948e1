"""What a step needs on a GPU that is not here: counted from shapes, in seconds, without a compiler.

The account of arrays is exact; what a compiler needs beside them is a figure from steps that were
compiled (docs/scaling.jsonl), so the sum is an estimate: tests/test_counted.py says how good.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from dopsd_jax.common import gpu_memory
from dopsd_jax.common.errors import UserError
from dopsd_jax.estimation import abstract_step, compiled_step, memory
from dopsd_jax.estimation.abstract_step import Program, Workload, make_program
from dopsd_jax.estimation.compiled_step import Report
from dopsd_jax.estimation.memory import Account
from dopsd_jax.methods import registry
from dopsd_jax.models import attention, fp8
from dopsd_jax.parallel import sharding

# Vectors of the network's width, in the type of activations, that a token needs while a layer is
# computed forwards and backwards; and gradients beside those that are counted, if all is trained.
WIDTHS, GRADIENTS = 55, 0.65
# Devices whose compiler writes a frozen base once more, in another layout: docs/scaling.md.
BASE_TWICE = ("TPU7x",)

# Memory in GiB, as the driver tells it: where it checks for errors, less than is on the box; and
# the compute capability (developer.nvidia.com/cuda-gpus). Older ones have no bfloat16.
GPUS = {
    "RTX 3060": (12, "8.6"), "RTX 4070": (12, "8.9"), "RTX 5070": (12, "12.0"),
    "RTX 4060 Ti": (16, "8.9"), "RTX 4080": (16, "8.9"), "RTX 5080": (16, "12.0"),
    "RTX 3090": (24, "8.6"), "RTX 4090": (24, "8.9"), "A10G": (22.49, "8.6"), "L4": (22.49, "8.9"),
    "RTX 5090": (32, "12.0"), "A100-40GB": (40, "8.0"), "A6000": (48, "8.6"),
    "L40S": (44.99, "8.9"), "A100": (80, "8.0"), "H100": (80, "9.0"), "H200": (140, "9.0"),
    "B200": (179, "10.0"),
}  # fmt: skip


class Gpu(NamedTuple):
    """name: as jax's `device_kind` contains it. memory: bytes. capability: empty if unknown."""

    name: str
    memory: int
    capability: str = ""

    @property
    def usable(self) -> float:
        """Bytes for arrays."""
        return gpu_memory.SHARE * self.memory


def find_gpu(text: str) -> Gpu:
    """A card by name, or by memory, such as 24GB. Raises `UserError`."""
    size = re.fullmatch(r"0*([1-9]\d{0,3})\s*Gi?B", text.strip(), re.IGNORECASE)
    if size:
        return Gpu(f"GPU of {size[1]} GiB", int(size[1]) << 30)
    plain = lambda name: re.sub(r"[\s_-]|NVIDIA|GeForce", "", name, flags=re.IGNORECASE).lower()
    for name, (gib, capability) in GPUS.items():
        if plain(text) in (plain(name), plain(name).removeprefix("rtx")):
            return Gpu(f"NVIDIA {name}", int(gib * 2**30), capability)
    raise UserError(
        f"--device: {text!r} is not known; give its memory, such as 24GB, or one of "
        f"{', '.join(GPUS)}"
    )


def count_step(config: ConfigDict, case: Workload, gpu: Gpu, devices: int = 1) -> Report:
    """The report on a step that was not compiled; `needed` is an estimate.

    Raises `UserError` for what the card cannot do; and see `make_program`.
    """
    if registry.rounds(config):
        fp8.check_device("gpu", gpu.name, gpu.capability)
    mesh = abstract_step.abstract_mesh(config, devices)
    program, held, needed = need(config, case, mesh)
    return Report(
        device_kind=gpu.name,
        mesh=dict(mesh.shape),
        attention=attention.resolve(config.attention, "gpu", config.dtype, case.size.head_dim),
        images=config.batch_size * config.accumulate,
        account=held,
        work=compiled_step.work(config, case, program, mesh),
        capacity=gpu.usable,
        needed=needed,
    )


def need(
    config: ConfigDict,
    case: Workload,
    mesh: Mesh | AbstractMesh,
    platform: str = memory.PLATFORM,
    contexts: Sequence | None = None,
    kind: str = "",
) -> tuple[Program, Account, int]:
    """The step, what is counted of it, and about how many bytes of a device it needs.

    contexts: see `make_program`. kind: of the device, as jax's `device_kind`.
    """
    counted = memory.countable(config)
    program = make_program(counted, case, mesh, platform, contexts)
    held = memory.count(counted, program, mesh)
    tokens = case.family.image_tokens(case.size, *case.latent) + program.positions[0]
    images = max(program.latent[0] // sharding.sample_devices(mesh), 1)
    return program, held, held.total + rest(config, held, tokens * images, case.size.dim, kind)


def rest(config: ConfigDict, held: Account, tokens: int, dim: int, kind: str = "") -> int:
    """Bytes that a compiler needs beside the account.

    tokens: of the student, of all images that a device computes at once. dim: the network's width.
    kind: of the device, as jax's `device_kind`.
    """
    gradients = GRADIENTS * held.gradient if config.train == "full" else 0
    copied = held.live["base"] if kind in BASE_TWICE else 0
    return int(WIDTHS * tokens * dim * jnp.dtype(config.dtype).itemsize + gradients + copied)
