"""Makes the shapes in annotations true: a call that breaks one fails while the tests run."""

import contextlib
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jaxtyping
import numpy as np
from beartype import beartype


def check_shapes(*rooms: str) -> None:
    """Checks the annotations of rooms of the package that are not imported yet, in this process."""
    # What takes an array of JAX takes one of NumPy as well.
    jaxtyping.Array = jax.Array | np.ndarray
    names = [f"dopsd_jax.{room}" for room in rooms]
    jaxtyping.install_import_hook(names, "shape_checks.checked")


def checked(function: Callable) -> Callable:
    """Checks the arrays in a function's annotations, and no other annotation.

    Tests pass stand-ins for many a class, and a pipeline that a family brings is not one of ours.
    """
    hints = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(hint)))


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """A block in which a test may pass what the annotations forbid, to see it refused."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
