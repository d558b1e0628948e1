"""Work of a network's forward pass, by how much a backward pass adds."""

import dataclasses
from collections.abc import Callable, Iterable

from dopsd_jax.adapters.attach import Slot
from dopsd_jax.models import kinds

Products = Callable[[Slot], int]  # multiplications of a layer's adapter for one row of its input


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOP of one forward pass, by how much a backward pass adds.

    once: products on the way to nothing that is trained.
    linear: products whose backward pass needs one gradient, 1x: with frozen weights the input's;
      in full tuning, at the network's inputs, the weights'.
    attention: 2x. trained: products with adapters or trained weights: both gradients, 2x.
    inner: of `trained`, what is done again although a layer's products are kept; see
      `adapters.base.Adapter.inner`.
    """

    once: float = 0.0
    linear: float = 0.0
    attention: float = 0.0
    trained: float = 0.0
    inner: float = 0.0

    @property
    def forward(self) -> float:
        return self.once + self.linear + self.attention + self.trained

    @property
    def backward(self) -> float:
        return self.linear + 2 * self.attention + 2 * self.trained

    def again(self, remat: str) -> float:
        """What a backward pass computes a second time."""
        # Attention keeps no probabilities: of its two products the one that makes them is done
        # again, after `full` once more.
        probabilities = 0.5 * self.attention
        return {
            "none": probabilities,
            kinds.UNROLLED: probabilities,
            "dots": self.inner + probabilities,
            "full": self.linear + self.attention + self.trained + probabilities,
        }[remat]


def add(*works: Work) -> Work:
    """The sum, kind by kind."""
    return Work(*(sum(kinds) for kinds in zip(*map(dataclasses.astuple, works), strict=True)))


def adapter_work(chosen: Iterable[Slot], products: Products) -> int:
    """FLOP of the adapters of the chosen layers for one row of their inputs.

    As they act alone; on a processor those of small networks act in the kernels (`layers.Dense`).
    """
    return 2 * sum(map(products, chosen))
