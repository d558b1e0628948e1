"""Puts arrays under PyTorch names into a module, all at once: for small models and tests."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax.models.names import Leaf, to_flax


def fill(
    module: nnx.Module, leaves: Sequence[Leaf], tensors: Mapping[str, np.ndarray]
) -> nnx.Module:
    """`module` with the tensors named by `leaves`, in their own type; the module may be abstract.

    Layers beyond what the module has are left out. Raises ValueError with every mismatch.
    """
    graphdef, state = nnx.split(module)
    paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
    flat = {".".join(map(str, path)): var for path, var in nnx.to_flat_state(state)}
    rows: dict[str, dict[int | None, np.ndarray]] = {}
    for leaf in leaves:
        rows.setdefault(leaf.path, {})[leaf.index] = to_flax(
            leaf, [tensors[s.name] for s in leaf.sources]
        )
    faults = [f"{p}: no tensor for it" for p in flat.keys() - rows.keys()]
    faults += [f"{p}: not in the module" for p in rows.keys() - flat.keys()]
    for path in flat.keys() & rows.keys():
        var, found = flat[path], rows[path]
        value = found[None] if None in found else np.stack([found[i] for i in range(var.shape[0])])
        if value.shape != var.shape:
            faults.append(f"{path}: shape {value.shape}, the module has {var.shape}")
        flat[path] = var.replace(jnp.asarray(value))
    if faults:
        raise ValueError("\n".join(sorted(faults)))
    state = nnx.from_flat_state({paths[p]: v for p, v in flat.items()})
    return nnx.merge(graphdef, state)
