"""Parts that several networks share. Dimension names: b batch, n tokens, d width, h heads."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dopsd_jax.common.products import matmul
from dopsd_jax.models import fp8, kinds
from dopsd_jax.models.interleaved import Interleaved
from dopsd_jax.models.kept import POLICY, keep
from dopsd_jax.models.quantised import QuantisedKernel, is_quantised
from dopsd_jax.parallel.sharding import (
    UNCONSTRAINED,
    ambient_mesh,
    axis_size,
    constrain_batch,
    constrain_weights,
    to_device,
)


class Dense(nnx.Module):
    """y = x W (+ b) (+ what an adapter adds to each adapted part).

    Projections of one input are fused: with `dout=(d0, d1, d2)` the kernel is [din, d0 + d1 + d2],
    its columns interleaved (`outputs`), so that a device that has some of them has the same share
    of every part, whole heads if `groups` divides these. `din=(d0, d1)`: the inputs are parts in
    the same way (`inputs`). `fused_before`: the parts are of one PyTorch layer, with one adapter.
    `adapters.attach` fills `adapters`, keyed by the number of the layer, all of one kind; this
    class only calls their `updates`, or adds their `delta`s to the kernel where that is faster (see
    `adapters.base.Adapter`).
    The product runs in x's type, whatever the kernel is stored in; `quantised.quantised` may put a
    `QuantisedKernel` in its place. `rounds`: it is one of 8-bit floats instead, see `rounded`; bias
    and adapters are still added in x's type: their small changes would be lost in the kernel.
    """

    def __init__(
        self,
        din: int | tuple[int, ...],
        dout: int | tuple[int, ...],
        *,
        bias: bool = False,
        groups: int = 1,
        fused_before: bool = False,
        rngs: nnx.Rngs,
    ):
        order = lambda d: Interleaved((d,) if isinstance(d, int) else tuple(d), groups)
        self.inputs, self.outputs, self.fused_before = order(din), order(dout), fused_before
        rows, columns = sum(self.inputs.sizes), sum(self.outputs.sizes)
        init = jax.nn.initializers.normal(1 / math.sqrt(rows))
        self.kernel = nnx.Param(init(rngs.params(), (rows, columns)))
        self.bias = nnx.Param(jnp.zeros((columns,))) if bias else None
        self.adapters = nnx.Dict()
        self.rounds = False

    def __call__(self, x: Float[Array, "... din"]) -> Float[Array, "... dout"]:
        """The whole output. What takes its parts alone asks for `parts`: it need not be joined."""
        return self.outputs.join(self.parts(x))

    def parts(self, x: Float[Array, "... din"]) -> list[Float[Array, "... _part"]]:
        """The output of each part."""
        # XLA on a processor copies, turned, a gradient whose rows have two axes. On a mesh the two
        # are split over devices in different ways.
        rows = x if ambient_mesh() is not None else x.reshape(-1, x.shape[-1])
        return [keep(y.reshape(*x.shape[:-1], -1)) for y in self._applied(rows)]

    def _applied(self, x: Float[Array, "... din"]) -> list[Float[Array, "... _part"]]:
        free = (UNCONSTRAINED,) * (x.ndim - 1)
        merges = self._merges(x)
        if self.rounds:
            y = fp8.product(x, *self._rounded())
        elif isinstance(self.kernel, QuantisedKernel):
            y = self.kernel.apply(x)
        else:
            kernel = self.kernel[...].astype(x.dtype)
            y = matmul(x, kernel + self._adapter_delta() if merges else kernel)
        y = constrain_batch(y, *free)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        parts = self._cut(y)
        if merges or not len(self.adapters):
            return parts
        # Added after the cut: joined, the updates would be arrays of the whole output's size.
        for part, update in self._adapter_updates(x).items():
            parts[part] = constrain_batch(parts[part] + update, *free)
        return parts

    def _cut(self, y: Float[Array, "... dout"]) -> list[Float[Array, "... _part"]]:
        if len(self.outputs.sizes) == 1:
            return [y]
        devices = axis_size("tensor")
        if self.outputs.groups % devices:
            return self.outputs.split(y)
        return jax.lax.platform_dependent(
            y,
            tpu=lambda y: self.outputs.gathered(y, devices),
            default=self.outputs.split,
        )

    def _merges(self, x: Float[Array, "... din"]) -> bool:
        """Whether x meets the kernel with the adapters in it, and not each alone.

        One wide product then takes the place of many narrow ones, and a backward pass makes the
        whole kernel's gradient for that of the adapters.
        """
        # Other types and other platforms round W + delta to fewer bits: small changes are lost.
        exact = x.dtype == jnp.float32 and jax.default_backend() == "cpu"
        fit = exact and not self.rounds and not isinstance(self.kernel, QuantisedKernel)
        many = math.prod(x.shape[:-1]) >= x.shape[-1]  # a few rows are not worth a new kernel
        held = self.adapters.values()
        return bool(fit and many and held and all(adapter.is_wide for adapter in held))

    def _rounded(self) -> tuple[Array, Float[Array, " dout"]]:
        if isinstance(self.kernel, QuantisedKernel):
            return self.kernel.rounded()
        return fp8.rounded(self.kernel[...], 0)

    def _adapter_delta(self) -> Float[Array, "din dout"]:
        ordered = lambda adapter: self.inputs.ordered(adapter.delta(), axis=0)
        found = {layer: ordered(adapter) for layer, adapter in self.adapters.items()}
        if self.fused_before:
            return self.outputs.ordered(found["0"])
        empty = lambda size: jnp.zeros((sum(self.inputs.sizes), size))
        parts = enumerate(self.outputs.sizes)
        return self.outputs.join([found.get(str(i), empty(size)) for i, size in parts])

    def _adapter_updates(self, x: Float[Array, "... din"]) -> dict[int, Float[Array, "... _part"]]:
        """What is added to each part, by its number."""
        layers = sorted(self.adapters, key=int)
        held = [self.adapters[layer] for layer in layers]
        every = range(len(self.outputs.sizes))
        owned = [every] if self.fused_before else [[int(layer)] for layer in layers]
        sizes = [[self.outputs.sizes[i] for i in own] for own in owned]
        updates = type(held[0]).updates(held, x, sizes, self.inputs)
        return {
            i: y
            for own, found in zip(owned, updates, strict=True)
            for i, y in zip(own, found, strict=True)
        }


def rounded(graphdef: nnx.GraphDef, *states: nnx.State) -> nnx.GraphDef:
    """The graph of the same network whose large products are those of `fp8`: no gradient's.

    They are what `quantised.is_quantised` names. states: what the network was split into, arrays or
    shapes; the new graph takes the same ones.
    """
    network = nnx.merge(graphdef, *states)
    for path, layer in nnx.iter_graph(network):
        if isinstance(layer, Dense) and is_quantised(".".join(map(str, (*path, "kernel")))):
            layer.rounds = True
    return nnx.graphdef(network)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight; the mean square in float32, the product in x's type."""

    def __init__(self, dim: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,)))

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return repeated(self._normed, x, self.scale[...])

    def _normed(self, x: Float[Array, "... d"], scale: Float[Array, " d"]):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * scale.astype(x.dtype)


def gated(gate: Float[Array, "b n f"], up: Float[Array, "b n f"]) -> Float[Array, "b n f"]:
    """silu(gate) up, split by tokens and hidden units."""
    gate, up = (constrain_batch(y, "context", "tensor") for y in (gate, up))
    return repeated(lambda gate, up: jax.nn.silu(gate) * up, gate, up)


def repeated(function: Callable, x: Float[Array, "... d"], *rest: Array) -> Float[Array, "... d"]:
    """function(x, *rest), computed again for a backward pass, which then keeps what it reads alone.

    For what is cheap and would keep more: norms of a bfloat16 x are computed in float32, of twice
    the bytes, and a gate has three arrays between what it reads and what it gives. In float32 it is
    left as it is: such networks are small, and keeping the arrays is the faster way there.
    """
    if x.dtype == jnp.float32:
        return function(x, *rest)
    return jax.checkpoint(function, prevent_cse=False)(x, *rest)


class LayerNorm(nnx.Module):
    """Layer normalisation with weight and bias, computed in float32."""

    def __init__(self, dim: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.bias = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = normalize(x.astype(jnp.float32), self.eps)
        return (
            y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        ).astype(x.dtype)


def normalize(x: Float[Array, "... d"], eps: float) -> Float[Array, "... d"]:
    """Layer normalisation without weights."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def sinusoids(
    t: Float[Array, " b"], dim: int, max_period: float = 10000.0
) -> Float[Array, "b dim"]:
    """Time features in float32, cosines first, then sines."""
    half = dim // 2
    freqs = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` equal modules as one module whose parameters have a leading layer axis."""
    keys = jax.random.split(rngs.params(), count)
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def scan_blocks(apply: Callable, blocks: nnx.Module, x, remat: str = "none"):
    """x -> apply(block, x) for every layer of a stack, as one `lax.scan`.

    `remat`: `none` keeps every activation for the backward pass, `dots` keeps what `models.kept`
    says, `full` keeps one activation a layer and computes the rest again.
    `unrolled` is `none` without the scan: for a few small layers, where a scan loses more time on
    stacking activations than it saves in compilation.
    """

    def body(x, block):  # a stack in host memory is copied layer by layer
        return split_tokens(apply(constrain_weights(to_device(block)), x)), None

    if remat == kinds.UNROLLED:
        return _unrolled(body, split_tokens(x), blocks, 0, len(jax.tree.leaves(blocks)[0]))
    return jax.lax.scan(_rematerialized(body, remat), split_tokens(x), blocks)[0]


def scan_range(apply: Callable, blocks: nnx.Module, x, start: int, stop: int, remat: str = "none"):
    """x -> apply(block, x) for layers start ... stop - 1 of a stack, as one `lax.scan`.

    For forward passes that stop early: no layer's weights are copied out of the stack beforehand.
    (Under differentiation with respect to the weights it is wasteful; `scan_blocks` is not.)
    """

    def body(x, i):
        pick = lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
        block = constrain_weights(jax.tree.map(pick, blocks))
        return split_tokens(apply(block, x)), None

    x = split_tokens(x)
    if remat == kinds.UNROLLED:
        return _unrolled(
            lambda x, block: (split_tokens(apply(block, x)), None), x, blocks, start, stop
        )
    return jax.lax.scan(_rematerialized(body, remat), x, jnp.arange(start, stop))[0]


def _unrolled(body: Callable, x, blocks: nnx.Module, start: int, stop: int):
    for i in range(start, stop):
        x, _ = body(x, jax.tree.map(lambda a, i=i: a[i], blocks))
    return x


def split_tokens(x):
    """States that arrays [b, n, d] are split by samples and by tokens; see `constrain_batch`."""
    return jax.tree.map(lambda a: constrain_batch(a, *("context",) * (a.ndim == 3)), x)


def _rematerialized(body: Callable, remat: str) -> Callable:
    if remat == "none":
        return body
    if remat == "full":
        return jax.checkpoint(body, prevent_cse=False)
    if remat == "dots":
        return jax.checkpoint(body, policy=POLICY, prevent_cse=False)
    raise ValueError(f"remat is one of none, dots, full; got {remat!r}")
