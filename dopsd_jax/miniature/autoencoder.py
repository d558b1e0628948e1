"""Trains a miniature's autoencoder: a small network, three quarters of an hour of a CPU core."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dopsd_jax.miniature import optimizer, pool
from dopsd_jax.miniature.saved import load_tree, save_tree
from dopsd_jax.models.autoencoder import Autoencoder, from_uint8

BATCH = 8
MUON_RATE, ADAM_RATE = 0.015, 2e-3
EDGES = 0.5  # weight of the error of differences between neighbours: without it edges are soft
KL = 1e-4  # weight of the divergence of the posterior: latents stay of unit size and smooth
SAVE_SECONDS = 120


def loss(
    model: Autoencoder, images: UInt8[Array, "b H W 3"], key: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Reconstruction, of values and of edges, and divergence; and the squared error alone."""
    x = from_uint8(images)
    mean, logvar = model.encode(x)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    error = model.decode(z) - x
    squared = jnp.mean(error**2)
    edges = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2))
    divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
    return squared + jnp.mean(jnp.abs(error)) + EDGES * edges + KL * divergence, squared


def train(
    folder: Path,
    build: Callable[[], Autoencoder],
    seed: int,
    steps: int,
    log: Callable[[str], None],
) -> Autoencoder:
    """Trains what `build` makes to `steps`, from the last state saved in `folder` if there is one.

    Returns the averaged network.
    """
    _, parameters = optimizer.flat(build())
    module = nnx.eval_shape(build)
    tx = optimizer.muon(MUON_RATE, ADAM_RATE, steps, cooldown=0.4)
    state = (parameters, jax.tree.map(jnp.copy, parameters), tx.init(parameters))
    path, start = folder / "autoencoder.safetensors", 0
    if path.exists():
        state, about = load_tree(path, state)
        start = about["step"]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, images, key, number):
        parameters, average, moments = state
        value = lambda p: loss(optimizer.merge(module, p), images, key)
        (_, squared), gradient = jax.value_and_grad(value, has_aux=True)(parameters)
        updates, moments = tx.update(gradient, moments, parameters)
        parameters = optax.apply_updates(parameters, updates)
        decay = optimizer.decay_at(number, 0.995)
        average = optimizer.averaged(average, parameters, decay)
        return (parameters, average, moments), squared

    begin, saved, recent = time.monotonic(), time.monotonic(), []
    for i in range(start, steps):
        images = pool.plain_pictures(seed, i, BATCH)
        state, squared = step(state, images, jax.random.fold_in(jax.random.key(seed), i), i)
        recent.append(squared)
        last = i + 1 == steps
        if time.monotonic() - saved > SAVE_SECONDS or last:
            error = float(np.mean(recent))
            left = (time.monotonic() - begin) / (i + 1 - start) * (steps - i - 1)
            log(f"autoencoder {i + 1}/{steps}: squared error {error:.5f}, {left / 60:.0f} min left")
            save_tree(path, state, {"step": i + 1})
            saved, recent = time.monotonic(), []
    return optimizer.merge(module, state[1])


def posterior_means(model: Autoencoder, seed: int) -> Float[Array, "b h w z"]:
    """What the network encodes pictures of the world as, before they are normalized."""
    images = pool.plain_pictures(seed, -1 % 2**31, 256)
    return jax.jit(lambda m, x: m.encode(from_uint8(x))[0])(model, images)
