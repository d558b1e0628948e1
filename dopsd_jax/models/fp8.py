"""Products of operands rounded to 8-bit floats, for forward passes that no gradient goes through.

Both operands are rounded to float8_e4m3fn, with a scale for each row of the input (a token) and for
each output of the kernel; the sums, in float32, are multiplied by both. So what a token gives
depends on no other token, sample or device. `layers.Dense` says what is never rounded.

XLA makes a cuBLASLt product of a dot of such operands from compute capability 8.9 on
(GemmRewriter). Of the forms that it knows this is the bare one, codes without scales: with scales
it knows only one number an operand, which would tie the tokens of a batch together. Ours follow the
dot, in the loop that XLA makes of what comes next. The kernel must lie with its inputs fastest; XLA
turns the codes, in one byte a weight.
"""

import re

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from dopsd_jax.common.errors import UserError

TYPE = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(TYPE).max)  # 448
LEAST = float(jnp.finfo(jnp.float32).tiny)  # of a scale: a row of zeros is divided by it
TPUS = r"TPU ?7|TPU v7"  # TPUs that multiply 8-bit floats, by jax's `device_kind`
CAPABILITY = 8.9  # of NVIDIA's GPUs that do: Ada, Hopper and later


def rounded(x: Float[Array, "..."], axis: int) -> tuple[Array, Float[Array, "..."]]:
    """Codes of x's shape, and their float32 scales, one for what lies along `axis`.

    Rounded to nearest; the largest number of each scale becomes 448, the largest code.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scale = jnp.maximum(largest / LARGEST, LEAST)
    return (x / scale).astype(TYPE), jnp.squeeze(scale, axis)


def product(
    x: Float[Array, "... din"], codes: Float[Array, "din dout"], scales: Float[Array, " dout"]
) -> Float[Array, "... dout"]:
    """x W in x's type; codes and scales: of W, see `rounded`."""
    rows, factors = rounded(x, -1)
    # Left alone, Hopper sums in fewer bits than float32.
    y = jax.lax.dot_general(
        rows, codes, (((x.ndim - 1,), (0,)), ((), ())), Precision.HIGHEST, x.dtype
    )
    return (y.astype(jnp.float32) * factors[..., None] * scales).astype(x.dtype)


def check_device(platform: str, kind: str, capability: str = "") -> None:
    """Raises `UserError` for a device that has no such products, and would only lose accuracy.

    platform, kind: as jax's `platform` and `device_kind`. capability: of a GPU of NVIDIA, such as
    8.9; empty: unknown, and then it is not refused. A CPU may: it multiplies the rounded numbers in
    float32, so the error can be seen there.
    """
    numbered = platform == "gpu" and re.fullmatch(r"\d+\.\d+", capability)
    lacks = ""
    if platform == "tpu" and not re.search(TPUS, kind):
        lacks = f"a TPU7x, and this is a {kind}"
    elif numbered and float(capability) < CAPABILITY:
        lacks = (
            f"a GPU of compute capability {CAPABILITY} or more, and this {kind} has {capability}"
        )
    if lacks:
        raise UserError(f"config.teacher.products: fp8 needs {lacks}; set it to dtype")
