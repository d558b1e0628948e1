"""What a configuration's step needs, compiled for devices that need not be present."""

import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from dopsd_jax.estimation import flops, memory
from dopsd_jax.estimation.abstract_step import Program, Workload, make_program
from dopsd_jax.estimation.collectives import Collectives, Traffic, activations, collectives
from dopsd_jax.estimation.memory import Account
from dopsd_jax.methods import registry
from dopsd_jax.parallel import sharding

# The least effort for a fast program: a sixth of the time, and nearly the same memory. Which tiles
# of a product are the fastest is then not searched for. docs/scaling.md compares the two.
QUICK = {"exec_time_optimization_effort": -1.0}
CLOSE = 0.03  # of a device's memory: where the two might not give the same verdict


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler said. Bytes are of one device, FLOP of one image.

    account: what is counted without it. needed: the most memory at one time; None if that is not
    known. sent: what devices send each other; activations: the part of it that is none of weights
    and gradients. None if there is no program. problem: why there is none, in the compiler's words.
    capacity: bytes of a device; None if unknown. digest: of the program before compilation. quick:
    it was compiled as `QUICK` says.
    """

    device_kind: str
    mesh: dict[str, int]
    attention: str
    images: int
    account: Account
    work: flops.StepWork
    capacity: float | None
    seconds: float = 0.0
    needed: int | None = None
    sent: Collectives | None = None
    activations: dict[str, Traffic] | None = None
    problem: str | None = None
    digest: str = ""
    quick: bool = False

    @property
    def temporaries(self) -> int | None:
        """Peak memory of the step, without the arrays that stay for the whole run."""
        return None if self.needed is None else self.needed - self.account.lasting

    @property
    def fits(self) -> bool:
        return self.problem is None and not (self.capacity and self.needed > self.capacity)


def compile_step(
    config: ConfigDict, case: Workload, devices: list[jax.Device], *, quick: bool = False
) -> Report:
    """Compiles the step of `config` on the network of `case`. Nothing is allocated.

    Nothing is compiled if the arrays that stay for the whole run exceed a device's memory. quick:
    for a TPU with less effort than a run's step, see `QUICK`; then once more, as for a run, if the
    peak is within `CLOSE` of the device's memory.
    Raises `UserError`: see `make_program`.
    """
    report, lower = prepare(config, case, devices)
    if report.problem:
        return report
    platform, (lowered, program) = devices[0].platform, lower()
    report = dataclasses.replace(report, digest=digest(lowered))
    seconds = 0.0
    for effort in (QUICK, {}) if quick and platform == "tpu" else ({},):
        found = _compiled(report, lowered, program, case, platform, effort)
        seconds += found.seconds
        if not _is_close(found):
            break
    return dataclasses.replace(found, seconds=seconds)


def _is_close(found: Report) -> bool:
    """Whether another effort could give another verdict."""
    if found.needed is None:
        return True
    return bool(found.capacity) and abs(found.needed / found.capacity - 1) < CLOSE


def _compiled(
    report: Report,
    lowered: jax.stages.Lowered,
    program: Program,
    case: Workload,
    platform: str,
    effort: dict[str, float],
) -> Report:
    """The report with what the compiler says; effort: its options."""
    clock = time.monotonic()
    report = dataclasses.replace(report, quick=bool(effort))
    try:
        compiled = lowered.compile(compiler_options=effort or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, problem = _exhausted(str(error))
        seconds = time.monotonic() - clock
        return dataclasses.replace(report, seconds=seconds, needed=needed, problem=problem)
    stats = compiled.memory_analysis()
    needed = stats.peak_memory_in_bytes
    # Elsewhere the peak leaves temporaries out, and they are one block. A TPU's counts what lies in
    # the host's memory.
    if platform != "tpu" or stats.host_argument_size_in_bytes:
        results = stats.output_size_in_bytes - stats.alias_size_in_bytes
        needed = stats.argument_size_in_bytes + results + stats.temp_size_in_bytes
    sent = collectives(compiled.as_text())
    # Lengths of the rows of tokens that the network sees: contexts, image, both.
    image = case.family.image_tokens(case.size, *case.latent)
    rows = {image, *program.positions, *(image + count for count in program.positions)}
    parts = {n // split for n in rows for split in (1, report.mesh["context"])}
    return dataclasses.replace(
        report,
        seconds=time.monotonic() - clock,
        needed=needed,
        sent=sent,
        activations=activations(sent, parts, _parameter_sizes(program)),
    )


def prepare(
    config: ConfigDict, case: Workload, devices: list[jax.Device]
) -> tuple[Report, Callable[[], tuple[jax.stages.Lowered, Program]]]:
    """What is known before the compiler is asked, and the step for it; see `compile_step`."""
    platform, kind = devices[0].platform, devices[0].device_kind
    mesh = sharding.make_mesh(config.mesh, devices)
    program = make_program(config, case, mesh, platform)
    held = memory.count(config, program, mesh)
    capacity = device_memory(devices[0])
    problem = None
    if capacity and held.lasting > capacity:
        problem = f"what lives through the run takes {held.lasting / 2**30:.2f} GiB by itself"
    report = Report(
        device_kind=kind,
        mesh=dict(mesh.shape),
        attention=program.attention,
        images=config.batch_size * config.accumulate,
        account=held,
        work=work(config, case, program, mesh),
        capacity=capacity,
        problem=problem,
    )

    def lower():
        with jax.set_mesh(mesh):
            arguments = program.plan.abstract_state, program.base, program.batch
            lowered = program.plan.step.lower(*arguments, 0, program.anchors, latent=program.latent)
            return lowered, program

    return report, lower


def digest(lowered: jax.stages.Lowered) -> str:
    """Of the program that the compiler is given: the same program compiles to the same step."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def work(config, case: Workload, program: Program, mesh: jax.sharding.Mesh) -> flops.StepWork:
    """Of a step for an image, and for the anchors beside it."""
    return flops.step_work(
        case.family,
        case.size,
        registry.passes(config, program.plan.grid, sharding.sample_devices(mesh)),
        program.positions,
        height=case.latent[0],
        width=case.latent[1],
        chosen=program.plan.trained.chosen,
        products=program.plan.trained.products,
        inner=program.plan.trained.inner,
        full=config.train == "full",
        remat=config.remat,
    )


def _parameter_sizes(program: Program) -> set[int]:
    """Numbers of elements of every parameter, and of a layer of it."""
    leaves = jax.tree.leaves((program.plan.abstract_state.student, program.base))
    layers = {leaf.size // leaf.shape[0] for leaf in leaves if leaf.ndim > 2}
    return layers | {leaf.size for leaf in leaves}


def device_memory(device: jax.Device) -> float | None:
    """Bytes that a device lets programs use; None if it does not tell.

    Of a TPU by its kind, also of one that is not here; a CPU's devices share the machine's memory.
    """
    if known := flops.device_memory(device.device_kind):
        return known
    if device.platform == "cpu":
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return host / jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _exhausted(message: str) -> tuple[int | None, str]:
    """Bytes needed, if it says so, and the sentence of the compiler's message about them."""
    line = " ".join(message.split())
    if used := re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+\w? \w+", line):
        return int(float(used[1]) * 1024 ** " KMGT".index(used[2] or " ")), used[0]
    found = re.search(r"Ran out of memory.*?(?=\. |\.?$)", line)
    return None, found[0] if found else line[:300]
