"""Compares the tensors of a checkpoint with those that a network needs."""

from collections.abc import Iterable, Mapping, Sequence

from dopsd_jax.common.errors import raise_if
from dopsd_jax.models.names import Leaf, Source
from dopsd_jax.weights.tensors import FLOATS, TensorInfo


def sources(leaves: Iterable[Leaf]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the leaves are made of."""
    return {source.name: source.shape for leaf in leaves for source in leaf.sources}


def check_tensors(
    where: str,
    infos: Mapping[str, TensorInfo],
    needed: Mapping[str, tuple[int, ...]],
    unused: Sequence[Source] = (),
) -> None:
    """Raises one `UserError` that lists every missing, unexpected or mis-shaped tensor.

    `unused` may be there or not, and may be counters. Parameters must be stored in one of
    `tensors.FLOATS`.
    """
    allowed = {source.name: source.shape for source in unused}
    faults = []
    for name, shape in needed.items():
        if name not in infos:
            faults.append(f"{where}: tensor {name!r} {list(shape)} is missing; download it again")
    for name, info in infos.items():
        shape = needed.get(name, allowed.get(name))
        if shape is None:
            faults.append(
                f"{where}: tensor {name!r} {list(info.shape)} is unexpected; "
                "is this the right model, and its own config.json?"
            )
        elif _without_leading_ones(info.shape) != _without_leading_ones(shape):
            faults.append(
                f"{where}: tensor {name!r} has shape {list(info.shape)}, "
                f"config.json makes it {list(shape)}; is this its own config.json?"
            )
        elif info.dtype not in (FLOATS if name in needed else (*FLOATS, "I64")):
            faults.append(
                f"{where}: tensor {name!r} is stored as {info.dtype}, one of {', '.join(FLOATS)} "
                "is needed; get a version that is not quantised"
            )
    raise_if(faults)


def _without_leading_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """[1, n] and [n] hold the same numbers in the same order, and files have either."""
    lead = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[lead:])
