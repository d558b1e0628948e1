"""What to change when a step does not fit, each change with the memory that it leaves.

The estimate is the memory of the changed configuration, counted from shapes, and what the compiler
needs beyond this count: as for the present one, in proportion to `counted_step.rest`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dopsd_jax.common.config_fields import as_list
from dopsd_jax.common.errors import UserError
from dopsd_jax.estimation import abstract_step, counted_step, memory
from dopsd_jax.estimation.abstract_step import Workload
from dopsd_jax.estimation.compiled_step import Report
from dopsd_jax.methods import registry
from dopsd_jax.models import kinds

LARGEST = 1024  # devices; more are not asked for
WORTH = 0.01  # share of the memory that a remedy must save to be named
KEEPS_ALL = ("none", kinds.UNROLLED)  # values of config.remat that compute nothing again
UNSPLIT = ("context", "tensor")  # axes of the mesh that the devices it advises leave at 1


class Remedy(NamedTuple):
    """fields: of the configuration, changed. why: what it does. needed: bytes of a device then."""

    fields: dict[str, Any]
    why: str
    needed: int

    @property
    def flags(self) -> str:
        return " ".join(f"--config.{name}={value}" for name, value in self.fields.items())


class Pricing:
    """The memory of a configuration that is like `config` but for some fields."""

    def __init__(self, config: ConfigDict, case: Workload, report: Report):
        self.config, self.case = memory.countable(config), case
        self.platform = "cpu" if report.device_kind == "cpu" else memory.PLATFORM
        self.devices = math.prod(report.mesh.values())
        self.kind, self.prices = report.device_kind, {}
        # What the compiler needed beyond the count, of what is expected; 0 if it never came so far.
        beyond = 0 if report.needed is None else report.needed - report.account.total
        self.share = beyond / self._count({}, self.devices)[1]

    def needed(self, fields: Mapping[str, Any], devices: int | None = None) -> int:
        """Bytes of one device. Raises `UserError` for a configuration that cannot be."""
        devices = devices or self.devices
        key = devices, *sorted(fields.items())
        if key not in self.prices:
            counted, beyond = self._count(fields, devices)
            self.prices[key] = counted + round(self.share * beyond)
        return self.prices[key]

    def _count(self, fields: Mapping[str, Any], devices: int) -> tuple[int, int]:
        """What is counted, and what a compiler is expected to need beside it."""
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(fields)
        mesh = abstract_step.abstract_mesh(config, devices)
        own = config, self.case, mesh, self.platform
        _, held, needed = counted_step.need(*own, kind=self.kind)
        return held.total, needed - held.total


def advise(
    config: ConfigDict, case: Workload, report: Report
) -> tuple[list[Remedy], list[Remedy], int | None]:
    """(single changes that help, changes that fit together, devices on which the step fits).

    Changes are ordered by their cost in speed or exactness, the cheapest first; those that save
    nothing are left out. Together: the fewest of them, in that order, without those whose fields a
    later one sets again; empty if not even all of them suffice. Devices: with everything split over
    them; None if that is no remedy.
    """
    pricing = Pricing(config, case, report)
    now = pricing.needed({})
    single, chain, fields, best = [], [], {}, now
    for changed, why in _changes(config, report):
        try:
            alone = pricing.needed(changed)
            added = _added(fields, changed)
            together = pricing.needed(fields | added) if fields else alone
        except UserError:  # this network or mesh cannot
            continue
        if now - alone > WORTH * now:
            single.append(Remedy(changed, why, alone))
        if best > report.capacity and best - together > WORTH * now:
            fields |= added
            best = together
            chain = [remedy for remedy in chain if remedy.fields.keys() - added.keys()]
            chain.append(Remedy(added, why, together))
    return single, chain if best <= report.capacity else [], _devices(config, report, pricing)


def describe(config: ConfigDict, case: Workload, report: Report) -> list[str]:
    """`advise` in lines."""
    single, chain, devices = advise(config, case, report)
    gib = lambda count: f"{count / 2**30:8.2f} GiB"
    least = "about" if report.needed is not None else "at least"
    lines = [f"what to change, and what a device would need then ({least}, counted from shapes):"]
    for remedy in single:
        verdict = "" if remedy.needed > report.capacity else ": fits"
        lines.append(f"  {gib(remedy.needed)}  {remedy.flags}: {remedy.why}{verdict}")
    if len(chain) > 1:
        fields = {name: value for remedy in chain for name, value in remedy.fields.items()}
        flags = Remedy(fields, "", 0).flags  # a later change of a field replaces an earlier one
        lines.append(f"  {gib(chain[-1].needed)}  together: {flags}: fits")
    if devices:
        fields = {"mesh.data": 1, "mesh.fsdp": -1}
        fields |= {f"mesh.{name}": 1 for name in UNSPLIT if config.mesh[name] != 1}
        fields["batch_size"] = _rows(config, report) * devices
        lines.append(f"  or {devices} devices: {Remedy(fields, '', 0).flags}")
    if not single and not devices:
        lines = ["no field of the configuration makes it fit; use devices with more memory, or"]
        sizes = "buckets" if as_list(config.data.buckets) else "resolution"
        lines.append(f"  smaller --config.data.{sizes} or --config.lora.rank")
    return lines


def _changes(config: ConfigDict, report: Report) -> Iterator[tuple[dict[str, Any], str]]:
    """Fields to change and what for; the cheapest first."""
    rows = report.mesh["data"] * report.mesh["fsdp"]
    if config.batch_size > rows:
        times = config.accumulate * config.batch_size // rows
        yield (
            {"batch_size": rows, "accumulate": times},
            "the same images a step, one at a time on a device",
        )
    if report.attention == "xla" and not report.device_kind.startswith("cpu"):
        yield {"attention": "auto"}, "a kernel that makes no array of all probabilities"
    if report.mesh["data"] > 1:
        yield {"mesh.data": 1, "mesh.fsdp": rows}, f"weights split over {rows} devices"
    if config.train == "lora" and config.base_dtype == "float32":
        yield {"base_dtype": "bfloat16"}, "frozen weights of two bytes"
    if config.remat in KEEPS_ALL:
        yield {"remat": "dots"}, "of the activations only what products gave is kept"
    if config.remat != "full":
        yield {"remat": "full"}, "activations computed again instead of kept"
    away = "base" in as_list(config.offload)  # in 8 bits it would not stay there
    if config.train == "lora" and config.base_dtype in kinds.WHOLE and not away:
        yield {"base_dtype": "int8"}, "frozen weights of one byte"
    if config.moments_dtype == "float32" and config.optimizer == "adamw":
        yield {"moments_dtype": "bfloat16"}, "the optimizer's moments of two bytes"
    held = as_list(config.offload)
    copies = registry.teacher(config).weights != "live" or registry.start(config) == "copy"
    kept = ("teacher",) if copies else ()
    for names in dict.fromkeys((kept, (*kept, "optimizer"))):
        if not set(names) <= set(held):
            both = ",".join(dict.fromkeys((*held, *names)))
            yield {"offload": both}, "kept in the host's memory between uses"
    if config.train == "lora" and not away:
        fields = {"offload": ",".join((*held, "base"))}
        if config.remat in KEEPS_ALL:
            fields["remat"] = "full"
        if config.base_dtype in kinds.QUANTISED:
            fields["base_dtype"] = "bfloat16"
        yield fields, "the frozen layers in the host's memory, fetched in every pass"
    if config.optimizer == "adamw":
        fields = {"optimizer": "adafactor"}
        if config.moments_dtype != "float32":
            fields["moments_dtype"] = "float32"
        yield fields, "no moments but rows and columns of the second"


def _added(fields: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """`changed` as it follows `fields`: what these keep in the host's memory stays there.

    What these have made of a base that goes there, or of moments that are no more, is undone.
    """
    found = dict(changed)
    if "offload" in changed:
        names = dict.fromkeys((*as_list(fields.get("offload", "")), *as_list(changed["offload"])))
        found["offload"] = ",".join(names)
        if "base" in names and fields.get("base_dtype") in kinds.QUANTISED:
            found["base_dtype"] = "bfloat16"
    if "optimizer" in changed and "moments_dtype" in fields:
        found["moments_dtype"] = "float32"
    return found


def _rows(config: ConfigDict, report: Report) -> int:
    """Images of a device in a micro-batch."""
    return max(config.batch_size // (report.mesh["data"] * report.mesh["fsdp"]), 1)


def _devices(config: ConfigDict, report: Report, pricing: Pricing) -> int | None:
    """The fewest devices, doubling from those there are, on which the step fits if it is split."""
    devices, before = 2 * pricing.devices, math.inf
    while devices <= LARGEST:
        fields = {"mesh.data": 1, "mesh.fsdp": devices} | {f"mesh.{name}": 1 for name in UNSPLIT}
        fields["batch_size"] = _rows(config, report) * devices
        try:
            needed = pricing.needed(fields, devices)
        except UserError:  # so many do not divide the network
            return None
        if needed <= report.capacity:
            return devices
        if before - needed < WORTH * needed:  # what is left is not split
            return None
        devices, before = 2 * devices, needed
    return None
