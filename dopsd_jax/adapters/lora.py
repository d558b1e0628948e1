"""LoRA (arXiv 2106.09685): a change of low rank, W + scale A B, kernels being [in, out]."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dopsd_jax.adapters.base import IN_ORDER, Adapter, cut
from dopsd_jax.common.products import matmul
from dopsd_jax.models.interleaved import Interleaved
from dopsd_jax.models.kept import keep
from dopsd_jax.weights.lora_files import LoraModule


class Lora(Adapter):
    """a [*lead, din, rank], b [*lead, rank, dout], float32.

    A ~ N(0, 1/rank^2), PEFT's `gaussian` start; B = 0.
    """

    title, module = "LoRA", LoraModule

    def __init__(self, a: jax.Array, b: jax.Array):
        self.a, self.b = nnx.LoRAParam(a), nnx.LoRAParam(b)

    @classmethod
    def init(cls, key: jax.Array, lead: tuple[int, ...], din: int, dout: int, rank: int) -> "Lora":
        a = jax.random.normal(key, (*lead, din, rank)) / rank
        return cls(a, jnp.zeros((*lead, rank, dout)))

    def delta(self) -> Float[Array, "*lead din dout"]:
        return self.scale[...][..., None, None] * matmul(self.a[...], self.b[...])

    @classmethod
    def updates(
        cls, parts: Sequence["Lora"], x: Float[Array, "... din"], sizes: Sequence[Sequence[int]],
        inputs: Interleaved = IN_ORDER,
    ) -> list[list[Array]]:  # fmt: skip
        # One product for all down-projections: x is read once.
        downs = [inputs.ordered(part.a[...].astype(x.dtype), axis=0) for part in parts]
        lows = jnp.split(keep(matmul(x, jnp.concatenate(downs, -1))), len(downs), axis=-1)
        return [
            [
                matmul(low * part.scale[...].astype(x.dtype), columns)
                for columns in cut(part.b[...].astype(x.dtype), own)
            ]
            for part, low, own in zip(parts, lows, sizes, strict=True)
        ]

    @classmethod
    def size(cls, din: int, dout: int, rank: int) -> int:
        return rank * (din + dout)

    @staticmethod
    def export(weights: Mapping[str, np.ndarray], scale: float) -> LoraModule:
        """A [rank, in], B [out, rank]."""
        a, b = (np.ascontiguousarray(weights[name].T) for name in ("a", "b"))
        return LoraModule(a=a, b=b, scale=scale)

    @staticmethod
    def load(
        weights: Mapping[str, np.ndarray], module: LoraModule, scale: float
    ) -> Mapping[str, np.ndarray]:
        """The module's scale is multiplied into B; a smaller rank gets rows without effect."""
        a, b = (np.array(weights[name]) for name in ("a", "b"))
        rank, most = module.rank, a.shape[1]
        if module.a.shape[1] != len(a) or len(module.b) != b.shape[1]:
            raise ValueError(
                f"is of {module.a.shape[1]} inputs and {len(module.b)} outputs, the model's layer "
                f"has {len(a)} and {b.shape[1]}; give a file that was made for this model"
            )
        if rank > most:
            raise ValueError(f"has rank {rank}; set config.lora.rank, {most}, to {rank} or more")
        a[:, :rank], b[:rank] = module.a.T, module.b.T * (module.scale / scale)
        b[rank:] = 0.0  # the spare rows of A stay random: they can still learn
        return {"a": a, "b": b}
