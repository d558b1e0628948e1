"""Work of an optimizer step, counted from the architecture.

XLA's own count takes the body of a scan once, so it says nothing about a program of scans. One
multiply and add are two FLOP; only matrix products count. Everything is per image.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dopsd_jax.adapters.attach import Slot
from dopsd_jax.families.base import Family, Size
from dopsd_jax.families.work import Products, Work
from dopsd_jax.methods.method import Passes

# Dense bfloat16 rate of one device in FLOP/s, and its memory in bytes as the compiler sees it; by
# a pattern in jax's `device_kind`. NVIDIA's and Google's data sheets, and of GeForce cards NVIDIA's
# rule, twice the float32 rate, with sums in float32. A TPU7x chip, 2307e12 FLOP/s and 192 GiB
# (docs.cloud.google.com/tpu/docs/tpu7x), is two devices.
DEVICES = (
    (r"TPU v5 lite|TPU v5e", 197e12, 15.75 * 2**30),
    (r"TPU v5", 459e12, 95.74 * 2**30),
    (r"TPU v6", 918e12, 31.25 * 2**30),
    (r"TPU ?7|TPU v7", 1153.5e12, 94.75 * 2**30),
    (r"A100", 312e12, None),
    (r"H100.*PCIe", 756e12, None),
    (r"H100|H200|GH200", 989e12, None),
    (r"B200|GB200", 2250e12, None),
    (r"L40S", 362e12, None),
    (r"A6000", 154.8e12, None),
    (r"RTX 5090$", 209.5e12, None),
    (r"RTX 4090$", 165.2e12, None),
    (r"RTX 4080$", 97.5e12, None),
    (r"RTX 4070$", 58.3e12, None),
    (r"RTX 4060 Ti$", 44.1e12, None),
    (r"RTX 3090$", 71e12, None),
    (r"RTX 3060$", 25.5e12, None),
)


class StepWork(NamedTuple):
    """model: what the method needs. executed: with what is computed again to save memory."""

    model: float
    executed: float


def step_work(
    family: Family,
    cfg: Size,
    passes: Sequence[Passes | None],
    rows: Sequence[int],
    *,
    height: int,
    width: int,
    chosen: Mapping[str, Slot],
    products: Products,
    inner: Products = lambda slot: 0,
    full: bool = False,
    remat: str = "none",
) -> StepWork:
    """One optimizer step for one image.

    Args:
      passes: what the method runs on the image, and on the anchors beside it; see
        `methods.registry.passes`.
      rows: positions of the contexts, padding included: of student, teacher, and anchors.
      height, width: of the latent.
      chosen: the adapted layers; see `attach.select`. products: see `families.work.Products`.
      inner: of these, those that `remat=dots` does again.
      full: all is trained, without adapters.
    """

    def counted(work: Callable[[Products], Work]) -> Work:
        # Without full tuning only adapters are trained, so these are counted by themselves.
        return dataclasses.replace(work(products), inner=0.0 if full else work(inner).trained)

    captions = [counted(lambda p, n=n: family.context_work(cfg, n, chosen, p, full)) for n in rows]
    velocities = [
        counted(lambda p, n=n: family.velocity_work(cfg, height, width, n, chosen, p, full))
        for n in rows
    ]
    model = again = 0.0
    # Anchors have the third context in the student's place; the second is the teacher's alone.
    for own, place in zip(passes, (0, 2), strict=True):
        if own is None:
            continue
        student, caption = velocities[place], captions[place]
        model += (own.backward + own.forward) * student.forward
        model += own.backward * student.backward
        model += (own.captions + own.backward_captions) * caption.forward
        model += own.backward_captions * caption.backward
        model += own.teacher_forward * velocities[1].forward
        model += own.teacher_captions * captions[1].forward
        again += own.backward * student.again(remat)
        again += own.backward_captions * caption.again(remat)
    return StepWork(model, model + again)


def parameters(family: Family, cfg: Size) -> int:
    """Numbers in the network, without adapters."""
    return sum(math.prod(leaf.shape) for leaf in family.NETWORKS["transformer"].names(cfg))


def peak_rate(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device on its data sheet; None if it is not in `DEVICES`."""
    return next((rate for kind, rate, _ in DEVICES if re.search(kind, device_kind)), None)


def device_memory(device_kind: str) -> float | None:
    """Bytes of a TPU's memory; None if it is not in `DEVICES`."""
    return next((size for kind, _, size in DEVICES if re.search(kind, device_kind)), None)
