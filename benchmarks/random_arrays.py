"""Random weights and batches for abstract trees, made where they will lie.

Making them needs little more memory than they have: the benchmarks measure how much a step needs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax.parallel.sharding import HOST

CODE = 7  # quantised kernels: codes from 1 to this, which 4 bits hold
SCALE = 0.005  # of a quantised kernel


def weights(like: nnx.State) -> nnx.State:
    """Weights of about unit gain. The layers of a stack have the same ones."""
    flat = {
        path: leaf.replace(_weight(str(path[-1]), leaf, number))
        for number, (path, leaf) in enumerate(nnx.to_flat_state(like))
    }
    return nnx.from_flat_state(flat)


def _weight(kind: str, leaf, number: int) -> jax.Array:
    shape, dtype = leaf.shape, leaf.dtype
    layer = shape[1:] if len(shape) > 2 else shape

    def one() -> jax.Array:
        key = jax.random.key(number)
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.randint(key, layer, 1, CODE + 1).astype(dtype)
        if kind == "scale":
            return jnp.ones(layer, dtype)
        gain = {"bias": 0.5, "scales": SCALE}.get(kind) or layer[-2] ** -0.5
        return (gain * jax.random.normal(key, layer)).astype(dtype)

    if leaf.sharding.memory_kind == HOST:  # never whole on the device
        return jax.device_put(np.broadcast_to(jax.jit(one)(), shape), leaf.sharding)
    return jax.jit(lambda: jnp.broadcast_to(one(), shape), out_shardings=leaf.sharding)()


def batch(like):
    """A batch, or contexts: unit noise; captions fill their rows."""
    rng = np.random.default_rng(0)

    def fill(leaf) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return np.ones(leaf.shape, leaf.dtype)
        return rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)

    has_lengths = lambda tree: hasattr(tree, "lengths")

    def filled(tree):
        if not has_lengths(tree):
            return tree
        rows = np.full_like(tree.lengths, tree.features.shape[-2])
        return tree._replace(lengths=rows)

    made = jax.tree.map(filled, jax.tree.map(fill, like), is_leaf=has_lengths)
    return jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), made, like)
