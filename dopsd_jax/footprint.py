"""What a configuration's step needs, compiled for devices that need not be here."""

import dataclasses
import math
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dopsd_jax import dopsd, experiment, flops, settings, sharding
from dopsd_jax.errors import raise_if
from dopsd_jax.families import zimage as family
from dopsd_jax.hlo import Collectives, collectives
from dopsd_jax.models import attention, zimage
from dopsd_jax.tiny import configs as tiny
from dopsd_jax.weights import networks
from dopsd_jax.weights.stored import read_config

SHIFT = 3.0  # of the published scheduler: a number in the program, it changes nothing else
VAE_FACTOR = 8  # pixels of a latent's side


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to compile: image sides in pixels, caption rows with their padding."""

    height: int
    width: int
    rows_student: int
    rows_teacher: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler said. Bytes are of one device, FLOP of one image.

    live: bytes of base, adapters, teacher, optimizer and batch. peak, sent: None if the
    program does not fit; then `problem` says so in the compiler's words. capacity: None if
    unknown.
    """

    device_kind: str
    mesh: dict[str, int]
    attention: str
    images: int
    live: dict[str, int]
    work: flops.StepWork
    capacity: float | None
    seconds: float
    peak: int | None = None
    sent: Collectives | None = None
    problem: str | None = None

    @property
    def temporaries(self) -> int | None:
        """What the step needs besides what lives anyway, at its worst moment."""
        return None if self.peak is None else self.peak - sum(self.live.values())

    @property
    def fits(self) -> bool:
        return self.problem is None and not (self.capacity and self.peak > self.capacity)


def network_size(model: str, full_size: bool) -> tuple[zimage.ZImageConfig, str]:
    """The network that is compiled, and where its sizes come from.

    That of the folder `model`; the published one if `model` is not a folder here or `full_size`.
    """
    path = Path(model).expanduser() / "transformer" / "config.json"
    if not full_size and model == experiment.TINY:
        sizes = zimage.ZImageConfig.from_dict(tiny.transformer(tiny.Size()), experiment.TINY)
        return sizes, "the miniature"
    if not full_size and path.parent.parent.is_dir():
        return read_config(path, networks.ZIMAGE["transformer"])[0], str(path)
    return zimage.ZImageConfig(), "the published Z-Image-Turbo"


def compile_step(
    config: ConfigDict, size: zimage.ZImageConfig, case: Case, devices: list[jax.Device]
) -> Report:
    """Compiles the step of `config` on a network of `size`. Nothing is allocated.

    Raises `UserError` for what the configuration asks and the network or the mesh cannot do.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check(mesh, batch_size=config.batch_size, heads=size.heads, hidden=size.hidden_dim)
    _check(size, case)
    kernel = attention.resolve(config.attention, devices[0].platform, config.dtype, size.head_dim)
    plan, base = experiment.abstract_plan(config, size, kernel, SHIFT, mesh)
    start, grid, step = plan.like, plan.grid, plan.step
    batch = _batch(config, size, case, mesh)
    height, width = case.height // VAE_FACTOR, case.width // VAE_FACTOR
    capacity = flops.device_memory(devices[0].device_kind)
    report = Report(
        device_kind=devices[0].device_kind,
        mesh=dict(mesh.shape),
        attention=kernel,
        images=config.batch_size * config.accumulate,
        live={
            "base": _local_bytes(base),
            "adapters": _local_bytes(start.student),
            "teacher": _local_bytes(start.teacher),
            "optimizer": _local_bytes(start.opt_state),
            "batch": _local_bytes(batch),
        },
        work=flops.step_work(
            size,
            height=height,
            width=width,
            rows_student=case.rows_student,
            rows_teacher=case.rows_teacher,
            steps=len(grid) - 1,
            chosen=plan.trained.chosen,
            rank=config.lora.rank,
            full=config.train == "full",
            remat=config.remat,
            flash=kernel != "xla",
            taught=_taught(config, len(grid) - 1),
        ),
        capacity=capacity,
        seconds=0.0,
    )
    clock = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            latent = (config.batch_size, height, width, size.channels)
            compiled = step.lower(start, base, batch, latent=latent).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.monotonic() - clock
        return dataclasses.replace(report, seconds=seconds, problem=_exhausted(str(error)))
    seconds = time.monotonic() - clock
    stats = compiled.memory_analysis()
    peak = stats.peak_memory_in_bytes
    if devices[0].platform == "cpu":  # its peak leaves temporaries out
        results = stats.output_size_in_bytes - stats.alias_size_in_bytes
        peak = stats.argument_size_in_bytes + results + stats.temp_size_in_bytes
    return dataclasses.replace(
        report,
        seconds=seconds,
        peak=peak,
        sent=collectives(compiled.as_text()),
    )


def describe(report: Report, config: ConfigDict, case: Case) -> list[str]:
    """The report in lines."""
    devices = math.prod(report.mesh.values())
    axes = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    lines = [
        f"{devices} x {report.device_kind}: {axes}",
        f"{report.images} images a step of {case.height} x {case.width}, captions of "
        f"{case.rows_student} and {case.rows_teacher} rows; attention {report.attention}, remat "
        f"{config.remat}, base {config.base_dtype}",
        "memory of one device:",
        *(f"  {kind:<12}{_size(size)}" for kind, size in report.live.items()),
    ]
    if report.problem is None:
        room = f" of {_size(report.capacity).strip()}" if report.capacity else ""
        lines.append(f"  {'temporaries':<12}{_size(report.temporaries)}")
        lines.append(f"  {'peak':<12}{_size(report.peak)}{room}")
    model, executed = (
        flop * report.images / devices / 1e12 for flop in (report.work.model, report.work.executed)
    )
    lines.append(f"work of one device a step: model {model:.4g} TFLOP, executed {executed:.4g}")
    if rate := flops.peak_rate(report.device_kind):
        lines[-1] += f"; {executed * 1e12 / rate:.2f} s at its peak of {rate / 1e12:.4g} TFLOP/s"
    if report.sent is not None:
        lines.append("sent between devices a step:")
        for kind, traffic in sorted(report.sent.traffic.items()):
            lines.append(f"  {kind:<20}{traffic.count:6d} times{_size(traffic.bytes)}")
        if not report.sent.traffic:
            lines.append("  nothing")
        if report.sent.unknown_loops:
            lines.append(f"  at least: {report.sent.unknown_loops} loops are of unknown length")
    lines.append(f"compiled in {report.seconds:.0f} s")
    if report.fits:
        return [*lines, "fits" if report.capacity else "compiles; the device's memory is unknown"]
    why = report.problem or f"the peak is above {_size(report.capacity).strip()}"
    return [*lines, f"does not fit: {why}", *(f"  try {a}" for a in _advice(report, config))]


def _size(count: float) -> str:
    return f"{count / 2**30:9.2f} GiB" if count >= 2**30 else f"{count / 2**20:9.2f} MiB"


def _advice(report: Report, config: ConfigDict) -> list[str]:
    """What to change so that less memory is needed, the cheapest first."""
    rows = report.mesh["data"] * report.mesh["fsdp"]
    advice = []
    if config.batch_size > rows:
        advice.append(f"--config.batch_size={rows} and config.accumulate for the rest")
    if config.remat != "full":
        advice.append("--config.remat=full")
    if report.attention == "xla" and not report.device_kind.startswith("cpu"):
        advice.append("--config.attention=auto: xla keeps all attention probabilities")
    if config.base_dtype != "bfloat16":
        advice.append("--config.base_dtype=bfloat16")
    if report.mesh["data"] > 1:
        advice.append("--config.mesh.data=1 --config.mesh.fsdp=-1: the base split over the devices")
    advice.append("--config.data.resolution or --config.lora.rank smaller, or a larger slice")
    return advice


def _batch(config, size, case: Case, mesh: Mesh) -> dopsd.Contexts:
    samples, place = (config.accumulate, config.batch_size), sharding.batch_sharding(mesh)

    def context(rows: int) -> family.Context:
        features = jax.ShapeDtypeStruct(
            (*samples, rows, size.caption_dim), jnp.dtype(config.dtype), sharding=place
        )
        return family.Context(features, jax.ShapeDtypeStruct(samples, jnp.int32, sharding=place))

    return dopsd.Contexts(context(case.rows_student), context(case.rows_teacher))


def _check(size: zimage.ZImageConfig, case: Case) -> None:
    side = VAE_FACTOR * size.patch
    most = [limit * side for limit in size.axes_lens[1:]]
    raise_if(
        [
            f"--{name}: {pixels} must be a multiple of {side}, from {side} to {limit}"
            for name, pixels, limit in (
                ("height", case.height, most[0]),
                ("width", case.width, most[1]),
            )
            if pixels % side or not 0 < pixels <= limit
        ]
        + [
            f"--{name}: {rows} must be a multiple of {zimage.PAD_MULTIPLE}, from "
            f"{zimage.PAD_MULTIPLE} to {size.max_caption}"
            for name, rows in (
                ("student_rows", case.rows_student),
                ("teacher_rows", case.rows_teacher),
            )
            if rows % zimage.PAD_MULTIPLE or not 0 < rows <= size.max_caption
        ]
    )


def _taught(config: ConfigDict, steps: int) -> int:
    taught = settings.values(config.loss_steps)
    return int(dopsd.taught_steps(taught, steps, jax.random.key(0)).sum())


def _local_bytes(tree) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * jax.dtypes.itemsize_bits(x.dtype) // 8
        for x in jax.tree.leaves(tree)
    )


def _exhausted(message: str) -> str:
    """The sentence of the compiler's message that says how much is needed and how much there is."""
    line = " ".join(message.split())
    found = re.search(r"Used [\d.]+\w? of [\d.]+\w? \w+", line) or re.search(
        r"Ran out of memory.*?(?=\. |\.?$)", line
    )
    return found[0] if found else line[:300]
