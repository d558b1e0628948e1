"""Its transformer: one sequence of image, reference and text."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from dopsd_jax.common.json_fields import Fields
from dopsd_jax.models.attention import attention
from dopsd_jax.models.layers import Dense, normalize, scan_blocks, sinusoids, stack
from dopsd_jax.models.names import linear
from dopsd_jax.parallel.sharding import declare_block_kernels

declare_block_kernels(columns=("layers.qkv",), rows=("layers.out",))


@dataclasses.dataclass(frozen=True)
class Config:
    dim: int
    layers: int
    text: int
    heads, head_dim, patch, channels, token_multiple = 2, 16, 1, 16, 1

    @property
    def hidden_dim(self) -> int:
        return self.dim

    @classmethod
    def from_dict(cls, content, where):
        fields = Fields(content, where)
        fields.only("_class_name", "SecondTransformer")
        self = cls(*(fields.count(name) for name in ("dim", "layers", "text")))
        fields.finish()
        return self

    def to_dict(self):
        return {"_class_name": "SecondTransformer", **dataclasses.asdict(self)}


def names(cfg):
    dense = lambda path, i, *parts: linear(f"{path}.kernel", i, *parts)
    d, block = cfg.dim, "blocks.{}.to_{}".format
    return [
        dense("image", None, ("x_embedder", d, cfg.channels)),
        dense("text", None, ("context_embedder", d, cfg.text)),
        dense("last", None, ("proj_out", cfg.channels, d)),
        *(dense("layers.qkv", i, *((block(i, n), d, d) for n in "qkv")) for i in range(cfg.layers)),
        *(dense("layers.out", i, (block(i, "out"), d, d)) for i in range(cfg.layers)),
    ]


class Block(nnx.Module):
    def __init__(self, cfg, kernel, rngs):
        self.shape, self.kernel = (cfg.heads, cfg.head_dim), kernel
        self.qkv = Dense(cfg.dim, (cfg.dim,) * 3, rngs=rngs)
        self.out = Dense(cfg.dim, cfg.dim, rngs=rngs)

    def __call__(self, x, lengths):
        parts = self.qkv.parts(normalize(x, 1e-6))
        q, k, v = (part.reshape(*part.shape[:2], *self.shape) for part in parts)
        y = attention(q, k, v, lengths=lengths, implementation=self.kernel)
        return x + self.out(y.reshape(x.shape))


class Transformer(nnx.Module):
    def __init__(self, cfg, *, dtype=jnp.float32, attention="xla", remat="none", rngs):
        self.cfg, self.dtype, self.remat = cfg, jnp.dtype(dtype), remat
        self.image = Dense(cfg.channels, cfg.dim, rngs=rngs)
        self.text = Dense(cfg.text, cfg.dim, rngs=rngs)
        self.last = Dense(cfg.dim, cfg.channels, rngs=rngs)
        self.layers = stack(lambda r: Block(cfg, attention, r), cfg.layers, rngs)

    def embed(self, features):
        return self.text(features.astype(self.dtype))

    def __call__(self, x, sigma, text, lengths, reference):
        b, h, w, c = x.shape
        cells = lambda a: self.image(a.astype(self.dtype).reshape(b, -1, c))
        places = sinusoids(jnp.arange(h * w), self.cfg.dim).astype(self.dtype)
        time = sinusoids(1000 * sigma, self.cfg.dim).astype(self.dtype)[:, None]
        first = [cells(x) + places + time]
        first += [] if reference is None else [cells(reference) + places]
        tokens = jnp.concatenate([*first, text], axis=1)
        lengths = tokens.shape[1] - text.shape[1] + lengths
        tokens = scan_blocks(lambda block, t: block(t, lengths), self.layers, tokens, self.remat)
        return self.last(normalize(tokens[:, : h * w], 1e-6)).reshape(x.shape).astype(jnp.float32)
