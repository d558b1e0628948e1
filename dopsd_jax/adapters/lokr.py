"""LoKr (arXiv 2309.14859): the change of a layer is a Kronecker product, as LyCORIS trains it.

In PyTorch's shapes W [out, in] + scale * kron(w1, w2): w1 [p, m] is whole; w2 [q, n] is a product
w2_a w2_b of a rank, or whole where that would not be much smaller. out = p q, in = m n.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dopsd_jax.adapters.base import IN_ORDER, Adapter, cut
from dopsd_jax.common.products import einsum, matmul
from dopsd_jax.models.interleaved import Interleaved
from dopsd_jax.weights.lokr import LokrModule

SQUARE = 0  # the factor that makes the two sizes of a side as equal as they can be


class Lokr(Adapter):
    """w1 [*lead, m, p]; w2_b [*lead, n, rank] and w2_a [*lead, rank, q], or w2 [*lead, n, q].

    float32; each is the transpose of what files call so. They start as LyCORIS has them: w2_b, or a
    whole w2, is 0.
    """

    title, module = "LoKr", LokrModule
    factor: ClassVar[int] = SQUARE

    def __init__(self, **factors: jax.Array):
        for name, value in factors.items():
            setattr(self, name, nnx.LoRAParam(value))

    @staticmethod
    @functools.cache
    def of(factor: int) -> type["Lokr"]:
        """The kind whose m and p are `factor` where that divides the layer's size; see `sizes`."""
        return type("Lokr", (Lokr,), {"factor": factor, "__module__": __name__})

    @classmethod
    def sizes(cls, din: int, dout: int) -> tuple[int, int, int, int]:
        """m, n, p, q."""
        return *divided(din, cls.factor), *divided(dout, cls.factor)

    @classmethod
    def is_whole(cls, din: int, dout: int, rank: int) -> bool:
        """Whether w2 is one matrix: LyCORIS's rule."""
        _, n, _, q = cls.sizes(din, dout)
        return rank >= max(n, q) / 2

    @classmethod
    def init(cls, key: jax.Array, lead: tuple[int, ...], din: int, dout: int, rank: int) -> "Lokr":
        (m, n, p, q), (first, second) = cls.sizes(din, dout), jax.random.split(key)

        def draw(key: jax.Array, shape: tuple[int, int], inputs: int) -> jax.Array:
            bound = inputs**-0.5  # PyTorch's kaiming_uniform_(a=sqrt(5))
            return jax.random.uniform(key, (*lead, *shape), minval=-bound, maxval=bound)

        w1 = draw(first, (m, p), m)
        if cls.is_whole(din, dout, rank):
            return cls(w1=w1, w2=jnp.zeros((*lead, n, q)))
        return cls(
            w1=w1, w2_a=draw(second, (rank, q), rank), w2_b=jnp.zeros((*lead, n, rank))
        )  # fmt: skip

    @classmethod
    def strength(cls, din: int, dout: int, rank: int, alpha: float) -> float:
        """alpha / rank; 1 where w2 is whole: there, as in LyCORIS, alpha means nothing."""
        return 1.0 if cls.is_whole(din, dout, rank) else alpha / rank

    def delta(self) -> Float[Array, "*lead din dout"]:
        w2 = self.w2[...] if hasattr(self, "w2") else matmul(self.w2_b[...], self.w2_a[...])
        product = einsum("...mp,...nq->...mnpq", self.w1[...], w2)
        *lead, m, n, p, q = product.shape
        return self.scale[...][..., None, None] * product.reshape(*lead, m * n, p * q)

    @classmethod
    def updates(
        cls, parts: Sequence["Lokr"], x: Float[Array, "... din"], sizes: Sequence[Sequence[int]],
        inputs: Interleaved = IN_ORDER,
    ) -> list[list[Array]]:  # fmt: skip
        # A Kronecker product fits no order of rows and no cut of columns but the layer's own. So
        # here it is x that is ordered, and the output that is cut: sent, between devices that split
        # heads.
        x = inputs.plain(x)
        return [cut(part._update(x), own) for part, own in zip(parts, sizes, strict=True)]

    def _update(self, x: Float[Array, "... din"]) -> Float[Array, "... dout"]:
        """x as a grid [m, n]: w1 is applied along one side, w2 along the other."""
        cast = lambda a: a[...].astype(x.dtype)
        w1 = self.scale[...].astype(x.dtype) * cast(self.w1)
        along = lambda grid: einsum("...mi,mp->...pi", grid, w1)
        m, p = w1.shape
        grid = x.reshape(*x.shape[:-1], m, -1)
        if not hasattr(self, "w2"):
            grid = matmul(along(matmul(grid, cast(self.w2_b))), cast(self.w2_a))
        else:
            w2 = cast(self.w2)
            first = _first(m, *w2.shape, p)
            grid = matmul(along(grid), w2) if first else along(matmul(grid, w2))
        return grid.reshape(*x.shape[:-1], -1)

    @classmethod
    def size(cls, din: int, dout: int, rank: int) -> int:
        m, n, p, q = cls.sizes(din, dout)
        return m * p + (n * q if cls.is_whole(din, dout, rank) else rank * (n + q))

    @classmethod
    def products(cls, din: int, dout: int, rank: int) -> int:
        m, n, p, q = cls.sizes(din, dout)
        if not cls.is_whole(din, dout, rank):
            return rank * (m * n + m * p + p * q)
        return p * n * (m + q) if _first(m, n, q, p) else m * q * (n + p)

    @classmethod
    def inner(cls, din: int, dout: int, rank: int) -> int:
        # Their results are nearly as large as the layer's, the work is not: they are not kept.
        m, n, p, q = cls.sizes(din, dout)
        if not cls.is_whole(din, dout, rank):
            return rank * (m * n + m * p)
        return p * n * m if _first(m, n, q, p) else m * q * n

    @staticmethod
    def export(weights: Mapping[str, np.ndarray], scale: float) -> LokrModule:
        """The factors by the names of `weights.lokr.PARTS`."""
        factors = {name: np.ascontiguousarray(array.T) for name, array in weights.items()}
        return LokrModule(factors, 1.0 if "w2" in factors else scale)

    @staticmethod
    def load(
        weights: Mapping[str, np.ndarray], module: LokrModule, scale: float
    ) -> Mapping[str, np.ndarray]:
        """The module's scale is multiplied into w1; a smaller rank gets rows without effect."""
        factor = np.float32(module.scale / (1.0 if "w2" in weights else scale))
        second = {name: array.T for name, array in module.factors.items() if "w2" in name}
        found = {"w1": module.w1.T * factor, **second}
        if found.keys() == weights.keys() and "w2_a" in found:
            spare = weights["w2_a"][len(found["w2_a"]) :]  # stay random: they can still learn
            if found["w2_a"].shape[1] == spare.shape[1]:
                found["w2_a"] = np.concatenate([found["w2_a"], spare])
                found["w2_b"] = np.pad(found["w2_b"], ((0, 0), (0, len(spare))))
        shapes = lambda arrays: {name: arrays[name].T.shape for name in sorted(arrays)}
        if not module.is_entire or shapes(found) != shapes(weights):
            here = {"w1": module.w1, **module.factors}
            raise ValueError(
                f"has {_listed({n: here[n].shape for n in sorted(here)})}"
                f"{'' if module.is_entire else ' over several layers'}; config.lora.rank, "
                f"config.lora.factor and the model need {_listed(shapes(weights))}"
            )
        return found


def divided(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two, the smaller one first: LyCORIS's rule, with 0 for its -1.

    One is `factor` where that divides; else the smaller one is the largest divisor up to it.
    `SQUARE`: the two divisors that are closest to each other.
    """
    if factor and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    small = max(d for d in range(1, int(size**0.5) + 1) if size % d == 0 and d <= (factor or size))
    return small, size // small


def kind_of(modules: Iterable[LokrModule]) -> tuple[type[Lokr], int] | None:
    """The kind and the rank of which all of these are; None: there is no one kind."""
    modules = list(modules)
    if not all(module.is_entire for module in modules):
        return None
    ranks = [len(m.factors["w2_b"]) for m in modules if "w2_b" in m.factors]
    rank = max(ranks) if ranks else max(max(module.w2.shape) for module in modules)

    def fits(kind: type[Lokr], module: LokrModule) -> bool:
        (dout, din), (p, m) = module.shape, module.w1.shape
        sizes = m, din // m, p, dout // p
        whole = "w2" in module.factors
        return kind.sizes(din, dout) == sizes and kind.is_whole(din, dout, rank) == whole

    for factor in (*sorted({max(module.w1.shape) for module in modules}), SQUARE):
        if all(fits(Lokr.of(factor), module) for module in modules):
            return Lokr.of(factor), rank
    return None


def _first(m: int, n: int, q: int, p: int) -> bool:
    """Whether it takes fewer products to apply w1 before a whole w2."""
    return p * n * (m + q) < m * q * (n + p)


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
