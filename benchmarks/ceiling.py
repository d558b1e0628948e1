"""The rate of one large product in bfloat16: what a step is measured against.

python benchmarks/ceiling.py [--side=8192]
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags

from dopsd_jax.common import program

SIDE = flags.DEFINE_integer("side", 8192, "of the square matrices", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 20, "times", lower_bound=1)
IN_A_ROW = 20  # products that are started together: starting one takes time too


def main() -> None:
    a, b = (jax.random.normal(jax.random.key(i), (SIDE.value,) * 2, jnp.bfloat16) for i in (0, 1))
    product, seconds = jax.jit(jnp.matmul), []
    for _ in range(5 + REPEATS.value):
        begin = time.perf_counter()
        jax.block_until_ready([product(a, b) for _ in range(IN_A_ROW)])
        seconds.append((time.perf_counter() - begin) / IN_A_ROW)
    rate = 2 * SIDE.value**3 / statistics.median(seconds[5:])
    print(f"{rate / 1e12:.1f} TFLOP/s")
    print("result: " + json.dumps({"device": jax.devices()[0].device_kind, "rate": rate}))


if __name__ == "__main__":
    program.run(main)
