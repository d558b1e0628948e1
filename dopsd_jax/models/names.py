"""How a Flax parameter is made of PyTorch tensors, and back.

Each network file has a function `names(config) -> list[Leaf]`: the whole correspondence, one entry
for each Flax parameter (and layer of it). Both directions only rearrange: exact in any type.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dopsd_jax.models.interleaved import Interleaved


@dataclasses.dataclass(frozen=True)
class Source:
    """One tensor of the PyTorch checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One Flax parameter, or one layer of a stacked one, and the PyTorch tensors it is made of.

    Attributes:
      path: attribute path in the nnx module, joined by dots, e.g. `layers.attention.qkv.kernel`.
      index: position along the leading layer axis; None for a parameter that is not stacked.
      sources: joined along their output axis (the first one in PyTorch) in this order.
      kind: `linear` [out, in] -> [in, out]; `conv` [out, in, kh, kw] -> [kh, kw, in, out];
        `patch` [out, c, ...] -> [c * ..., out], a convolution whose stride is its kernel;
        `same` as it is.
      groups: into how many blocks each part is cut; see `interleaved.Interleaved`.
      outputs: sizes of the parts of the output axis; () if they are the sources.
      inputs: sizes of the parts of the input axis of a `linear`; () if it is one part.
      low: no number of it may be below; None: any may.
    """

    path: str
    index: int | None
    sources: tuple[Source, ...]
    kind: str
    groups: int = 1
    outputs: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    low: float | None = None

    @property
    def output_order(self) -> Interleaved:
        sizes = tuple(math.prod(s.shape[:1]) for s in self.sources)
        return Interleaved(self.outputs or sizes, self.groups)

    @property
    def input_order(self) -> Interleaved:
        return Interleaved(self.inputs or (self.sources[0].shape[-1],), self.groups)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in Flax, without the layer axis."""
        first = self.sources[0].shape
        if self.kind == "same" and len(self.sources) == 1:
            return first  # also that of a single number
        out = sum(s.shape[0] for s in self.sources)
        if self.kind == "linear":
            return (first[1], out)
        if self.kind == "conv":
            return (first[2], first[3], first[1], out)
        if self.kind == "patch":
            return (math.prod(first[1:]), out)
        if self.kind == "same":
            return (out, *first[1:])
        raise ValueError(f"{self.path}: unknown kind {self.kind!r}")


def linear(path: str, index: int | None, *sources: tuple[str, int, int], **parts) -> Leaf:
    """Kernel of a (fused) linear layer; sources are (module name, out, in); `parts`: see `Leaf`."""
    tensors = tuple(Source(f"{n}.weight", (o, i)) for n, o, i in sources)
    return Leaf(path, index, tensors, "linear", **parts)


def vector(path: str, index: int | None, name: str, *shape: int, low: float | None = None) -> Leaf:
    """A parameter that is stored the same way on both sides; `name` is the whole tensor name."""
    return Leaf(path, index, (Source(name, tuple(shape)),), "same", low=low)


def to_flax(leaf: Leaf, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """The Flax array [*leaf.shape] made of the PyTorch tensors, in their type."""
    order = leaf.output_order
    joined = order.ordered(tensors[0], 0) if len(tensors) == 1 else order.join(tensors, 0)
    if leaf.kind == "linear":
        return leaf.input_order.ordered(joined, 1).T
    if leaf.kind == "conv":
        return joined.transpose(2, 3, 1, 0)
    if leaf.kind == "patch":
        return joined.reshape(joined.shape[0], -1).T
    return joined


def to_torch(leaf: Leaf, array: np.ndarray) -> list[np.ndarray]:
    """The PyTorch tensors, in the order of `leaf.sources`: the inverse of `to_flax`."""
    if leaf.kind == "linear":
        joined = leaf.input_order.plain(array.T, 1)
    elif leaf.kind == "patch":
        joined = array.T
    elif leaf.kind == "conv":
        joined = array.transpose(3, 2, 0, 1)
    else:
        joined = array
    order = leaf.output_order
    pieces = [order.plain(joined, 0)] if len(leaf.sources) == 1 else order.split(joined, 0)
    return [p.reshape(s.shape) for p, s in zip(pieces, leaf.sources, strict=True)]
