"""config.remat = auto: how much is computed again, chosen by the memory that there is."""

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from dopsd_jax.common.config_fields import as_list
from dopsd_jax.common.errors import UserError
from dopsd_jax.conditioning.features import Features
from dopsd_jax.estimation import compiled_step, counted_step, memory
from dopsd_jax.estimation.abstract_step import Workload, workload
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.models import kinds
from dopsd_jax.parallel import multihost

FREE = 0.1  # share of the memory that stays free
ORDER = ("none", "dots", "full")  # the fastest first


class Choice(NamedTuple):
    """remat: one of `ORDER`. why: a line about it; empty where it was not chosen but given."""

    remat: str
    why: str = ""

    def describe(self) -> list[str]:
        return [self.why] if self.why else []


def settle(config: ConfigDict, pipe: Pipeline, features: Features, mesh: Mesh) -> Choice:
    """Of a run: the features are surveyed, the transformer is not loaded. All processes call it.

    Sets `pipe.remat`. What is counted is the data set's largest shape.
    """
    if config.remat != kinds.AUTO:
        return Choice(config.remat)
    device = mesh.local_mesh.devices.flat[0]
    case, contexts = _largest(pipe, features)
    told = device.platform, device.device_kind, compiled_step.device_memory(device)
    own = choose(config, case, mesh, *told, contexts)
    # Devices of one kind may tell slightly different sizes, and all must run one program.
    found = [Choice(*each) for each in multihost.gather(own)]
    chosen = max(found, key=lambda choice: ORDER.index(choice.remat))
    pipe.remat = chosen.remat
    return chosen


def choose(
    config: ConfigDict,
    case: Workload,
    mesh: Mesh | AbstractMesh,
    platform: str,
    kind: str,
    capacity: float | None,
    contexts: Sequence | None = None,
) -> Choice:
    """The first of `ORDER` that leaves `FREE` of `capacity`, in bytes; the last if none does.

    platform, kind: of the device. contexts: see `make_program`. Raises `UserError` where the
    memory is not known.
    """
    if capacity is None:
        raise UserError(
            f"config.remat: auto goes by the device's memory, and a {kind} does not tell it; set "
            "it to none, dots or full"
        )
    counted = "cpu" if platform == "cpu" else memory.PLATFORM
    # Layers in the host's memory would stay on the device with none.
    order = ORDER[1:] if "base" in as_list(config.offload) else ORDER
    before = ""
    for remat in order:
        tried = config.copy_and_resolve_references()
        tried.remat = remat
        needed = counted_step.need(tried, case, mesh, counted, contexts, kind)[2]
        fits = needed <= (1 - FREE) * capacity
        if fits or remat == order[-1]:
            break
        before += f"; {remat} would need {_gib(needed)}"
    tight = "" if fits else f", which leaves less than {FREE:.0%} free: see estimate"
    return Choice(
        remat,
        f"remat: {remat}, chosen by auto: a step needs about {_gib(needed)} of {_gib(capacity)} "
        f"GiB{tight}{before}",
    )


def _largest(pipe: Pipeline, features: Features) -> tuple[Workload, list]:
    """The picture and the contexts with the most tokens, as `make_program` takes them."""
    family, found = pipe.family, []
    for shape, contexts in features.outlines().items():
        width, height = shape.bucket
        case = workload(pipe, height, width)
        tokens = family.image_tokens(pipe.config, *case.latent) + family.positions(contexts[0])
        found.append((tokens, case, contexts))
    return max(found, key=lambda each: each[0])[1:]


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f}"
