"""Does a configuration's step fit on a device that is not here, and what does it cost?

    python -m dopsd_jax.estimate --config configs/zimage.py[:arg] --topology v5p-8
    python -m dopsd_jax.estimate --config configs/zimage.py[:arg] --device 24GB

For a TPU slice the step is compiled; for a GPU it is counted from shapes, which is an estimate.
Nothing is loaded or allocated. The exit status is 1 if the step does not fit.
"""

import math

from dopsd_jax.common import program
from dopsd_jax.config.flags import CONFIG, parse

OPTIONS = program.options(__name__)
TOPOLOGY = OPTIONS.string("topology", "local", "local, or a TPU slice such as v5p-8 or v5p:2x2x1")
DEVICE = OPTIONS.string(
    "device", "", "a GPU, by name or memory (H100, 24GB), or a TPU slice; instead of --topology"
)
FULL_SIZE = OPTIONS.bool("full_size", False, "the published network, not config.model's")
QUICK = OPTIONS.bool("quick", True, "for a TPU slice: with less effort than for a run")
HEIGHT = OPTIONS.integer("height", 0, "pixels; 0: of the largest size of the data", 0, 65536)
WIDTH = OPTIONS.integer("width", 0, "pixels; 0: of the largest size of the data", 0, 65536)
STUDENT_ROWS = OPTIONS.integer(
    "student_rows", None, "caption tokens of the student; default: a long caption", 1, 10**6
)
TEACHER_ROWS = OPTIONS.integer(
    "teacher_rows", None, "caption tokens of the teacher; default: a long caption", 1, 10**6
)
REFERENCES = OPTIONS.integer(
    "references",
    None,
    "pictures of the same size that a row edits; default: 1 with config.data.references, else 0",
    0,
    10,
)

if __name__ == "__main__":
    parse(data=False)  # wrong options end it here: the imports below take seconds

import jax
from ml_collections import ConfigDict

from dopsd_jax.common.errors import UserError
from dopsd_jax.estimation import (
    abstract_step,
    compiled_step,
    counted_step,
    encoders,
    flops,
    remat,
    remedies,
    tpu_topologies,
)
from dopsd_jax.estimation.abstract_step import Workload
from dopsd_jax.estimation.compiled_step import Report
from dopsd_jax.families.base import STUDENT, TEACHER
from dopsd_jax.methods import anchor
from dopsd_jax.models import kinds
from dopsd_jax.parallel.sharding import BATCH_AXES
from dopsd_jax.run import data_set


def main() -> int:
    config, topology, gpu = CONFIG.value, TOPOLOGY.value, None
    if DEVICE.value and topology != tpu_topologies.LOCAL:
        raise UserError("--device, --topology: name the device with one of them")
    if DEVICE.value.startswith(tuple(tpu_topologies.PRODUCTS)):
        topology = DEVICE.value
    elif DEVICE.value:
        gpu = counted_step.find_gpu(DEVICE.value)
    if gpu or topology != tpu_topologies.LOCAL:
        jax.config.update("jax_platforms", "cpu")  # whatever else is here is left alone
    devices = [] if gpu else tpu_topologies.devices(topology)
    family, size, factor, origin = abstract_step.find_network(config, FULL_SIZE.value)
    references = REFERENCES.value
    if references is None:
        references = int(bool(config.data.references))
    size_of_data = data_set.largest_size(config, factor * size.patch)
    case = Workload(
        family,
        size,
        height=HEIGHT.value or size_of_data.height,
        width=WIDTH.value or size_of_data.width,
        rows_student=STUDENT_ROWS.value or family.ROWS[STUDENT],
        rows_teacher=TEACHER_ROWS.value or family.ROWS[TEACHER],
        references=references,
        factor=factor,
    )
    how = "counting" if gpu else "compiling"
    print(f"network: {origin}, {flops.parameters(family, size):,} parameters; {how}", flush=True)
    if config.remat == kinds.AUTO:
        mesh = abstract_step.abstract_mesh(config, len(devices) or 1)
        told = ("gpu", gpu.name, gpu.usable) if gpu else _told(devices[0])
        chosen = remat.choose(config, case, mesh, *told)
        print(chosen.why, flush=True)
        config.remat = chosen.remat
    if gpu:
        report = counted_step.count_step(config, case, gpu)
    else:
        report = compiled_step.compile_step(config, case, devices, quick=QUICK.value)
    print("\n".join(describe(report, config, case)), flush=True)
    if not report.fits:
        print("\n".join(remedies.describe(config, case, report)))
    return 0 if report.fits else 1


def _told(device: jax.Device) -> tuple[str, str, float | None]:
    return device.platform, device.device_kind, compiled_step.device_memory(device)


def describe(report: Report, config: ConfigDict, case: Workload) -> list[str]:
    """The report in lines."""
    devices = math.prod(report.mesh.values())
    axes = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    what = f"{config.lora.kind} rank {config.lora.rank}" if config.train == "lora" else "full"
    return [
        f"{devices} x {report.device_kind}: {axes}",
        f"{what}, {report.images} images a step of {case.height} x {case.width}, captions of "
        f"{case.rows_student} and {case.rows_teacher} rows, {case.references} references; "
        f"attention {report.attention}, remat {config.remat}, base {config.base_dtype}",
        *_anchors(config, report),
        *_memory(report),
        *encoders.describe(config, case, report.capacity),
        *_work(report, devices),
        *_traffic(report),
        *_verdict(report),
    ]


def _anchors(config: ConfigDict, report: Report) -> list[str]:
    devices = math.prod(report.mesh[axis] for axis in BATCH_AXES)
    micro = anchor.micro_batches(config, devices)
    return [f"beside them {micro.count} x {micro.size} anchors"] if micro else []


def _memory(report: Report) -> list[str]:
    lines = ["memory of one device:"]
    lines += [f"  {kind:<12}{_size(size)}" for kind, size in report.account.live.items() if size]
    if report.needed is not None:
        room = f" of {_size(report.capacity).strip()}" if report.capacity else ""
        lines.append(f"  {'temporaries':<12}{_size(report.temporaries)}")
        lines.append(f"  {'peak':<12}{_size(report.needed)}{room}")
    else:
        lines.append(f"  {'so far':<12}{_size(report.account.lasting)}, without any temporaries")
    if report.account.host:
        held = ", ".join(f"{k} {_size(n).strip()}" for k, n in report.account.host.items())
        lines.append(f"memory of its host, for this device: {held}")
    return lines


def _work(report: Report, devices: int) -> list[str]:
    model, executed = (
        flop * report.images / devices / 1e12 for flop in (report.work.model, report.work.executed)
    )
    line = f"work of one device a step: model {model:.4g} TFLOP, executed {executed:.4g}"
    if rate := flops.peak_rate(report.device_kind):
        line += f"; {executed * 1e12 / rate:.2f} s at its peak of {rate / 1e12:.4g} TFLOP/s"
    return [line]


def _traffic(report: Report) -> list[str]:
    if report.sent is None:
        return []
    lines = ["results of collectives on one device in a step:"]
    for kind, traffic in sorted(report.sent.traffic.items()):
        lines.append(f"  {kind:<20}{traffic.count:6d} times{_size(traffic.bytes)}")
        if carried := report.activations.get(kind):
            lines[-1] += f", of which activations {_size(carried.bytes).strip()}"
    if not report.sent.traffic:
        lines.append("  nothing")
    if report.sent.unknown_loops:
        lines.append(f"  at least: {report.sent.unknown_loops} loops are of unknown length")
    return lines


def _verdict(report: Report) -> list[str]:
    lines = [f"compiled in {report.seconds:.0f} s"] if report.digest else []
    if report.quick:
        lines[0] += ", with less effort than for a run: its peak may be 2 % away"
    if report.sent is None and not report.problem:
        lines = ["an estimate, from shapes; steps that were compiled needed up to 4 % more or less"]
    if report.fits:
        return [*lines, "fits" if report.capacity else "compiles; the device's memory is unknown"]
    room = _size(report.capacity).strip() if report.capacity else "its memory"
    why = report.problem or f"the peak is {_size(report.needed).strip()}"
    return [*lines, f"does not fit: {why}, and a device has {room}"]


def _size(count: float) -> str:
    return f"{count / 2**30:9.2f} GiB" if count >= 2**30 else f"{count / 2**20:9.2f} MiB"


if __name__ == "__main__":
    program.run(main)
