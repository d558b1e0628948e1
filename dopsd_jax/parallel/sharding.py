"""The mesh, what lies where on it, and how a host's batch gets there.

Mesh axes: `data` copies of everything, each with its own samples; `fsdp` splits samples and base
weights; `context` splits tokens; `tensor` splits heads and hidden units. Adapters, with teacher and
moments, are small and stand on every device; in full fine-tuning these are split as weights are.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dopsd_jax.common.errors import UserError, raise_if

Tree = Any
UNCONSTRAINED = PartitionSpec.UNCONSTRAINED

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
HOST = "pinned_host"  # jax's name for the memory of a device's host
_sample_axes = contextvars.ContextVar("sample_axes", default=BATCH_AXES)

# How the large kernels [..., in, out] of a network's blocks are split, by the ends of their paths.
# columns: out over tensor, in over fsdp; rows: in over tensor, out over fsdp; so fsdp splits the
# residual's width. Other kernels: fsdp splits the larger one of in and out. All else stays whole,
# and so does what a size does not divide.
_BLOCK_KERNELS: dict[str, str] = {}


def declare_block_kernels(*, columns: Sequence[str], rows: Sequence[str]) -> None:
    """States which linear layers of a network are large, and how `tensor` splits them.

    Names are ends of paths, such as `attention.qkv`. Every file of a network calls it once. These
    kernels, and no others, are also what a quantised base quantises.
    """
    for ends, tactic in ((columns, "columns"), (rows, "rows")):
        for end in ends:
            if _BLOCK_KERNELS.setdefault(end, tactic) != tactic:
                raise ValueError(f"{end} is declared as {_BLOCK_KERNELS[end]} already")


def block_kernel(path: str) -> str | None:
    """columns or rows, if the array at `path` is a declared kernel or the codes of one."""
    path = path.removesuffix(".codes")  # a quantised kernel's; its scales are few
    if not path.endswith(".kernel"):
        return None
    parts = path.split(".")[:-1]
    ends = (".".join(parts[start:]) for start in range(1, len(parts)))
    return next((_BLOCK_KERNELS[end] for end in ends if end in _BLOCK_KERNELS), None)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of config.mesh: a size for each of `AXES`, of which one may be -1, the rest.

    TPU slices that a slower network connects hold a part of the axis data each. Raises `UserError`
    if the sizes do not multiply to the number of devices (all, by default).
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(sizes, len(devices))
    tpu = devices[0].platform == "tpu"  # elsewhere the order of devices follows the network
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1
    if shape[0] % slices:
        raise UserError(
            f"config.mesh.data: is {shape[0]}, but there are {slices} TPU slices, each of which "
            "holds whole copies of the weights; make it a multiple"
        )
    # A torus of 16 x 16 has no side of 8: jax.make_mesh then refuses to split one.
    own = (shape[0] // slices, *shape[1:])
    if slices == 1:
        placed = mesh_utils.create_device_mesh(own, devices, allow_split_physical_axes=True)
    else:
        across = (slices,) + (1,) * len(shape[1:])
        placed = mesh_utils.create_hybrid_device_mesh(
            own, across, devices, allow_split_physical_axes=True
        )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """Size of each of `AXES`; see `make_mesh`."""
    sizes = {name: sizes[name] for name in sizes}
    faults = [
        f"config.mesh.{name}: there is no such axis; there are {', '.join(AXES)}"
        for name in sizes
        if name not in AXES
    ]
    for name in AXES:
        size = sizes.setdefault(name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
            faults.append(
                f"config.mesh.{name}: {size!r} is not a whole number of devices, or -1 for the rest"
            )
    raise_if(faults)
    open_axes = [name for name in AXES if sizes[name] == -1]
    if len(open_axes) > 1:
        raise UserError(
            f"config.mesh.{open_axes[1]}: only one axis can be -1, and {open_axes[0]} is already"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (not open_axes and fixed != devices):
        product = " x ".join(f"{name} {sizes[name]}" for name in AXES if sizes[name] != -1)
        raise UserError(
            f"config.mesh: {product} = {fixed} does not "
            f"{'divide' if open_axes else 'equal'} the {devices} devices there are; "
            "set one axis to -1 to let it fill up"
        )
    return tuple(devices // fixed if sizes[name] == -1 else sizes[name] for name in AXES)


class NetworkSizes(Protocol):
    """What of a network's sizes a mesh must divide: see `check`."""

    dim: int
    heads: int
    hidden_dim: int
    token_multiple: int


def check(mesh: Mesh, network: NetworkSizes, *, batch_size: int) -> None:
    """Raises `UserError` with everything that the mesh cannot split evenly.

    `network`: sizes of the network that is trained: width, attention heads, feed-forward width, and
    what its numbers of tokens are multiples of. `batch_size`: samples of one micro-batch, over all
    devices.
    """
    rows, tensor = sample_devices(mesh), mesh.shape["tensor"]
    heads, hidden, faults = network.heads, network.hidden_dim, []
    if batch_size % rows:
        faults.append(
            f"config.batch_size: {batch_size} images cannot be spread over mesh.data "
            f"{mesh.shape['data']} x mesh.fsdp {mesh.shape['fsdp']} devices; use a multiple of "
            f"{rows}"
        )
    if heads % tensor or hidden % tensor:
        fits = [n for n in range(1, heads + 1) if heads % n == 0 and hidden % n == 0]
        faults.append(
            f"config.mesh.tensor: {tensor} does not divide the network's {heads} heads and {hidden}"
            f" hidden units; it can be {', '.join(map(str, fits))}"
        )
    for axis, what, size in (
        ("fsdp", "the network's width", network.dim),
        ("context", "the numbers of tokens, all multiples of", network.token_multiple),
    ):
        if size % mesh.shape[axis]:
            fits = [n for n in range(1, min(size, mesh.size) + 1) if size % n == 0]
            faults.append(
                f"config.mesh.{axis}: {mesh.shape[axis]} does not divide {what} {size}; it can be "
                f"{', '.join(map(str, fits))}"
            )
    raise_if(faults)


def axes_dividing(mesh, axes: Sequence[str], size: int) -> tuple[str, ...] | None:
    """The first few of `axes` whose devices divide `size` evenly; None if that is one device."""
    used = []
    for axis in axes:
        if size % (math.prod(mesh.shape[a] for a in used) * mesh.shape[axis]):
            break
        used.append(axis)
    return tuple(used) if math.prod(mesh.shape[a] for a in used) > 1 else None


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the array at `path` (joined by dots) is split; see `declare_block_kernels`."""
    # Adafactor keeps a row and a column for each kernel, under the kernel's name: they stay whole.
    factored = ".v_row." in path or ".v_col." in path
    tactic = block_kernel(path)
    if factored or len(shape) < 2 or not (tactic or path.endswith(".kernel")):
        return PartitionSpec()
    orders = {"columns": ("fsdp", "tensor"), "rows": ("tensor", "fsdp")}
    order = orders.get(tactic) or (("fsdp", None) if shape[-2] > shape[-1] else (None, "fsdp"))
    split = [
        axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(order, shape[-2:], strict=True)
    ]
    return PartitionSpec(*(None,) * (len(shape) - 2), *split)


def base_sharding(
    path: str, shape: tuple[int, ...], mesh: Mesh, away: bool = False
) -> NamedSharding:
    """Where a parameter of the network lies; `away`: stacks of layers in the host's memory.

    Only of kernels, [layers, in, out]: all else is small, or is used outside the loops over layers,
    which fetch what is away.
    """
    place = NamedSharding(mesh, parameter_spec(path, shape, mesh))
    stacked = len(shape) > 2 and path.endswith(".kernel")
    return place.with_memory_kind(HOST) if away and stacked else place


def state_shardings(state: Tree, mesh: Mesh, away: bool = False) -> Tree:
    """A sharding for every array of `state`, in its own structure; see `parameter_spec`.

    `state`: a `TrainState` or any tree of parameters, moments or shapes of these; an array is known
    by the end of its path, so a moment is split as the parameter whose name it bears. `away`: see
    `base_sharding`; only for a base.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        return base_sharding(name, leaf.shape, mesh, away)

    return jax.tree_util.tree_map_with_path(place, state)


def to_device(tree: Tree) -> Tree:
    """Inside a compiled function: arrays that lie in the host's memory brought to the device's."""

    def fetch(x):
        away = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if away else x

    return jax.tree.map(fetch, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [micro-batches, samples, ...]: samples over the axes data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def sample_devices(mesh: Mesh | AbstractMesh | None) -> int:
    """Devices that the samples of a micro-batch are spread over; it must be a multiple of them."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def own_samples(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which samples of a micro-batch lie on this process's devices; sorted.

    Processes that share the same samples, split by tokens or heads, all have these samples.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((1, batch_size)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index[1]] for index in indices]))


def put_batch(batch: Tree, mesh: Mesh, batch_size: int | None = None) -> Tree:
    """A batch of host arrays on the mesh.

    `batch`: arrays [micro-batches, samples of this process, ...], those of `own_samples`.
    `batch_size`: samples of a micro-batch over all processes; by default this one has all. Every
    process calls it.
    """
    sharding = batch_sharding(mesh)

    def put(x):
        x = np.asarray(x)
        size = x.shape[1] if batch_size is None else batch_size
        places = own_samples(mesh, size)

        def piece(index):
            wanted = np.arange(size)[index[1]]
            return x[(index[0], np.searchsorted(places, wanted), *index[2:])]

        return jax.make_array_from_callback((x.shape[0], size, *x.shape[2:]), sharding, piece)

    return jax.tree.map(put, batch)


@contextlib.contextmanager
def spread_samples(mesh: Mesh | None, samples: Tree) -> Iterator[Tree]:
    """A block on `mesh`, with `samples` on it: split over data and fsdp, where these divide them.

    `samples`: arrays [samples, ...], in every process all of them. Every process calls it. Without
    a mesh, and on one of one device, nothing changes.
    """
    if mesh is None or mesh.size == 1:
        yield samples
        return

    def put(x):
        x = np.asarray(x)
        place = NamedSharding(mesh, PartitionSpec(axes_dividing(mesh, BATCH_AXES, len(x))))
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    with jax.set_mesh(mesh):
        yield jax.tree.map(put, samples)


def constrain_batch(x: Array, *rest: Any) -> Array:
    """States that x [samples, ...] is split by samples, and how along its other axes.

    `rest`: for each further axis the mesh axis that it is split over where that divides it, None
    for whole, or `UNCONSTRAINED`: the compiler's choice; axes that are not named are whole.
    The compiler chooses placements by itself. At the borders between modules we state them;
    otherwise it may gather activations where it could gather weights. Without a mesh it does
    nothing.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return x
    axes = sample_axes()
    samples = axes_dividing(mesh, axes, x.shape[0])
    rest += (None,) * (x.ndim - 1 - len(rest))
    # Inside `per_shard` it is not skipped: there each shard's samples must stay on its devices.
    if axes and samples is None and all(axis is UNCONSTRAINED for axis in rest):
        return x
    split = lambda axis, size: axes_dividing(mesh, (axis,), size) if axis in AXES else axis
    spec = PartitionSpec(samples, *map(split, rest, x.shape[1:]))
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_weights(module: Tree) -> Tree:
    """States that the weights of one layer lie as `parameter_spec` says.

    Inside a loop over layers this keeps the others' weights split while one is gathered; and the
    gradient of a weight, which lies as the weight, is scattered at once. A weight that is whole
    everywhere is left alone: what is stated of it would be a new array, and a backward pass that
    recomputes nothing would keep it, one more copy of the base.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return module

    def constrain(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        spec = parameter_spec(f".{name}", leaf.shape, mesh)
        return jax.lax.with_sharding_constraint(leaf, spec) if any(spec) else leaf

    return jax.tree_util.tree_map_with_path(constrain, module)


def ambient_mesh():
    """The mesh of `jax.set_mesh`; None without one, on one device, and inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def axis_size(axis: str) -> int:
    """Devices along an axis of the ambient mesh; 1 without one."""
    mesh = ambient_mesh()
    return 1 if mesh is None else mesh.shape[axis]


def sample_axes() -> tuple[str, ...]:
    """The mesh axes that samples may be spread over here: none inside `per_shard`."""
    return _sample_axes.get()


def per_shard(method: Callable[..., tuple[Tree, Tree]], split: Sequence[bool]) -> Callable:
    """`method(*args) -> (losses, gradient)` of a batch, taken by every device's own samples.

    The results are means over samples, so the mean over devices is the same; but the gradient is
    summed over devices once, at the end and in its own type, and not wherever a loop inside the
    method adds to it. For gradients that are whole on every device: adapters'.
    `split`: which arguments have samples [samples, ...]; the others are the same everywhere.
    """

    def call(*args):
        mesh = ambient_mesh()
        shards = sample_devices(mesh)
        if shards == 1:
            return method(*args)
        cut = lambda x: jax.lax.with_sharding_constraint(
            x.reshape(shards, -1, *x.shape[1:]), PartitionSpec(BATCH_AXES)
        )
        args = [
            jax.tree.map(cut, arg) if is_split else arg
            for arg, is_split in zip(args, split, strict=True)
        ]
        token = _sample_axes.set(())
        try:
            axes = tuple(0 if is_split else None for is_split in split)
            results = jax.vmap(method, axes, spmd_axis_name=BATCH_AXES)(*args)
        finally:
            _sample_axes.reset(token)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), results)

    return call


def gather_weights(x: Array) -> Array:
    """States that a weight that fsdp splits is whole here, so that it is sent as it is stored.

    Without it the compiler may turn 8-bit codes into bfloat16 first and send twice the bytes. Which
    part a device needs under `tensor` is left to the compiler. Without a mesh it does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.shape["fsdp"] == 1 or mesh.shape["tensor"] > 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(None,) * x.ndim))


def whole_bytes(tree: Tree) -> int:
    """Bytes of `tree`'s arrays, unsplit; arrays of 4 bits take half a byte."""
    return sum(x.size * jax.dtypes.itemsize_bits(x.dtype) // 8 for x in jax.tree.leaves(tree))


def abstract(tree: Tree, shardings: Tree | None = None) -> Tree:
    """Shapes, types and shardings of `tree`'s arrays; `shardings`: others than their own."""
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
