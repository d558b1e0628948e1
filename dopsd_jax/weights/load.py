"""Fills a network's parameters on devices, one layer at a time, from any form of stored weights."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax.models import quantised
from dopsd_jax.models.names import Leaf
from dopsd_jax.parallel.sharding import HOST
from dopsd_jax.weights.device_stack import DeviceStacks, Kind
from dopsd_jax.weights.host_stack import HostStack
from dopsd_jax.weights.networks import Network
from dopsd_jax.weights.stored import ConvertedTensors, Stored, host_leaf, open_stored

ShardingFor = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
TypeFor = Callable[[str], Any]


def load_component(
    folder: str | Path,
    network: Network,
    *,
    dtype: Any | TypeFor = None,
    scheme: str | None = None,
    sharding_for: ShardingFor | None = None,
    build: Callable[[Any, nnx.Rngs], nnx.Module] | None = None,
    room: str = "",
) -> nnx.Module:
    """The network with the weights of a Hugging Face component folder or of a converted one.

    Args:
      folder: the component's folder.
      network: what is in it.
      dtype: type of the parameters, or a function of a parameter's path; None is the stored one.
      scheme: quantise the large kernels while they are read (`quantised.SCHEMES`), from the stored
        type; `dtype` is for the others. Neither host nor device holds more than one whole kernel.
      sharding_for: path and whole shape of a parameter -> its sharding; None: all on one device.
        A stack of layers may lie in the host's memory: only single layers then pass a device.
      build: makes the module from the network's config; None is `network.build`.
      room: load only the parameters below this attribute (`vision`); `build` makes what is there.

    Raises `UserError` when the folder does not hold exactly this network.
    """
    stored = open_stored(Path(folder), network)
    return load_stored(
        stored,
        build or network.build,
        dtype=dtype,
        scheme=scheme,
        sharding_for=sharding_for,
        room=room,
    )


def load_stored(
    stored: Stored,
    build: Callable[[Any, nnx.Rngs], nnx.Module],
    *,
    dtype: Any | TypeFor = None,
    scheme: str | None = None,
    sharding_for: ShardingFor | None = None,
    room: str = "",
) -> nnx.Module:
    """`load_component` for weights that are open already."""
    make = lambda: build(stored.config, nnx.Rngs(0))
    prefix = f"{room}." if room else ""
    leaves = [leaf for leaf in stored.leaves if leaf.path.startswith(prefix)]
    graphdef, state = nnx.split(nnx.eval_shape(make))
    _check(_slots(state, prefix), leaves, stored.tensors.where)
    if scheme is not None:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: quantised.quantised(make(), scheme)))
    slots = _slots(state, prefix)
    type_for = dtype if callable(dtype) and not isinstance(dtype, type) else lambda path: dtype
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = sharding_for or (lambda path, shape: one_device)
    shardings = {p: place(p.removeprefix(prefix), tuple(v.shape)) for p, v in slots.items()}
    arrays: dict[str, jax.Array] = {}
    away: dict[str, HostStack] = {}  # unfinished
    stacks = DeviceStacks(leaves)
    for leaf, row in _rows(stored, leaves, shardings):
        if leaf.path in slots:
            kind = type_for(leaf.path.removeprefix(prefix)) or row.dtype
            pieces = {leaf.path: (row, jnp.dtype(kind))}
        else:
            pieces = _quantise(scheme)(row)
            pieces = {f"{leaf.path}.{name}": (p, p.dtype) for name, p in pieces.items()}
        rows = {}
        for path, (piece, kind) in pieces.items():
            sharding, shape = shardings[path], tuple(slots[path].shape)
            if leaf.index is None:
                arrays[path] = jax.device_put(piece.astype(kind), sharding)
            elif sharding.memory_kind == HOST:
                stack = away.setdefault(path, HostStack(shape, sharding))
                if stack.put(piece.astype(kind), leaf.index):
                    arrays[path] = away.pop(path).array()
            else:
                rows[path] = piece, Kind(shape, kind, sharding)
        if leaf.index is not None:
            stacks.put(leaf, rows)
    arrays |= stacks.arrays
    filled = {
        path: var.replace(arrays[prefix + ".".join(map(str, path))])
        for path, var in nnx.to_flat_state(state)
    }
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _slots(state: nnx.State, prefix: str) -> dict[str, Any]:
    return {prefix + ".".join(map(str, path)): var for path, var in nnx.to_flat_state(state)}


def _check(slots: Mapping[str, Any], leaves: list[Leaf], where: str) -> None:
    """The table of names against the module: both are ours, a mismatch is a bug, not a bad file."""
    covered: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        covered.setdefault(leaf.path, []).append(leaf)
    faults = [f"{p}: no entry in the table of names" for p in slots.keys() - covered.keys()]
    faults += [f"{p}: not in the module" for p in covered.keys() - slots.keys()]
    for path in slots.keys() & covered.keys():
        indices = [leaf.index for leaf in covered[path]]
        lead = () if indices == [None] else (len(indices),)
        if lead and sorted(indices) != list(range(len(indices))):
            faults.append(f"{path}: layers {indices}")
        if (*lead, *covered[path][0].shape) != tuple(slots[path].shape):
            faults.append(f"{path}: {lead} {covered[path][0].shape}, module {slots[path].shape}")
    if faults:
        raise ValueError(f"{where}: " + "\n".join(sorted(faults)))


def _rows(stored: Stored, leaves: list[Leaf], shardings) -> Iterator[tuple[Leaf, jax.Array]]:
    """Every leaf on devices, in the stored type, with the sharding of one layer."""
    if isinstance(stored.tensors, ConvertedTensors):
        leaves = sorted(leaves, key=stored.tensors.home)
    for leaf in leaves:
        path = leaf.path if leaf.path in shardings else f"{leaf.path}.codes"
        host = host_leaf(leaf, stored.tensors)
        yield leaf, _put(host, _row_sharding(shardings[path], leaf))


def _put(host: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    # The callback form: each process hands over its own slices, on any mesh.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _row_sharding(sharding: jax.sharding.Sharding, leaf: Leaf) -> jax.sharding.Sharding:
    if leaf.index is None or not isinstance(sharding, jax.NamedSharding):
        return sharding
    return jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))


@functools.cache
def _quantise(scheme: str):
    return jax.jit(lambda kernel: quantised.quantise_kernel(kernel, scheme))
