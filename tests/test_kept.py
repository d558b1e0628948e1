"""What is kept of a layer; with `remat=dots` no matrix product or attention is repeated."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval
from jax.sharding import AbstractMesh, AxisType

from dopsd_jax.adapters import attach
from dopsd_jax.adapters.lokr import Lokr
from dopsd_jax.adapters.lora import Lora
from dopsd_jax.models import flux2, flux2_config, kept, quantised, zimage, zimage_config
from dopsd_jax.models.attention import attention, cudnn_attention
from dopsd_jax.models.layers import gated, scan_blocks
from dopsd_jax.parallel import sharding

LAYERS, TOKENS, RANK, HEADS, WIDTH = 3, 40, 4, 3, 96
ZIMAGE = zimage_config.ZImageConfig(
    dim=WIDTH, layers=LAYERS, refiner_layers=1, heads=HEADS, caption_dim=16, axes_dims=(8, 12, 12)
)
KLEIN = flux2_config.Flux2Config(
    heads=HEADS, head_dim=32, double_layers=1, single_layers=LAYERS, text_dim=48,
    axes_dims=(8, 8, 8, 8),
)  # fmt: skip
HALF = ZIMAGE.head_dim // 2


def stack(name: str, kind, scheme):
    """(graph, adapters, the rest) of a stack of layers; its name; (layer, x) -> x; outputs of
    linear layers that a backward pass asks for, in numbers a token."""
    rope = (jnp.ones((1, TOKENS, 1, HALF)),) * 2
    if name == "zimage":
        config, make, where = (
            zimage_config,
            lambda: zimage.ZImage(ZIMAGE, rngs=nnx.Rngs(0)),
            "layers",
        )
        apply = lambda layer, x: layer(
            x, rope, jnp.array([TOKENS]), jnp.ones((1, ZIMAGE.modulation_dim))
        )
        available = attach.slots(config.names(ZIMAGE))
    else:
        config, make, where = flux2_config, lambda: flux2.Flux2(KLEIN, rngs=nnx.Rngs(0)), "single"
        row = flux2.Row(flux2.Interleaved((8, TOKENS - 8), 1), rope, None)
        apply = lambda layer, x: layer(x, row, (jnp.ones((1, 1, WIDTH)),) * 3)
        available = attach.slots(flux2_config.names(KLEIN))
    chosen = {
        path: slot
        for path, slot in available.items()
        if slot.dense.startswith(f"{where}.") and "modulation" not in slot.dense
    }
    own = [slot for slot in chosen.values() if slot.index == 0]
    # What klein's last product gave is only added to x.
    outputs = sum(s.dout for s in own if not (name == "klein" and s.dense.endswith("w_out")))

    def build():
        net = make()
        attach.attach(net, chosen, RANK, RANK, jax.random.key(0), kind)
        return quantised.quantised(net, scheme) if scheme else net

    blocks = getattr(nnx.eval_shape(build), where)
    lows = RANK * len(own) if kind is Lora else 0
    return nnx.split(blocks, nnx.LoRAParam, ...), apply, outputs + lows


def per_token(found) -> list:
    """Of what is kept, the stacks of the layers' states, with or without an axis of samples."""
    return [a for a in found if a.ndim > 2 and a.shape[0] == LAYERS and TOKENS in a.shape]


@pytest.mark.parametrize("scheme", [None, "int8"])
@pytest.mark.parametrize("kind", [Lora, Lokr.of(4)])
@pytest.mark.parametrize("name", ["zimage", "klein"])
def test_each_product_is_kept_once(name, kind, scheme):
    """An output holds its adapters' share; beside it attention's output and the layer's own
    input."""
    (graphdef, adapters, base), apply, outputs = stack(name, kind, scheme)

    def pull(adapters, base, x):
        run = lambda adapters, x: scan_blocks(apply, nnx.merge(graphdef, adapters, base), x, "dots")
        return jax.vjp(run, adapters, x)[1]

    x = jax.ShapeDtypeStruct((1, TOKENS, WIDTH), jnp.bfloat16)
    found = jax.tree.leaves(jax.eval_shape(pull, adapters, base, x))
    numbers = sum(a.size for a in per_token(found)) / (LAYERS * TOKENS)
    assert numbers == outputs + WIDTH + WIDTH


@pytest.mark.parametrize("name", ["zimage", "klein"])
def test_what_a_norm_reads_is_kept_in_its_own_type(name):
    """With remat=none too: float32, in which a norm is computed, has twice the bytes."""
    (graphdef, adapters, base), apply, _ = stack(name, Lora, None)

    def pull(adapters, base, x):
        run = lambda adapters, x: scan_blocks(apply, nnx.merge(graphdef, adapters, base), x)
        return jax.vjp(run, adapters, x)[1]

    x = jax.ShapeDtypeStruct((1, TOKENS, WIDTH), jnp.bfloat16)
    found = jax.tree.leaves(jax.eval_shape(pull, adapters, base, x))
    wide = [a for a in per_token(found) if a.size >= LAYERS * TOKENS * WIDTH]
    assert len(wide) > 8
    assert {a.dtype.name for a in wide} == {"bfloat16"}


def test_a_gate_keeps_what_it_reads_alone():
    x = jax.ShapeDtypeStruct((1, TOKENS, WIDTH), jnp.bfloat16)
    kept = jax.tree.leaves(jax.eval_shape(lambda a, b: jax.vjp(gated, a, b)[1], x, x))
    assert len(kept) == 2


def calls(function, *arrays) -> Counter:
    """How often a loss and its gradient run each primitive, kernels by their names."""
    jaxpr = jax.make_jaxpr(jax.value_and_grad(function, argnums=(0, 1, 2)))(*arrays).jaxpr
    counts = Counter()

    def walk(jaxpr):
        for line in partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0].eqns:
            kernel = line.primitive.name == "pallas_call"
            counts[line.params["name"] if kernel else line.primitive.name] += 1
            for inner in () if kernel else jaxprs_in_params(line.params):
                walk(getattr(inner, "jaxpr", inner))

    walk(jaxpr)
    return counts


def rematerialised(run, policy):
    def loss(*qkv):
        part = lambda *qkv: jnp.sin(run(*map(jnp.sin, qkv)).astype(jnp.float32)).sum()
        return jax.checkpoint(part, policy=policy, prevent_cse=False)(*qkv)

    return loss


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("splash", "bfloat16"), ("splash", "float32"), ("cudnn", "bfloat16"), ("xla", "bfloat16")],
)
def test_attention_is_not_run_again(monkeypatch, implementation, dtype, causal, devices):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    qkv = [jax.ShapeDtypeStruct((2, 256, 4, 128), dtype)] * 3
    shape = tuple({"data": 2, "tensor": devices // 2}.get(axis, 1) if devices > 1 else 1
                  for axis in sharding.AXES)  # fmt: skip
    mesh = AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))
    run = lambda q, k, v: attention(
        q, k, v, lengths=jnp.array([200, 256]), causal=causal, implementation=implementation
    )
    with jax.sharding.use_abstract_mesh(mesh):
        ours, nothing = (calls(rematerialised(run, p), *qkv) for p in (kept.POLICY, None))
    assert ("shard_map" in ours) == (devices > 1 and implementation != "xla")
    forward = lambda found: sum(n for name, n in found.items() if "fwd" in name)
    if implementation == "xla":  # the product that makes the probabilities is, as in a kernel
        assert (ours["dot_general"], nothing["dot_general"]) == (7, 9)
    else:
        assert (forward(ours), forward(nothing)) == (1, 2)


def test_cudnn_lowers_with_what_is_kept(monkeypatch):
    """On a machine without a GPU: cuDNN's forward kernel stands once in the program."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    qkv = [jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)] * 3
    run = lambda q, k, v: cudnn_attention(q, k, v, jnp.array([64, 50]), causal=False)

    def kernels(policy):
        trace = jax.jit(jax.value_and_grad(rematerialised(run, policy), argnums=(0, 1, 2))).trace(
            *qkv
        )
        text = trace.lower(lowering_platforms=("cuda",)).as_text()
        return text.count("@__cudnn$fmhaSoftmax("), text.count("@__cudnn$fmhaSoftmaxBackward(")

    assert kernels(kept.POLICY) == (1, 1)
    assert kernels(None) == (2, 1)
