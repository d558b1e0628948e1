"""Makes the shapes in annotations true: calls that break one fail while the tests run."""

import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype


def shapes(function: Callable) -> Callable:
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
