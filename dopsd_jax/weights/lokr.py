"""LoKr (arXiv 2309.14859) as files have it: the change of a layer is a Kronecker product."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

# Factors of a layer by the end of their names: each matrix whole, or as a product a @ b.
PARTS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


@dataclasses.dataclass(frozen=True)
class LokrModule:
    """The adapter of one linear layer: W + scale * kron(w1, w2).

    w1, w2 float32, [out / p, in / q] and [p, q] in either order. Of an adapter of several layers
    fused along the output, this one is the rows `first` to `last` of the product; one Kronecker
    product has no exact parts of that form. `swapped`: see `lora_dialects.Target`.
    """

    w1: np.ndarray
    w2: np.ndarray
    scale: float
    first: int
    last: int
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the layer."""
        return self.last - self.first, self.w1.shape[1] * self.w2.shape[1]

    def delta(self, rows: slice = slice(None)) -> np.ndarray:
        """The change of W [out, in], or of some of its rows, float32."""
        whole = np.kron(np.float32(self.scale) * self.w1, self.w2)
        if self.swapped:
            whole = np.roll(whole, len(whole) // 2, axis=0)
        return whole[self.first : self.last][rows]


def assemble(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """w1, w2 and the rank that alpha is divided by; None if both are whole: alpha means nothing.

    shapes: of the factors that a file has for one layer, by `PARTS`; read: gives one. Raises
    ValueError with what is wrong.
    """
    matrices, rank = [], None
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
        factors = [read(part) for part in parts]
        if low:
            rank = sizes[1][0]  # of w2, if both are products: as LyCORIS has it
        matrices.append(factors[0] @ factors[1] if low else factors[0])
    return matrices[0], matrices[1], rank
