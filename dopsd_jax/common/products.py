"""Matrix products as exact as the type of what they multiply says, on every device.

Left alone, a TPU rounds the operands of a float32 product to bfloat16, and a GPU to TensorFloat-32.
"""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array


def precision(*operands: Array) -> Precision | None:
    """What a product of these asks for. Other types than float32 are multiplied as they are."""
    exact = jnp.result_type(*operands) == jnp.float32
    return Precision.HIGHEST if exact else None


def matmul(x: Array, y: Array) -> Array:
    """x @ y."""
    return jnp.matmul(x, y, precision=precision(x, y))


def einsum(equation: str, x: Array, y: Array, to: jax.typing.DTypeLike | None = None) -> Array:
    """The product of two; `to`: the type of the sums and of the result."""
    return jnp.einsum(equation, x, y, precision=precision(x, y), preferred_element_type=to)
