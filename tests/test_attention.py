"""Every implementation of attention is the same function."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from conftest import relative_error
from jax.extend.core import jaxprs_in_params
from jax.lax import Precision

import dopsd_jax
from dopsd_jax.common.errors import UserError
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.models import attention as attention_module
from dopsd_jax.models.attention import (
    KEY_BLOCKS,
    QUERY_BLOCKS,
    attention,
    cudnn_attention,
    resolve,
    splash_attention,
    splash_block,
)


def plain_attention(q, k, v, lengths, causal):
    """Written out in full, head by head: the definition."""
    b, n, h, d = q.shape
    m, g = k.shape[1:3]
    seen = jnp.ones((b, n, m), bool)
    if lengths is not None:
        seen &= jnp.arange(m) < lengths[:, None, None]
    if causal:
        seen &= jnp.arange(m) <= jnp.arange(n)[:, None]
    heads = []
    for head in range(h):
        group = head * g // h
        logits = jnp.einsum("bnd,bmd->bnm", q[:, :, head], k[:, :, group]) / d**0.5
        p = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        heads.append(jnp.einsum("bnm,bmd->bnd", p, v[:, :, group]))
    return jnp.stack(heads, axis=2)


def arrays(b, n, m, h, g, d, dtype=jnp.float32):
    shapes = [(b, n, h, d), (b, m, g, d), (b, m, g, d), (b, n, h, d)]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def value_and_gradients(function, q, k, v, weight):
    def loss(q, k, v):
        y = function(q, k, v)
        return jnp.sum(y * weight), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return y, *gradients


CASES = {  # b, n, m, h, g, d, lengths, causal
    "a whole block": (2, 128, 128, 2, 2, 16, None, False),
    "odd length, unequal samples": (2, 40, 40, 3, 3, 16, [40, 13], False),
    "causal, grouped, over a block": (2, 150, 150, 4, 2, 16, [150, 33], True),
    "more keys than queries, one key": (2, 33, 70, 2, 1, 24, [70, 1], False),
    "several blocks": (1, 900, 1300, 1, 1, 16, [930], False),
    "blocks of other sizes": (1, 600, 700, 1, 1, 16, [530], False),
    "causal, blocks of two sizes": (1, 700, 700, 1, 1, 16, [690], True),
}


@pytest.mark.parametrize("case", CASES)
def test_splash_and_xla_are_the_definition(case):
    *shape, lengths, causal = CASES[case]
    *qkv, weight = arrays(*shape)
    lengths = None if lengths is None else jnp.array(lengths)
    expected = value_and_gradients(lambda *x: plain_attention(*x, lengths, causal), *qkv, weight)
    kernels = {
        "splash": lambda *x: splash_attention(*x, lengths, causal=causal, interpret=True),
        "xla": lambda *x: attention(*x, lengths=lengths, causal=causal, implementation="xla"),
    }
    for name, kernel in kernels.items():
        for array, wanted in zip(value_and_gradients(kernel, *qkv, weight), expected, strict=True):
            assert relative_error(array, wanted) < 5e-6, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_splash_multiplies_in_float32_is_not_rounded(dtype):
    """Forward and backward, whatever the setting; in bfloat16 its kernels know nothing higher."""
    found = []

    def walk(jaxpr):
        for line in jaxpr.eqns:
            if line.primitive.name == "dot_general":
                found.append(line.params["precision"])
            for inner in jaxprs_in_params(line.params):
                walk(getattr(inner, "jaxpr", inner))

    run = lambda *qkv: splash_attention(*qkv, jnp.array([200]), causal=False).sum()
    with jax.default_matmul_precision("default"):
        step = jax.jit(jax.grad(jax.checkpoint(run), argnums=(0, 1, 2)))
        walk(jax.make_jaxpr(step)(*[jax.ShapeDtypeStruct((1, 256, 2, 128), dtype)] * 3).jaxpr)
    highest = [precision == (Precision.HIGHEST,) * 2 for precision in found]
    assert found and (all(highest) if dtype == "float32" else not any(highest))


def test_blocks_pad_least_and_suit_the_matrix_unit():
    for sizes, multiple in ((QUERY_BLOCKS, 128), (KEY_BLOCKS, 256)):
        assert not any(size % multiple for size in sizes)
        for length in range(1, 6000, 7):
            block = splash_block(length, sizes)
            padded = -(-length // block) * block
            usual = min(512, -(-length // 128) * 128)
            assert block % 128 == 0 and padded <= -(-length // usual) * usual
            if length > 512:
                assert padded == min(-(-length // size) * size for size in sizes)


def test_cudnn_gets_lengths_as_a_padding_mask(monkeypatch):
    """On a machine without a GPU: what is handed to cuDNN, not what it computes."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    q, k, v, _ = arrays(2, 64, 96, 4, 2, 64, jnp.bfloat16)

    def lowered(lengths, causal):
        def loss(q, k, v):
            return jnp.sum(cudnn_attention(q, k, v, lengths, causal=causal).astype(jnp.float32))

        trace = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v)
        text = trace.lower(lowering_platforms=("cuda",)).as_text()
        return text.replace("\\22", '"')

    masks = {
        (False, False): "NO_MASK",
        (True, False): "PADDING",
        (False, True): "CAUSAL",
        (True, True): "PADDING_CAUSAL",
    }
    for (padded, causal), mask in masks.items():
        text = lowered(jnp.array([96, 50]) if padded else None, causal)
        assert set(re.findall(r'"mask_type": "(\w+)"', text)) == {mask}
        assert "Backward" in text
        assert "x64x96x" not in text, "a mask or bias of n x m numbers is built"


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [200, 77]])
def test_cudnn_is_xla(lengths, causal):
    *qkv, weight = arrays(2, 200, 200, 4, 2, 128, jnp.bfloat16)
    lengths = None if lengths is None else jnp.array(lengths)
    run = lambda name: value_and_gradients(
        functools.partial(attention, lengths=lengths, causal=causal, implementation=name),
        *qkv,
        weight,
    )
    for actual, expected in zip(run("cudnn"), run("xla"), strict=True):
        assert relative_error(actual, expected) < 2e-2


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "expected"),
    [
        ("tpu", jnp.bfloat16, 128, "splash"),
        ("tpu", jnp.float32, 256, "splash"),
        ("tpu", jnp.bfloat16, 16, "xla"),
        ("gpu", jnp.bfloat16, 128, "cudnn"),
        ("gpu", jnp.float16, 16, "cudnn"),
        ("gpu", jnp.float32, 128, "xla"),
        ("gpu", jnp.bfloat16, 20, "xla"),
        ("gpu", jnp.bfloat16, 512, "xla"),
        ("cpu", jnp.bfloat16, 128, "xla"),
    ],
)
def test_auto_takes_the_kernel_of_the_platform(platform, dtype, head_dim, expected):
    assert resolve("auto", platform, dtype, head_dim) == expected
    assert resolve(expected, platform, dtype, head_dim) == expected
    assert resolve("xla", platform, dtype, head_dim) == "xla"


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "head_dim", "message"),
    [
        ("flash", "cpu", jnp.float32, 128, "config.attention: 'flash' is not auto, xla, cudnn or"),
        ("splash", "gpu", jnp.bfloat16, 128, "config.attention: splash needs a TPU, and this is g"),
        ("splash", "tpu", jnp.bfloat16, 16, "a head size that 128 divides, and the model's is 16"),
        ("cudnn", "cpu", jnp.bfloat16, 128, "cudnn needs an NVIDIA GPU, and this is cpu; set conf"),
        ("cudnn", "gpu", jnp.float32, 128, "bfloat16 or float16 activations, and these are float"),
        ("cudnn", "gpu", jnp.bfloat16, 512, "a head size of 8, 16, ... 128, and the model's is 51"),
    ],
)
def test_a_choice_that_does_not_run_is_refused(name, platform, dtype, head_dim, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(name, platform, dtype, head_dim)


def test_an_unknown_name_is_refused():
    q, k, v, _ = arrays(1, 4, 4, 1, 1, 8)
    with pytest.raises(ValueError, match="xla, cudnn, splash"):
        attention(q, k, v, implementation="flash")
    assert set(attention_module.IMPLEMENTATIONS) == {"xla", "cudnn", "splash"}


@pytest.mark.parametrize("platform, kernel", [("cpu", "xla"), ("gpu", "cudnn"), ("tpu", "splash")])
def test_a_loaded_pipeline_has_the_kernel_of_the_platform(monkeypatch, platform, kernel):
    made = Pipeline.__new__(Pipeline)
    made.dtype = jnp.dtype("bfloat16")
    made.__dict__["config"] = SimpleNamespace(head_dim=128)
    made.plan_loras = lambda loras: None
    monkeypatch.setattr("dopsd_jax.families.pipeline.pipeline", lambda *_, **__: made)
    monkeypatch.setattr("dopsd_jax.weights.hub.resolve", lambda path: SimpleNamespace(path=path))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert dopsd_jax.load_pipeline("model").attention == kernel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_keep_no_array_of_all_weights(dtype):
    """A backward pass has queries, keys, values and the output."""
    (b, n, m, h, g, d), lengths = (2, 48, 80, 6, 3, 16), jnp.array([80, 7])
    shapes = [(b, n, h, d), (b, m, g, d), (b, m, g, d)]
    run = lambda *qkv: attention(*qkv, lengths=lengths, implementation="xla")
    pull = lambda *qkv: jax.vjp(run, *qkv)[1]
    found = jax.tree.leaves(jax.eval_shape(pull, *(jax.ShapeDtypeStruct(s, dtype) for s in shapes)))
    large = [a for a in found if a.size > b * m]
    assert sorted(a.size for a in large) == sorted([*[b * n * h * d] * 2, *[b * m * g * d] * 2])
    assert {a.dtype.name for a in large} == {dtype}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_give_the_same_bits_with_and_without_a_gradient(dtype):
    """A student that has not learned yet is its own start: exactly, not nearly."""
    *keys, last = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, 48, 6, 16), (2, 80, 3, 16), (2, 80, 3, 16)]
    qkv = [jax.random.normal(*of).astype(dtype) for of in zip(keys, shapes, strict=True)]
    run = lambda *qkv: attention(*qkv, lengths=jnp.array([80, 7]), implementation="xla")
    y, *_ = value_and_gradients(run, *qkv, jax.random.normal(last, shapes[0]))
    assert (jax.jit(run)(*qkv) == y).all()
