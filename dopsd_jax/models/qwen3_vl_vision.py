"""Vision tower of Qwen3-VL: patches of one image a sample to features for the language model.

Dimension names: b batch, p patches, m merged patches, d tower width, r half a head.
Patches come in merge-block order (block row, block column, row in block, column in block).
Facts: transformers 5.23 (`Qwen3VLVisionModel`) and the published checkpoint.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dopsd_jax.common.json_fields import MAX_LAYERS, Fields, in_json
from dopsd_jax.models.attention import attention
from dopsd_jax.models.layers import Dense, LayerNorm, scan_range, stack
from dopsd_jax.models.names import Leaf, Source, linear, vector
from dopsd_jax.models.qwen3 import inverse_frequencies, rotate

NORM_EPS = 1e-6
ROPE_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class Qwen3VLVisionConfig:
    """Sizes of the vision tower, as in `vision_config` of config.json."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    out_hidden_size: int
    num_positions: int
    deepstack: tuple[int, ...]

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def image_tokens(self, grid: tuple[int, int]) -> int:
        """Positions that an image of `grid` patches (rows, columns) takes in the text."""
        return grid[0] * grid[1] // self.merge_size**2


def read_vision_fields(fields: Fields) -> Qwen3VLVisionConfig:
    """The vision tower's settings; problems are noted in `fields`."""
    fields.only("model_type", "qwen3_vl", "qwen3_vl_vision", required=True)
    fields.only("hidden_act", "gelu_pytorch_tanh", required=True)
    rope = fields.json.get("rope_parameters")
    if rope not in (None, {}, {"rope_theta": ROPE_THETA, "rope_type": "axial"}):
        fields.problem(
            f"field rope_parameters is {in_json(rope)}; only axial of {ROPE_THETA:g} is supported"
        )
    config = Qwen3VLVisionConfig(
        depth=fields.count("depth", most=MAX_LAYERS),
        hidden_size=fields.count("hidden_size"),
        intermediate_size=fields.count("intermediate_size"),
        num_heads=fields.count("num_heads"),
        in_channels=fields.count("in_channels"),
        patch_size=fields.count("patch_size"),
        temporal_patch_size=fields.count("temporal_patch_size"),
        merge_size=fields.count("spatial_merge_size"),
        out_hidden_size=fields.count("out_hidden_size"),
        num_positions=fields.count("num_position_embeddings"),
        deepstack=fields.counts("deepstack_visual_indexes", least=0),
    )
    indexes = config.deepstack
    if list(indexes) != sorted(set(indexes)) or (
        config.depth and max(indexes, default=0) >= config.depth
    ):
        fields.problem(
            f"field deepstack_visual_indexes is {list(indexes)}; "
            f"it must grow and stay below depth, {config.depth}"
        )
    if config.num_heads and config.hidden_size % (4 * config.num_heads):
        fields.problem(
            f"field hidden_size is {config.hidden_size}; "
            f"it must be a multiple of 4 num_heads, {4 * config.num_heads}"
        )
    if math.isqrt(config.num_positions) ** 2 != config.num_positions:
        fields.problem(f"field num_position_embeddings is {config.num_positions}, not a square")
    return config


def names(cfg: Qwen3VLVisionConfig, prefix: str = "model.visual.") -> list[Leaf]:
    """Every parameter and the tensors it is made of; `prefix` begins each tensor name."""
    d = cfg.hidden_size
    merged = d * cfg.merge_size**2

    def dense(path: str, index: int | None, module: str, dout: int, din: int) -> list[Leaf]:
        kernel = linear(f"{path}.kernel", index, (prefix + module, dout, din))
        return [kernel, vector(f"{path}.bias", index, f"{prefix}{module}.bias", dout)]

    def norm(path: str, index: int | None, module: str, width: int) -> list[Leaf]:
        scale = vector(f"{path}.scale", index, f"{prefix}{module}.weight", width)
        return [scale, vector(f"{path}.bias", index, f"{prefix}{module}.bias", width)]

    def merger(path: str, index: int | None, module: str, norm_width: int) -> list[Leaf]:
        return [
            *norm(f"{path}.norm", index, f"{module}.norm", norm_width),
            *dense(f"{path}.fc1", index, f"{module}.linear_fc1", merged, merged),
            *dense(f"{path}.fc2", index, f"{module}.linear_fc2", cfg.out_hidden_size, merged),
        ]

    patch = (d, cfg.in_channels, cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
    proj = f"{prefix}patch_embed.proj"
    leaves = [
        Leaf("patch_embedding.kernel", None, (Source(f"{proj}.weight", patch),), "patch"),
        vector("patch_embedding.bias", None, f"{proj}.bias", d),
        vector("position_table", None, f"{prefix}pos_embed.weight", cfg.num_positions, d),
    ]
    for i in range(cfg.depth):
        block = f"blocks.{i}"
        leaves += [
            *norm("blocks.attention_norm", i, f"{block}.norm1", d),
            *dense("blocks.qkv", i, f"{block}.attn.qkv", 3 * d, d),
            *dense("blocks.out", i, f"{block}.attn.proj", d, d),
            *norm("blocks.ffn_norm", i, f"{block}.norm2", d),
            *dense("blocks.fc1", i, f"{block}.mlp.linear_fc1", cfg.intermediate_size, d),
            *dense("blocks.fc2", i, f"{block}.mlp.linear_fc2", d, cfg.intermediate_size),
        ]
    leaves += merger("merger", None, "merger", d)
    for i in range(len(cfg.deepstack)):
        leaves += merger("deepstack_mergers", i, f"deepstack_merger_list.{i}", merged)
    return leaves


def patch_coordinates(grid: tuple[int, int], merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every patch of a grid (rows, columns), in merge-block order."""
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    blocks = (grid[0] // merge, merge, grid[1] // merge, merge)
    order = lambda a: a.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1)
    return order(rows), order(columns)


def interpolation(
    grid: tuple[int, int], merge: int, side: int
) -> tuple[Int[np.ndarray, "p 4"], Float[np.ndarray, "p 4"]]:
    """Rows of a side x side position table, and their weights, whose sum is each patch's embedding.

    Bilinear with aligned corners: row i of n lies at i (side - 1) / (n - 1). Float32, in the order
    of operations of transformers, so that a position on a node stays on it.
    """

    def taps(index: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        low = np.floor(source)
        fraction = source - low
        both = np.stack([low, low + 1], -1).astype(np.int32)
        return np.minimum(both, side - 1), np.stack([1 - fraction, fraction], -1)

    row, column = patch_coordinates(grid, merge)
    (i, wi), (j, wj) = taps(row, grid[0]), taps(column, grid[1])
    indices = (i[:, :, None] * side + j[:, None, :]).reshape(-1, 4)
    return indices, (wi[:, :, None] * wj[:, None, :]).reshape(-1, 4)


class Block(nnx.Module):
    """Full attention within the image and a feed-forward, each behind a norm, around a residual."""

    def __init__(self, cfg: Qwen3VLVisionConfig, implementation: str, *, rngs: nnx.Rngs):
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.heads, self.implementation = cfg.num_heads, implementation
        self.attention_norm = LayerNorm(d, NORM_EPS)
        self.qkv = Dense(d, (d, d, d), bias=True, rngs=rngs)
        self.out = Dense(d, d, bias=True, rngs=rngs)
        self.ffn_norm = LayerNorm(d, NORM_EPS)
        self.fc1 = Dense(d, f, bias=True, rngs=rngs)
        self.fc2 = Dense(f, d, bias=True, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b p d"], cos: Float[Array, "1 p r"], sin: Float[Array, "1 p r"]
    ) -> Float[Array, "b p d"]:
        heads = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
        q, k, v = map(heads, self.qkv.parts(self.attention_norm(x)))
        # The tower rotates in float32 whatever its type; the language model does not.
        turn = lambda y: rotate(y.astype(jnp.float32), cos, sin).astype(y.dtype)
        y = attention(turn(q), turn(k), v, implementation=self.implementation)
        x = x + self.out(y.reshape(x.shape))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.ffn_norm(x)), approximate=True))


class Merger(nnx.Module):
    """Joins the patches of a merge block and projects them to the language model's width.

    The norm stands before the joining (`joined_norm` false: the last merger) or after it (the
    deepstack mergers).
    """

    def __init__(self, cfg: Qwen3VLVisionConfig, joined_norm: bool, *, rngs: nnx.Rngs):
        self.width = cfg.hidden_size * cfg.merge_size**2
        self.joined_norm = joined_norm
        self.norm = LayerNorm(self.width if joined_norm else cfg.hidden_size, NORM_EPS)
        self.fc1 = Dense(self.width, self.width, bias=True, rngs=rngs)
        self.fc2 = Dense(self.width, cfg.out_hidden_size, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b m out"]:
        join = lambda y: y.reshape(len(x), -1, self.width)
        x = self.norm(join(x)) if self.joined_norm else join(self.norm(x))
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Qwen3VLVision(nnx.Module):
    """The vision tower with its connector: the last merger and the deepstack mergers."""

    def __init__(
        self,
        cfg: Qwen3VLVisionConfig,
        *,
        attention: str = "xla",
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.cfg, self.remat = cfg, remat
        init = jax.nn.initializers.normal(0.02)
        self.patch_embedding = Dense(cfg.patch_dim, cfg.hidden_size, bias=True, rngs=rngs)
        self.position_table = nnx.Param(init(rngs.params(), (cfg.num_positions, cfg.hidden_size)))
        self.blocks = stack(lambda r: Block(cfg, attention, rngs=r), cfg.depth, rngs)
        self.merger = Merger(cfg, False, rngs=rngs)
        levels = len(cfg.deepstack)
        self.deepstack_mergers = (
            stack(lambda r: Merger(cfg, True, rngs=r), levels, rngs) if levels else None
        )

    def __call__(
        self,
        patches: Float[Array, "b p c"],
        grid: tuple[int, int],
        *,
        dtype: Any = jnp.float32,
    ) -> tuple[Float[Array, "b m out"], tuple[Float[Array, "b m out"], ...]]:
        """Image features, and those of every deepstack level, computed in `dtype`.

        `grid` is (patch rows, patch columns), the same for the whole batch; patches are normalised
        pixels in the order (channel, frame, row, column).
        """
        x = self.embed(patches, grid, dtype)
        cos, sin = self.rope(grid)
        apply = lambda block, x: block(x, cos, sin)
        features, start = [], 0
        for level, index in enumerate(self.cfg.deepstack):
            x = scan_range(apply, self.blocks, x, start, index + 1, self.remat)
            merger = jax.tree.map(lambda a, level=level: a[level], self.deepstack_mergers)
            features.append(merger(x))
            start = index + 1
        x = scan_range(apply, self.blocks, x, start, self.cfg.depth, self.remat)
        return self.merger(x), tuple(features)

    def embed(
        self, patches: Float[Array, "b p c"], grid: tuple[int, int], dtype: Any
    ) -> Float[Array, "b p d"]:
        """Patch embeddings plus the position table interpolated to the grid."""
        cfg = self.cfg
        if grid[0] % cfg.merge_size or grid[1] % cfg.merge_size or 0 in grid:
            raise ValueError(f"grid {grid}: both sides must be multiples of {cfg.merge_size}")
        if patches.shape[1:] != (grid[0] * grid[1], cfg.patch_dim):
            raise ValueError(f"patches {patches.shape} are not those of grid {grid}")
        indices, weights = interpolation(grid, cfg.merge_size, math.isqrt(cfg.num_positions))
        rows = self.position_table[...][indices].astype(jnp.float32)
        positions = (rows * weights[..., None]).sum(1)
        return self.patch_embedding(patches.astype(dtype)) + positions.astype(dtype)

    def rope(self, grid: tuple[int, int]) -> tuple[Float[Array, "1 p r"], Float[Array, "1 p r"]]:
        """Cosines and sines of the two axes: first the row's frequencies, then the column's."""
        axis = self.cfg.hidden_size // self.cfg.num_heads // 2
        frequencies = inverse_frequencies(axis, ROPE_THETA)
        coordinates = patch_coordinates(grid, self.cfg.merge_size)
        angles = jnp.concatenate([c[:, None] * frequencies for c in coordinates], -1)[None]
        angles = angles.astype(jnp.float32)
        return jnp.cos(angles), jnp.sin(angles)
