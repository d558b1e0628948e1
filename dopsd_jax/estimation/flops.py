"""Work of an optimizer step, counted from the architecture.

XLA's own count takes the body of a scan once, so it says nothing about a program of scans. One
multiply and add are two FLOP; only matrix products count. Everything is per image.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dopsd_jax.adapters.attach import Slot
from dopsd_jax.adapters.lora import Lora
from dopsd_jax.methods.method import Passes
from dopsd_jax.models import zimage
from dopsd_jax.models.zimage import PAD_MULTIPLE, ZImageConfig

# Dense bfloat16 rate of one device in FLOP/s, and its memory in bytes as the compiler sees it; by
# a pattern in jax's `device_kind`. NVIDIA's and Google's data sheets; a TPU7x chip is two devices.
DEVICES = (
    (r"TPU v5 lite|TPU v5e", 197e12, 15.75 * 2**30),
    (r"TPU v5", 459e12, 95.74 * 2**30),
    (r"TPU v6", 918e12, 31.25 * 2**30),
    (r"TPU ?7|TPU v7", 1153.5e12, 94.75 * 2**30),
    (r"A100", 312e12, None),
    (r"H100.*PCIe", 756e12, None),
    (r"H100|H200|GH200", 989e12, None),
    (r"B200|GB200", 2250e12, None),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOP of one forward pass, by how much a backward pass adds.

    once: products on the way to nothing that is trained.
    linear: products whose backward pass needs one gradient, 1x: with frozen weights the input's;
      in full tuning, at the network's inputs, the weights'.
    attention: 2x. trained: products with adapters or trained weights: both gradients, 2x.
    """

    once: float = 0.0
    linear: float = 0.0
    attention: float = 0.0
    trained: float = 0.0

    @property
    def forward(self) -> float:
        return self.once + self.linear + self.attention + self.trained

    @property
    def backward(self) -> float:
        return self.linear + 2 * self.attention + 2 * self.trained

    def again(self, remat: str, flash: bool) -> float:
        """What a backward pass computes a second time."""
        kept = {
            "none": 0.0,
            "dots": self.attention,
            "full": self.linear + self.attention + self.trained,
        }
        # A flash kernel keeps no probabilities: one of the forward's two products is done again.
        return kept[remat] + (0.5 * self.attention if flash else 0.0)


class StepWork(NamedTuple):
    """model: what the method needs. executed: with what is computed again to save memory."""

    model: float
    executed: float


def image_tokens(cfg: ZImageConfig, height: int, width: int) -> int:
    """Tokens of a latent [height, width], with the network's own padding."""
    tokens = (height // cfg.patch) * (width // cfg.patch)
    return -(-tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def caption_work(
    cfg: ZImageConfig, rows: int, chosen: Mapping[str, Slot], rank: int, full: bool = False
) -> Work:
    """`ZImage.refine` on `rows` caption rows: it depends on neither time nor state."""
    embedding = 2 * rows * cfg.caption_dim * cfg.dim
    return add(
        Work(trained=embedding) if full else Work(once=embedding),  # a trained norm is before it
        _blocks(cfg, "context_refiner", cfg.refiner_layers, rows, chosen, rank, full),
    )


def velocity_work(
    cfg: ZImageConfig,
    height: int,
    width: int,
    rows: int,
    chosen: Mapping[str, Slot],
    rank: int,
    full: bool = False,
) -> Work:
    """One `ZImage.__call__` on a latent [height, width], its caption of `rows` rows refined."""
    tokens, real = image_tokens(cfg, height, width), height * width // cfg.patch**2
    pixels, mod = cfg.patch**2 * cfg.channels, cfg.modulation_dim
    layers = cfg.refiner_layers + cfg.layers
    inputs = 2 * (real * pixels * cfg.dim + zimage.TIME_FREQUENCIES * zimage.TIME_HIDDEN)
    time = 2 * (zimage.TIME_HIDDEN * mod + mod * cfg.dim * (4 * layers + 1))
    final = 2 * (tokens + rows) * cfg.dim * pixels
    ends = Work(linear=inputs, trained=time + final)
    return add(
        ends if full else Work(once=inputs + time, linear=final),
        _blocks(cfg, "noise_refiner", cfg.refiner_layers, tokens, chosen, rank, full),
        _blocks(cfg, "layers", cfg.layers, tokens + rows, chosen, rank, full),
    )


def step_work(
    cfg: ZImageConfig,
    passes: Passes,
    *,
    height: int,
    width: int,
    rows_student: int,
    rows_teacher: int,
    chosen: Mapping[str, Slot],
    rank: int,
    full: bool = False,
    remat: str = "none",
    flash: bool = True,
) -> StepWork:
    """One optimizer step for one image.

    Args:
      passes: what the method runs; see `methods.passes`.
      height, width: of the latent.
      rows_student, rows_teacher: caption rows, padding included.
      chosen, rank: the adapters; see `attach.select`. full: all is trained, without adapters.
      flash: attention by a kernel that keeps no probabilities (splash, cudnn).
    """
    captions = [
        caption_work(cfg, rows, chosen, rank, full) for rows in (rows_student, rows_teacher)
    ]
    student, teacher = (
        velocity_work(cfg, height, width, rows, chosen, rank, full)
        for rows in (rows_student, rows_teacher)
    )
    model = (
        (passes.learn + passes.follow) * student.forward
        + passes.learn * student.backward
        + passes.ask * teacher.forward
        + (passes.captions + passes.learned_captions) * captions[0].forward
        + passes.learned_captions * captions[0].backward
        + passes.teacher_captions * captions[1].forward
    )
    again = passes.learn * student.again(remat, flash)
    again += passes.learned_captions * captions[0].again(remat, flash)
    return StepWork(model, model + again)


def parameters(cfg: ZImageConfig) -> int:
    """Numbers in the network, without adapters."""
    return sum(math.prod(leaf.shape) for leaf in zimage.names(cfg))


def adapter_parameters(chosen: Iterable[Slot], rank: int) -> int:
    """Numbers in the adapters of the chosen layers."""
    return sum(Lora.size(slot.din, slot.dout, rank) for slot in chosen)


def peak_rate(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device on its data sheet; None if it is not in `DEVICES`."""
    return next((rate for kind, rate, _ in DEVICES if re.search(kind, device_kind)), None)


def device_memory(device_kind: str) -> float | None:
    """Bytes of a TPU's memory; None if it is not in `DEVICES`."""
    return next((size for kind, _, size in DEVICES if re.search(kind, device_kind)), None)


def mfu(model_flop: float, seconds: float, devices: int, rate: float) -> float:
    """Share of the devices' peak that the work a step needs would keep busy.

    `model_flop`: `StepWork.model` times the images of a step. `rate`: see `peak_rate`.
    """
    return model_flop / (seconds * devices * rate)


def add(*works: Work) -> Work:
    """The sum, kind by kind."""
    return Work(*(sum(kinds) for kinds in zip(*map(dataclasses.astuple, works), strict=True)))


def _blocks(cfg, where: str, layers: int, tokens: int, chosen, rank: int, full: bool) -> Work:
    weights = 4 * cfg.dim**2 + 3 * cfg.dim * cfg.hidden_dim
    linear, attention = 2 * tokens * layers * weights, 4 * tokens**2 * cfg.dim * layers
    if full:
        return Work(attention=attention, trained=linear)
    slots = [slot for slot in chosen.values() if slot.dense.startswith(f"{where}.")]
    if not slots and where != "layers":
        # A refiner that is not adapted stands before all others.
        return Work(once=linear + attention)
    adapters = 2 * tokens * adapter_parameters(slots, rank)
    return Work(linear=linear, attention=attention, trained=adapters)
