"""The training loop that all stages share: gradients, average, saving, resuming.

A loss is a function of (parameters, batch, a key for each sample). Every step takes a batch of each
kind that the family has, in micro-batches that are spread over the devices.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dopsd_jax.miniature import optimizer, pool
from dopsd_jax.miniature.families import Batch, Family
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.saved import load_tree, save_tree

MICRO = 8  # samples that a device computes at once: more do not fit the caches of a CPU
AVERAGE = 0.998  # decay of the moving average of the weights
SAVE_SECONDS = 240
PROBE_SAVES = 3  # saves between measurements

Loss = Callable[[Parameters, Batch, jax.Array], jax.Array]


class State(NamedTuple):
    """What a run is continued from."""

    parameters: Parameters
    average: Parameters
    moments: optax.OptState


class Stage(NamedTuple):
    """One part of the training: `steps` steps of `texts` captions alone and `images` with images.

    start: what it begins with. shown: what is measured and handed on of the averaged parameters.
    average: decay of the average; 0: the last parameters.
    """

    name: str
    steps: int
    loss: Loss
    tx: optax.GradientTransformation
    start: Parameters
    texts: int
    images: int
    shown: Callable[[Parameters], Parameters] = lambda parameters: parameters
    average: float = AVERAGE


class Source(NamedTuple):
    """Where batches come from: a family, a seed, the tokenizer's rows, and pictures -> latents."""

    family: Family
    seed: int
    texts: pool.Texts
    encode: Callable


def first_state(parameters: Parameters, tx: optax.GradientTransformation) -> State:
    """A run's first state; `parameters` stay the caller's: the step donates what it is given."""
    copy = lambda: jax.tree.map(jnp.copy, parameters)
    return State(copy(), copy(), tx.init(parameters))


def step_function(
    loss: Loss,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    weights: Sequence[float],
    decay: float = AVERAGE,
):
    """(state, step number, a batch for each of `weights`, key) -> state, losses.

    What it computes does not depend on the number of devices, but for rounding.
    """

    def accumulated(parameters, batch, keys):  # on one device
        micro = jax.tree.map(lambda a: a.reshape(-1, min(MICRO, len(keys)), *a.shape[1:]), batch)
        keys = keys.reshape(-1, min(MICRO, len(keys)))

        def body(carry, item):
            found = jax.value_and_grad(loss)(parameters, *item)
            return jax.tree.map(lambda c, f: c + f / len(keys), carry, found), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
        return jax.lax.scan(body, zero, (micro, keys))[0]

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    def mean_gradients(parameters, pairs):
        return jax.lax.pmean([accumulated(parameters, *pair) for pair in pairs], "data")

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, number, batches, key):
        keys = jax.random.split(key, len(weights))
        pairs = [
            (batch, jax.random.split(k, len(batch.latents)))
            for batch, k in zip(batches, keys, strict=True)
        ]
        losses, gradients = zip(*mean_gradients(state.parameters, pairs), strict=True)
        weighted = lambda *parts: sum(w * part for w, part in zip(weights, parts, strict=True))
        gradient = jax.tree.map(weighted, *gradients)
        updates, moments = tx.update(gradient, state.moments, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        rate = optimizer.decay_at(number, decay)
        average = optimizer.averaged(state.average, parameters, rate)
        return State(parameters, average, moments), losses

    return step


def run(
    path: Path,
    stage: Stage,
    source: Source,
    probe: Callable[[Parameters, int], None],
    log: Callable[[str], None],
) -> Parameters:
    """Trains a stage, from the state in the file `path` if it is there; returns the average.

    `probe` is called with what is shown of it now and then, and at the end.
    """
    state, begin, steps = first_state(stage.start, stage.tx), 0, stage.steps
    if path.exists():
        state, about = load_tree(path, state)
        begin = about["step"]
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    state = jax.device_put(state, NamedSharding(mesh, P()))  # as the step returns it
    family, scenes, losses, saves = source.family, None, [], 0
    weights = tuple(family.kinds.values())
    step = step_function(stage.loss, stage.tx, mesh, weights, stage.average)
    saved = started = time.monotonic()
    for number in range(begin, steps):
        if scenes is None or number % pool.POOL_STEPS == 0:
            scenes = family.scenes(source.seed, number // pool.POOL_STEPS, source.encode)
        key = jax.random.fold_in(jax.random.key(source.seed), number)
        rng = np.random.default_rng([source.seed, 2, number])
        batches = family.batches(scenes, source.texts, rng, stage.texts, stage.images)
        state, found = step(state, number, batches, key)
        losses.append(found)
        last = number + 1 == steps
        if time.monotonic() - saved > SAVE_SECONDS or last:
            save_tree(path, state, {"step": number + 1})
            means = zip(np.mean(losses, axis=0), family.kinds, strict=True)
            seconds = (time.monotonic() - started) / (number + 1 - begin)
            log(
                f"{stage.name} {number + 1}/{steps}: loss "
                + ", ".join(f"{value:.4f} {kind}" for value, kind in means)
                + f"; {seconds:.2f} s a step, {seconds * (steps - number - 1) / 60:.0f} min left"
            )
            if saves % PROBE_SAVES == 0 or last:
                probe(stage.shown(_unbound(state.average)), number + 1)
            losses, saved, saves = [], time.monotonic(), saves + 1
    return stage.shown(_unbound(state.average))


def _unbound(parameters: Parameters) -> Parameters:
    """The same arrays, of no mesh: what uses them need not run on all devices."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), parameters)
