"""Attention: one function, three implementations, chosen by name."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.lax import Precision
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.products import precision
from dopsd_jax.models import kept
from dopsd_jax.models.einsum_attention import einsum_attention
from dopsd_jax.models.kinds import ATTENTION as IMPLEMENTATIONS
from dopsd_jax.parallel.sharding import ambient_mesh, axes_dividing, constrain_batch, sample_axes

LANES = 128  # width of a TPU vector register: splash's blocks and head sizes are multiples of it
# Sizes of splash's blocks, the usual first. What is padded is computed too: of these is taken what
# pads least. Those of keys are multiples of the widest matrix unit's side, 256 (v6e, 7x).
QUERY_BLOCKS, KEY_BLOCKS = (512, 384, 640), (512, 768)


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    *,
    lengths: Int[Array, " b"] | None = None,
    causal: bool = False,
    implementation: str = "xla",
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v, the softmax in float32.

    h is a multiple of g: query head i uses key-value head i * g // h. Keys at positions >=
    `lengths` (each at least 1) are masked; padding is last, so one length per sample replaces a
    mask. The output at padded positions is finite and without meaning.
    """
    if implementation == "xla":
        if not causal:
            # Only queries are split by tokens: softmax then needs no communication.
            q = constrain_batch(q, "context", "tensor", None)
            k, v = (constrain_batch(x, None, "tensor", None) for x in (k, v))
        return einsum_attention(q, k, v, lengths, causal=causal)
    kernels = {"cudnn": cudnn_attention, "splash": splash_attention}
    if implementation not in kernels:
        raise ValueError(
            f"attention is one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}"
        )
    kernel = functools.partial(kernels[implementation], causal=causal)
    return per_device(kernel, causal=causal)(q, k, v, lengths)


def resolve(name: str, platform: str, dtype, head_dim: int) -> str:
    """The implementation that config.attention means on a platform; ask once, at the start.

    Args:
      name: one of `IMPLEMENTATIONS`, or `auto`: the platform's kernel where it applies, else xla.
      platform: `cpu`, `gpu` or `tpu`.
      dtype: of queries, keys and values.
    Raises `UserError` if `name` does not run there.
    """
    dtype = jnp.dtype(dtype)
    lacks = {"xla": [], "cudnn": [], "splash": []}
    if platform != "tpu":
        lacks["splash"].append(f"a TPU, and this is {platform}")
    if head_dim % LANES:
        lacks["splash"].append(f"a head size that {LANES} divides, and the model's is {head_dim}")
    if platform != "gpu":
        lacks["cudnn"].append(f"an NVIDIA GPU, and this is {platform}")
    if dtype not in (jnp.bfloat16, jnp.float16):
        lacks["cudnn"].append(f"bfloat16 or float16 activations, and these are {dtype.name}")
    if head_dim % 8 or head_dim > 128:
        lacks["cudnn"].append(f"a head size of 8, 16, ... 128, and the model's is {head_dim}")
    if name == "auto":
        return next(n for n in ("splash", "cudnn", "xla") if not lacks[n])
    if name not in lacks:
        raise UserError(
            f"config.attention: {name!r} is not auto, {', '.join(IMPLEMENTATIONS[:-1])} or "
            f"{IMPLEMENTATIONS[-1]}"
        )
    if lacks[name]:
        raise UserError(
            f"config.attention: {name} needs {'; and '.join(lacks[name])}; set config.attention to "
            "auto or xla"
        )
    return name


def per_device(kernel, *, causal: bool = False):
    """`kernel(q, k, v, lengths)` on each device's own samples, heads and queries.

    The compiler does not look into a kernel, so it cannot split one. Samples are spread over the
    axes data and fsdp of the ambient mesh, heads over tensor, and, unless `causal`, tokens over
    context, where these divide them. Keys and values are gathered: each device's queries see all.
    """

    def call(q, k, v, lengths):
        mesh = ambient_mesh()
        if mesh is None:
            return kernel(q, k, v, lengths)
        batch = axes_dividing(mesh, sample_axes(), q.shape[0])
        heads = axes_dividing(mesh, ("tensor",), k.shape[2])
        common = math.gcd(q.shape[1], k.shape[1])
        context = None if causal else axes_dividing(mesh, ("context",), common)
        tensor, rows = PartitionSpec(batch, context, heads, None), PartitionSpec(batch)
        if lengths is None:
            lengths = jnp.full((len(k),), k.shape[1])

        def own(q, k, v, lengths):
            if context:
                k, v = (jax.lax.all_gather(x, context, axis=1, tiled=True) for x in (k, v))
            return kernel(q, k, v, lengths)

        mapped = jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(tensor, tensor, tensor, rows),
            out_specs=tensor,
            check_vma=False,
        )
        return mapped(q, k, v, lengths)

    return call


def cudnn_attention(q, k, v, lengths, *, causal: bool):
    """cuDNN's flash attention. Lengths are its padding mask, not a bias of n x m numbers."""
    queries = None if lengths is None else jnp.full((len(q),), q.shape[1], jnp.int32)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        query_seq_lengths=queries,
        key_value_seq_lengths=None if lengths is None else lengths.astype(jnp.int32),
        implementation="cudnn",
    )


def splash_attention(q, k, v, lengths, *, causal: bool, interpret: bool = False):
    """Splash attention, forward and fused backward, of any length: padded inside, cut after.

    Keys that are not seen form a segment of their own, so no row is without keys.
    """
    (n, h, d), m = q.shape[1:], k.shape[1]
    block_q, block_kv = splash_block(n, QUERY_BLOCKS), splash_block(m, KEY_BLOCKS)
    # The kernel has no scale of its own.
    q = _pad((q.astype(jnp.float32) * d**-0.5).astype(q.dtype), block_q)
    k, v = _pad(k, block_kv), _pad(v, block_kv)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        use_fused_bwd_kernel=True,
    )
    seen = splash_mask.CausalMask if causal else splash_mask.FullMask
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([seen((q.shape[1], k.shape[1]))] * h),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=kept.NAME,
        interpret=interpret,
    )
    segments = None
    if lengths is not None or k.shape[1] != m:
        lengths = jnp.full((len(k),), m) if lengths is None else lengths
        hidden = (jnp.arange(k.shape[1]) >= lengths[:, None]).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.zeros(q.shape[:2], jnp.int32), hidden)
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    run = jax.vmap(kernel)
    if precision(q, k, v) == Precision.HIGHEST:
        run = exactly(run)
    y = run(heads_first(q), heads_first(k), heads_first(v), segments)
    return heads_first(y)[:, :n]


def exactly(kernel):
    """`kernel(q, k, v, segments)` with float32 products that are not rounded, in both its passes.

    Its products ask for no precision, and a setting around a call does not reach the backward pass.
    """
    setting = functools.partial(jax.default_matmul_precision, Precision.HIGHEST.name.lower())

    @jax.custom_vjp
    def run(q, k, v, segments):
        with setting():
            return kernel(q, k, v, segments)

    def forward(q, k, v, segments):
        with setting():
            return jax.vjp(lambda q, k, v: kernel(q, k, v, segments), q, k, v)

    def backward(pull, dy):
        with setting():
            return *pull(dy), None

    run.defvjp(forward, backward)
    return run


def splash_block(length: int, sizes: Sequence[int]) -> int:
    """The first of `sizes` that pads `length` least; a single smaller block for few tokens.

    Examples:
      >>> splash_block(4096 + 512, QUERY_BLOCKS), splash_block(4096 + 96, QUERY_BLOCKS)
      (512, 384)
    """
    if length <= sizes[0]:
        return _padded(length, LANES)
    return min(sizes, key=lambda size: _padded(length, size))


def _padded(length: int, block: int) -> int:
    return -(-length // block) * block


def _pad(x, block: int):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
