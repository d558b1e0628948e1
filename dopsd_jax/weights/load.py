"""Fills a network's parameters on devices, one layer at a time, from any form of stored weights."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax.errors import UserError
from dopsd_jax.weights.names import Leaf
from dopsd_jax.weights.networks import Network
from dopsd_jax.weights.stored import ConvertedTensors, Stored, host_leaf, open_stored
from dopsd_jax.weights.tensors import contiguous

ShardingFor = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
TypeFor = Callable[[str], Any]


def load_component(
    folder: str | Path,
    network: Network,
    *,
    dtype: Any | TypeFor = None,
    sharding_for: ShardingFor | None = None,
    build: Callable[[Any, nnx.Rngs], nnx.Module] | None = None,
    room: str = "",
) -> nnx.Module:
    """The network with the weights of a Hugging Face component folder or of a converted one.

    Args:
      folder: the component's folder.
      network: what is in it.
      dtype: type of the parameters, or a function of a parameter's path; None is the stored one.
      sharding_for: path and whole shape of a parameter -> its sharding; None: all on one device.
      build: makes the module from the network's config; None is `network.build`.
      room: load only the parameters below this attribute (`vision`); `build` makes what is there.

    Raises `UserError` when the folder does not hold exactly this network.
    """
    stored = open_stored(Path(folder), network)
    return load_stored(
        stored, build or network.build, dtype=dtype, sharding_for=sharding_for, room=room
    )


def load_stored(
    stored: Stored,
    build: Callable[[Any, nnx.Rngs], nnx.Module],
    *,
    dtype: Any | TypeFor = None,
    sharding_for: ShardingFor | None = None,
    room: str = "",
) -> nnx.Module:
    """`load_component` for weights that are open already."""
    abstract = nnx.eval_shape(lambda: build(stored.config, nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    prefix = f"{room}." if room else ""
    slots = {prefix + ".".join(map(str, path)): var for path, var in flat}
    leaves = [leaf for leaf in stored.leaves if leaf.path.startswith(prefix)]
    _check(slots, leaves, stored.tensors.where)
    type_for = dtype if callable(dtype) and not isinstance(dtype, type) else lambda path: dtype
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = sharding_for or (lambda path, shape: one_device)
    shardings = {p: place(p.removeprefix(prefix), tuple(v.shape)) for p, v in slots.items()}
    arrays: dict[str, jax.Array] = {}
    for leaf, row in _rows(stored, leaves, shardings):
        target = jnp.dtype(type_for(leaf.path.removeprefix(prefix)) or row.dtype)
        if leaf.index is None:
            arrays[leaf.path] = row.astype(target)
            continue
        if leaf.path not in arrays:
            shape = tuple(slots[leaf.path].shape)
            arrays[leaf.path] = _empty(shape, target, shardings[leaf.path])()
        arrays[leaf.path] = _set_row(shardings[leaf.path])(arrays[leaf.path], row, leaf.index)
    filled = {path: var.replace(arrays[prefix + ".".join(map(str, path))]) for path, var in flat}
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


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
    rows = {leaf.path: _row_sharding(shardings[leaf.path], leaf) for leaf in leaves}
    if isinstance(stored.tensors, ConvertedTensors):
        wanted: dict[str, list[Leaf]] = {}
        for leaf in leaves:
            part, _ = stored.tensors.homes[leaf.sources[0].name]
            wanted.setdefault(part, []).append(leaf)
        for part, members in wanted.items():
            arrays = stored.tensors.restore(part, {m.path: rows[m.path] for m in members})
            for leaf in members:
                yield leaf, arrays.pop(leaf.path)
        return
    for leaf in leaves:
        host = contiguous(host_leaf(leaf, stored.tensors))
        if len({stored.tensors.infos[s.name].dtype for s in leaf.sources}) > 1:
            names = ", ".join(s.name for s in leaf.sources)
            raise UserError(
                f"{stored.tensors.where}: {names} are stored in different types but are one "
                "parameter here; convert the folder to one type (--dtype)"
            )
        yield leaf, _put(host, rows[leaf.path])


def _put(host: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    # The callback form: each process hands over its own slices, on any mesh.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _row_sharding(sharding: jax.sharding.Sharding, leaf: Leaf) -> jax.sharding.Sharding:
    if leaf.index is None or not isinstance(sharding, jax.NamedSharding):
        return sharding
    return jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))


@functools.cache
def _empty(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _set_row(sharding: jax.sharding.Sharding):
    def set_row(stack, row, index):
        return jax.lax.dynamic_update_index_in_dim(stack, row.astype(stack.dtype), index, 0)

    return jax.jit(set_row, donate_argnums=0, out_shardings=sharding)
