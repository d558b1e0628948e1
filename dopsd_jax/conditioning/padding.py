"""The shapes of features: one length for all batches, so that a step is compiled once."""

from collections.abc import Iterable, Mapping

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.padding import padded_length
from dopsd_jax.data.prepared import Prepared
from dopsd_jax.families.base import Features, PaddedLengths
from dopsd_jax.families.pipeline import Pipeline

ROWS = 32  # lengths are multiples of it; Z-Image itself pads its captions so


def padded_rows(
    shapes: Iterable[Mapping[str, tuple[int, ...]]],
    pipe: Pipeline,
    role: int,
    where: str = "config.data.path",
) -> PaddedLengths:
    """One padded length for all features of these shapes, for each name that varies.

    Raises `UserError` for features that are longer than the model takes; they come from `where`.
    """
    limits, most = pipe.limits(role), {}
    for found in shapes:
        for name in limits.keys() & found.keys():
            most[name] = max(most.get(name, 1), found[name][0])
    for name, rows in most.items():
        if rows > limits[name].shape[0]:
            raise UserError(
                f"{where}: holds captions of {rows} tokens, the model takes "
                f"{limits[name].shape[0]}; leave them out"
            )
    return {name: padded_length(n, ROWS, limits[name].shape[0]) for name, n in most.items()}


def shapes_of(features: Features) -> dict[str, tuple[int, ...]]:
    """Shapes by name, as `padded_rows` takes them."""
    return {name: array.shape for name, array in features.items()}


def longest(*lengths: PaddedLengths) -> PaddedLengths:
    """By name the largest of padded lengths: one length for all that they are of."""
    names = dict.fromkeys(name for own in lengths for name in own)
    return {name: max(own.get(name, 0) for own in lengths) for name in names}


def check_channels(prepared: Prepared, pipe: Pipeline, role: int) -> None:
    """Raises `UserError` unless a role's prepared features have the model's channels."""
    limits = pipe.limits(role)
    for shapes in prepared.shapes(role):
        wrong = [n for n, like in limits.items() if shapes.get(n, ())[1:] != like.shape[1:]]
        if wrong:
            name = wrong[0]
            have = shapes[name][1:] if name in shapes else "none"
            raise UserError(
                f"{prepared.folder}: its {name} have {have} channels, the model takes "
                f"{limits[name].shape[1:]}; prepare the data set with this model's encoder"
            )
