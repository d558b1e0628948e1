"""Times the compiled D-OPSD step of a configuration on the devices here.

    python benchmarks/step.py --config configs/zimage.py:random --torch
    python benchmarks/step.py --config configs/zimage.py --config.batch_size=1 --repeats=20

Weights, captions and noise are random: the time does not depend on them, and nothing is read. The
sizes are those of config.model: `random`, a folder, or the published Z-Image-Turbo. With --torch,
the PyTorch loop (diffusers, peft, one backward over all K steps) is timed first, in a process of
its own.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from dopsd_jax import dopsd
from dopsd_jax.common import program
from dopsd_jax.common.config_fields import highest, name_or_list
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.config.flags import CONFIG, parse
from dopsd_jax.estimation import flops
from dopsd_jax.families.zimage import family
from dopsd_jax.methods import registry
from dopsd_jax.methods.flow_matching import Batch
from dopsd_jax.models import attention, zimage
from dopsd_jax.parallel import sharding
from dopsd_jax.random_model import Size, configs
from dopsd_jax.run import build
from dopsd_jax.training.trainable import trained

PUBLISHED = "Tongyi-MAI/Z-Image-Turbo"

SIDES = [
    flags.DEFINE_integer(
        side, None, f"{side} in pixels; else config.data.resolution", lower_bound=1
    )
    for side in ("height", "width")
]
STUDENT = flags.DEFINE_integer("student_tokens", 128, "caption length of the student")
TEACHER = flags.DEFINE_integer("teacher_tokens", 704, "caption length of the teacher")
REPEATS = flags.DEFINE_integer("repeats", 10, "timed steps", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup", 2, "steps before them", lower_bound=1)
TORCH = flags.DEFINE_boolean("torch", False, "time the PyTorch loop as well")


def main() -> None:
    config = CONFIG.value
    config.data.path = config.data.path or build.RANDOM  # no data are read here
    sizes = transformer_sizes(config.model)
    latent = latent_shape(config, sizes)
    theirs = time_torch(config, sizes, latent) if TORCH.value else None

    mesh = sharding.make_mesh(config.mesh)
    sharding.check(mesh, sizes, batch_size=config.batch_size)
    kernel = attention.resolve(
        config.attention, jax.default_backend(), jnp.dtype(config.dtype), sizes.head_dim
    )
    grid = family.grid(name_or_list(config.grid), family.SCHEDULER)
    device = jax.devices()[0]
    trains = "full" if config.train == "full" else f"LoRA rank {config.lora.rank}"
    facts = {
        "device": f"{mesh.size} x {device.device_kind} ({device.platform}), jax {jax.__version__}",
        "image": "height {}, width {},".format(*(n * family.LATENT_FACTOR for n in latent[1:3]))
        + f" batch {latent[0]} x {config.accumulate}",
        "captions": f"{STUDENT.value} (student), {TEACHER.value} (teacher)",
        "step": f"K = {len(grid) - 1}, {trains}, remat {config.remat},"
        f" attention {kernel}, weights {config.base_dtype}, activations {config.dtype}",
    }
    for name, value in facts.items():
        print(f"{name:9} {value}", flush=True)
    with jax.set_mesh(mesh):
        ours = time_jax(config, sizes, latent, grid, kernel, mesh)
    images = latent[0] * config.accumulate
    report("jax", ours, images)
    work = image_work(config, sizes, latent, grid, kernel)
    rate = work.model * images / statistics.median(ours)
    peak = flops.peak_rate(device.device_kind)
    share = f", {rate / mesh.size / peak:.1%} of the devices' bfloat16 peak" if peak else ""
    print(
        f"{'work':9} {work.model / 1e12:.4g} TFLOP an image ({work.executed / 1e12:.4g} executed),"
        f" {rate / 1e12:.4g} TFLOP/s{share}"
    )
    if theirs is not None:
        report("pytorch", theirs["seconds"], images, theirs["device"])
        ratio = statistics.median(theirs["seconds"]) / statistics.median(ours)
        print(f"{'ratio':9} pytorch takes {ratio:.2f} times as long")


def transformer_sizes(model: str) -> zimage.ZImageConfig:
    """The architecture that config.model names. Raises `UserError` if that takes a download."""
    if model == build.RANDOM:
        return zimage.ZImageConfig.from_dict(configs.transformer(Size()), "random")
    if model.partition("@")[0] == PUBLISHED:
        return zimage.ZImageConfig()
    path = Path(model) / "transformer" / "config.json"
    if not path.is_file():
        raise UserError(
            f"config.model: {model!r} is not random, {PUBLISHED} or a folder with "
            "transformer/config.json; the benchmark downloads nothing"
        )
    try:
        return zimage.ZImageConfig.from_dict(json.loads(path.read_text("utf-8")), str(path))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from None


def latent_shape(config, sizes: zimage.ZImageConfig) -> tuple[int, int, int, int]:
    """[b, h, w, c] of one micro-batch's noise."""
    height, width = (flag.value or highest(config.data.resolution) for flag in SIDES)
    multiple = family.LATENT_FACTOR * sizes.patch
    raise_if(
        f"--{name} {side}: must be a positive multiple of {multiple}"
        for name, side in (("height", height), ("width", width))
        if side < 1 or side % multiple
    )
    raise_if(
        f"--{flag.name} {flag.value}: must be from 1 to {sizes.max_caption}"
        for flag in (STUDENT, TEACHER)
        if not 1 <= flag.value <= sizes.max_caption
    )
    return (
        config.batch_size,
        height // family.LATENT_FACTOR,
        width // family.LATENT_FACTOR,
        sizes.channels,
    )


def image_work(config, sizes, latent, grid, kernel) -> flops.StepWork:
    """FLOP of one image's share of a step."""
    what = trained(config, family, sizes)
    pad = lambda rows: -(-rows // zimage.PAD_MULTIPLE) * zimage.PAD_MULTIPLE
    return flops.step_work(
        family,
        sizes,
        registry.passes(config, grid),
        height=latent[1],
        width=latent[2],
        rows_student=pad(STUDENT.value),
        rows_teacher=pad(TEACHER.value),
        chosen=what.chosen,
        products=what.products,
        full=config.train == "full",
        remat=config.remat,
        flash=kernel != "xla",
    )


def time_jax(config, sizes, latent, grid, kernel, mesh) -> list[float]:
    """Seconds of each timed step."""
    plan, _, base = build.abstract_plan(config, family, sizes, kernel, mesh)
    base, student = random_weights(base), random_weights(plan.abstract_state.student)
    start, step = plan.initial_state(student), plan.step
    batch = sharding.put_batch(random_batch(config, sizes, latent), mesh)

    begin = time.perf_counter()
    step = step.lower(start, base, batch, latent=latent).compile()
    print(f"{'compile':9} {time.perf_counter() - begin:.1f} s", flush=True)
    seconds = []
    for _ in range(WARMUP.value + REPEATS.value):
        begin = time.perf_counter()
        start, metrics = jax.block_until_ready(step(start, base, batch))
        seconds.append(time.perf_counter() - begin)
    if not math.isfinite(float(metrics["loss"])):
        raise UserError(f"the loss is {float(metrics['loss'])}: these times mean nothing")
    return seconds[WARMUP.value :]


def random_weights(like: nnx.State) -> nnx.State:
    """Weights of unit gain for an abstract state, made where they will lie."""
    flat = {}
    for number, (path, leaf) in enumerate(nnx.to_flat_state(like)):
        shape, dtype = leaf.shape, leaf.dtype

        def draw(kind=path[-1], shape=shape, dtype=dtype, number=number):
            if kind == "scale":
                return jnp.ones(shape, dtype)
            gain = 0.5 if kind == "bias" else shape[-2] ** -0.5
            return gain * jax.random.normal(jax.random.key(number), shape, dtype)

        flat[path] = leaf.replace(jax.jit(draw, out_shardings=leaf.sharding)())
    return nnx.from_flat_state(flat)


def random_batch(config, sizes: zimage.ZImageConfig, latent) -> Batch:
    """Random captions of both roles, [micro-batches, samples, tokens, width]."""
    rng = np.random.default_rng(0)

    def role(tokens):
        draw = lambda: rng.standard_normal((tokens, sizes.caption_dim), np.float32)
        groups = [
            family.collate([{"features": draw()} for _ in range(config.batch_size)])
            for _ in range(config.accumulate)
        ]
        padded = jax.tree.map(lambda *parts: np.stack(parts), *groups)
        return padded._replace(features=padded.features.astype(jnp.dtype(config.dtype)))

    needs, student = registry.needs(config), role(STUDENT.value)
    target = rng.standard_normal((config.accumulate, *latent), np.float32)
    return Batch(
        dopsd.Contexts(student, role(TEACHER.value) if needs.teacher else None),
        target if needs.target else None,
        student if needs.prior else None,
    )


def time_torch(config, sizes: zimage.ZImageConfig, latent) -> dict:
    """What `torch_step.py` measures, in a process of its own: it has all of the device's memory."""
    loss, loss_steps = name_or_list(config.loss), name_or_list(config.loss_steps)
    others = {
        "method": "dopsd" if config.method != "dopsd" else "",
        "train": "lora" if config.train == "full" else "",
        "lora.targets": "" if config.lora.targets == "blocks" else "blocks",
        "loss": "x0, velocity or a list" if loss == "step" else "",
        "loss_steps": "all or a list"
        if isinstance(loss_steps, str) and loss_steps != "all"
        else "",
    }
    raise_if(
        f"--torch: the PyTorch loop has not this config.{field}; use {other}"
        for field, other in others.items()
        if other
    )
    job = {
        "transformer": {k: v for k, v in sizes.to_dict().items() if not k.startswith("_")},
        "latent": latent,
        "accumulate": config.accumulate,
        "student_tokens": STUDENT.value,
        "teacher_tokens": TEACHER.value,
        "sigmas": family.grid(name_or_list(config.grid), family.SCHEDULER)[:-1],
        "loss": loss,
        "loss_steps": None if loss_steps == "all" else loss_steps,
        "teacher": config.teacher.weights,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "base_dtype": config.base_dtype,
        "dtype": config.dtype,
        "checkpointing": config.remat != "none",
        "warmup": WARMUP.value,
        "repeats": REPEATS.value,
    }
    script = Path(__file__).with_name("torch_step.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(job)], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise UserError(f"--torch: {script.name} failed; its own message stands above")
    return json.loads(done.stdout)


def report(name: str, seconds: list[float], images: int, device: str = "") -> None:
    """One line: median, range, images a second."""
    median = statistics.median(seconds)
    print(
        f"{name:9} {median:.4g} s a step (median of {len(seconds)}, {min(seconds):.4g} to"
        f" {max(seconds):.4g}), {images / median:.4g} images/s{f', on {device}' if device else ''}",
        flush=True,
    )


if __name__ == "__main__":
    parse(data=False)
    program.run(main)
