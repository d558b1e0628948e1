"""LoKr (arXiv 2309.14859) as files have it: the change of a layer is a Kronecker product."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

# Factors of a layer by the end of their names: each matrix whole, or as a product a @ b.
PARTS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


@dataclasses.dataclass(frozen=True)
class LokrModule:
    """The adapter of one linear layer: W + scale * kron(w1, w2).

    factors: float32, by `PARTS`; w1 and w2 are [out / q, in / n] and [q, n]. Of an adapter of
    several layers fused along the output, this one is the rows `first` to `last` of the product
    (None: to its end); one Kronecker product has no exact parts of that form. `swapped`: see
    `lora_dialects.Target`.
    """

    factors: Mapping[str, np.ndarray]
    scale: float
    first: int = 0
    last: int | None = None
    swapped: bool = False

    @functools.cached_property
    def w1(self) -> np.ndarray:
        return self._matrix("w1")

    @functools.cached_property
    def w2(self) -> np.ndarray:
        return self._matrix("w2")

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None if both matrices are whole: alpha then means nothing."""
        found = [self.factors[name] for name in ("w2_b", "w1_b") if name in self.factors]
        return len(found[0]) if found else None  # of w2, if both are products: LyCORIS's rule

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the layer."""
        return (self.last or self._rows) - self.first, self.w1.shape[1] * self.w2.shape[1]

    @property
    def is_entire(self) -> bool:
        """Whether the whole product is the layer's, so that its factors are the layer's own."""
        return self.first == 0 and self.last in (None, self._rows) and not self.swapped

    def delta(self, rows: slice = slice(None)) -> np.ndarray:
        """The change of W [out, in], or of some of its rows, float32."""
        whole = np.kron(np.float32(self.scale) * self.w1, self.w2)
        if self.swapped:
            whole = np.roll(whole, len(whole) // 2, axis=0)
        return whole[self.first : self.last][rows]

    @property
    def _rows(self) -> int:
        return len(self.w1) * len(self.w2)

    def _matrix(self, name: str) -> np.ndarray:
        if name in self.factors:
            return self.factors[name]
        return self.factors[f"{name}_a"] @ self.factors[f"{name}_b"]


def assemble(
    shapes: Mapping[str, tuple[int, ...]],
    needed: tuple[int, int],
    read: Callable[[str], np.ndarray],
) -> dict[str, np.ndarray]:
    """The factors of a layer, by `PARTS`.

    shapes: of those that a file has; needed: [out, in] of their change; read: gives one. Raises
    ValueError with what is wrong, before any is read: two small factors may make a huge matrix.
    """
    found, made = [], (1, 1)
    for name in ("w1", "w2"):
        low = {f"{name}_a", f"{name}_b"} & shapes.keys()
        if (name in shapes) == bool(low) or len(low) == 1:
            raise ValueError(f"needs lokr_{name}, or both lokr_{name}_a and lokr_{name}_b")
        parts = (f"{name}_a", f"{name}_b") if low else (name,)
        sizes = [shapes[part] for part in parts]
        fits = all(len(size) == 2 and min(size) > 0 for size in sizes)
        if not fits or (low and sizes[0][1] != sizes[1][0]):
            listed = " and ".join(str(list(size)) for size in sizes)
            raise ValueError(f"has lokr_{name} {listed}, which make no matrix")
        found += parts
        made = made[0] * sizes[0][0], made[1] * sizes[-1][1]
    if made != needed:
        raise ValueError(f"makes a change of {list(made)}; the layer needs {list(needed)}")
    return {part: read(part) for part in found}


def baked(module: LokrModule) -> LokrModule:
    """The same adapter with the scale multiplied into the first matrix, in float32."""
    if module.scale == 1.0:
        return module
    name = "w1" if "w1" in module.factors else "w1_a"
    factor = module.factors[name] * np.float32(module.scale)
    return dataclasses.replace(module, factors={**module.factors, name: factor}, scale=1.0)
