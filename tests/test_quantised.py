"""A base in few bits: how far its weights are off; that results and gradients are those of them."""

import importlib.util
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from conftest import relative_error
from flax import nnx
from test_estimate import CASE, TINY, load_config, needs_libtpu
from test_lora import CFG, choose, noisy
from weights_helpers import SMALL, TRANSFORMER, run_python, same_modules

import dopsd_jax
from dopsd_jax import dopsd
from dopsd_jax.adapters import attach
from dopsd_jax.common.errors import UserError
from dopsd_jax.config import schema
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.estimation import abstract_step, compiled_step, tpu_topologies
from dopsd_jax.families.zimage import family
from dopsd_jax.models import quantised, zimage, zimage_config
from dopsd_jax.models.layers import Dense, scan_blocks, stack
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights.load import load_component

SCHEMES = sorted(quantised.SCHEMES)
SCRIPT = pathlib.Path(__file__).with_name("quantised_mesh.py")


def kernel(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape or (128, 48)) * 0.05


def whole(parts, scheme):
    return quantised.dequantise(parts["codes"], parts["scales"], scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_weight_is_further_off_than_half_a_gap(scheme):
    w = kernel()
    parts = quantised.quantise_kernel(w, scheme)
    error = np.abs(np.asarray(whole(parts, scheme) - w))
    scale = np.repeat(parts["scales"], len(w) // len(parts["scales"]), axis=0)
    bound = {
        "int8": 0.5 * scale,
        "fp8": np.maximum(2.0**-4 * np.abs(w), 2.0**-10 * scale),  # 3 bits of mantissa; subnormals
        "nf4": max(np.diff(quantised.NF4)) / 2 * scale,
    }[scheme]
    assert (error <= bound * (1 + 1e-4)).all()
    assert error.max() > 0.5 * bound.min(), "the bound says nothing"
    assert parts["scales"].dtype == jnp.float32
    tiles = {"int8": 1, "fp8": 1, "nf4": 2}[scheme]
    assert parts["codes"].shape == w.shape and parts["scales"].shape == (tiles, 48)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_those_of_qwix_whatever_the_codes(scheme):
    codes = quantised.quantise_kernel(kernel(3, 128, 16), scheme)
    qtype = quantised.SCHEMES[scheme].qtype
    expected = qwix.dequantize(qwix.QArray(codes["codes"], codes["scales"], qtype=qtype))
    np.testing.assert_array_equal(whole(codes, scheme), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_are_quantised_by_themselves(scheme):
    stacked = kernel(3, 96, 16) * jnp.array([1.0, 100.0, 0.0])[:, None, None]
    parts = quantised.quantise_kernel(stacked, scheme)
    for i, layer in enumerate(stacked):
        alone = quantised.quantise_kernel(layer, scheme)
        for name in alone:
            np.testing.assert_array_equal(parts[name][i], alone[name])
    np.testing.assert_array_equal(whole(parts, scheme)[2], 0.0)


def test_a_tile_divides_the_inputs():
    parts = quantised.quantise_kernel(kernel(100, 8), "nf4")
    assert parts["scales"].shape == (2, 8)


def dense(scheme, din=128, dout=(16, 32)):
    class Owner(nnx.Module):  # a path that is quantised, and one that is not
        def __init__(self, rngs):
            self.block = nnx.Dict(attention=nnx.Dict(qkv=Dense(din, dout, rngs=rngs)))
            self.other = Dense(din, dout, rngs=rngs)

    owner = quantised.quantised(Owner(nnx.Rngs(0)), scheme)
    assert isinstance(owner.other.kernel, nnx.Param)
    return owner.block.attention.qkv


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_product_and_its_gradient_are_those_of_the_whole_kernel(scheme, dtype):
    layer = dense(scheme)
    attach.attach(
        nnx.Dict(dense=layer),
        {str(i): attach.Slot("dense", i, None, 128, n) for i, n in enumerate((16, 32))},
        4,
        8.0,
        jax.random.key(0),
    )
    graphdef, adapter, base = nnx.split(layer, nnx.LoRAParam, ...)
    adapter = noisy(adapter)
    plain = Dense(128, (16, 32), rngs=nnx.Rngs(0))
    plain.kernel = nnx.Param(whole({n: base.kernel[n][...] for n in ("codes", "scales")}, scheme))
    plain.adapters = layer.adapters
    graphdef2, _, base2 = nnx.split(plain, nnx.LoRAParam, ...)
    x = jax.random.normal(jax.random.key(1), (2, 5, 128), dtype)

    def run(graphdef, base):
        def loss(adapter, x):
            y = nnx.merge(graphdef, adapter, base)(x)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(adapter, x)

    (ours, y), (theirs, expected) = run(graphdef, base), run(graphdef2, base2)
    bound = 1e-5 if dtype == "float32" else 1e-2
    assert y.dtype == x.dtype
    assert relative_error(y, expected) < bound
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert relative_error(a, b) < bound


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_kernel_is_kept_whole_for_the_backward_pass(remat):
    """What waits of a stack of layers is codes, not what they stand for, whatever the remat."""
    make = lambda rngs: nnx.Dict(block=nnx.Dict(attention=nnx.Dict(out=Dense(64, 64, rngs=rngs))))
    blocks = quantised.quantised(stack(make, 3, nnx.Rngs(0)), "int8")
    apply = lambda block, x: jnp.sin(block.block.attention.out(x))
    f = lambda x: scan_blocks(apply, blocks, x, remat).sum()
    _, pull = jax.vjp(f, jnp.ones((2, 64)))
    kept = [x for x in jax.tree.leaves(pull) if hasattr(x, "dtype") and x.size >= 64 * 64]
    assert {x.dtype for x in kept} <= {jnp.dtype("int8")}
    assert sum(x.size for x in kept) <= 3 * 64 * 64


def network(scheme):
    """(graph, adapters that are not zero, base) quantised; the same with the weights it stands for.

    The second one's kernels are dequantised float32.
    """
    net = zimage.ZImage(CFG, remat="full", rngs=nnx.Rngs(0))
    for name in ("layers", "noise_refiner"):  # open gates: otherwise little would be seen
        getattr(net, name).modulation.bias[...] += 0.5
    chosen = choose("blocks")
    attach.attach(net, chosen, 4, 8.0, jax.random.key(1))
    plain = nnx.split(net, nnx.LoRAParam, ...)
    flat = dict(nnx.to_flat_state(plain[2]))
    for path, var in flat.items():
        if quantised.is_quantised(".".join(map(str, path))):
            w = whole(quantised.quantise_kernel(var[...], scheme), scheme)
            flat[path] = var.replace(w)
    graphdef, adapter, base = nnx.split(quantised.quantised(net, scheme), nnx.LoRAParam, ...)
    exact = plain[0], adapter, nnx.from_flat_state(flat.items())
    return (graphdef, adapter, base), exact


@pytest.fixture(scope="module")
def networks():
    return "int8", *network("int8")


def step(graphdef, student, teacher, base):
    rng = np.random.default_rng(0)
    context = lambda rows: family.Context(
        jnp.asarray(rng.standard_normal((2, rows, CFG.caption_dim), np.float32)), np.array([9, 30])
    )
    contexts = dopsd.Contexts(context(32), context(64))
    noise = jnp.asarray(rng.standard_normal((2, 8, 8, 4), np.float32))
    nodes = dopsd.make_nodes((1.0, 0.6, 0.0), "x0", "all", jax.random.key(0))
    f = lambda s, t, b: dopsd.loss_and_gradient(
        family.denoiser(graphdef), s, t, b, contexts, noise, nodes
    )
    return jax.jit(f)(student, teacher, base)


@pytest.mark.slow
def test_a_step_is_that_of_the_network_with_the_dequantised_weights(networks):
    _, (graphdef, adapter, base), (graphdef2, _, base2) = networks
    student, teacher = noisy(adapter), noisy(adapter, seed=5)
    losses, gradient = step(graphdef, student, teacher, base)
    expected, exact = step(graphdef2, student, teacher, base2)
    assert relative_error(losses.per_step, expected.per_step) < 1e-5
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    assert relative_error(flat(gradient), flat(exact)) < 1e-5


def test_a_new_student_is_the_quantised_base(networks):
    scheme, (graphdef, adapter, base), _ = networks
    bare = quantised.quantised(zimage.ZImage(CFG, rngs=nnx.Rngs(0)), scheme)
    graphdef2, none, base2 = nnx.split(bare, nnx.LoRAParam, ...)
    for name in ("layers", "noise_refiner"):
        base2[name].modulation.bias[...] += 0.5
    x, context = (
        jnp.ones((1, 4, 4, 4)),
        family.Context(np.ones((1, 32, 20), np.float32), np.array([9])),
    )

    def run(graphdef, adapter, base):
        net = family.denoiser(graphdef)
        return net.velocity(adapter, base, x, 0.6, context, net.precompute(adapter, base, context))

    ours = run(graphdef, adapter, base)
    np.testing.assert_array_equal(ours, run(graphdef2, none, base2))
    assert relative_error(run(graphdef, noisy(adapter), base), ours) > 1e-3


# Loading.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model as PyTorch stores it, and converted."""
    base = tmp_path_factory.mktemp("quantised")
    write_random_model(base / "model", size=SMALL)
    import_model(base / "model", base / "converted", part_bytes=60_000)
    return base / "model", base / "converted"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_loaded_is_the_loaded_model_quantised(folders, scheme):
    model, converted = folders
    expected = quantised.quantised(load_component(model / "transformer", TRANSFORMER), scheme)
    for folder in (model, converted):
        loaded = load_component(folder / "transformer", TRANSFORMER, scheme=scheme)
        same_modules(loaded, expected)
    short = load_component(
        model / "transformer", TRANSFORMER, scheme=scheme, dtype=quantised.stored_type(scheme)
    )
    types = {v.dtype for p, v in nnx.to_flat_state(nnx.state(short, nnx.Param))}
    assert types == {jnp.dtype("bfloat16")}
    # Codes are made of the stored weights, not of those rounded to bfloat16.
    np.testing.assert_array_equal(
        short.layers.attention.qkv.kernel.codes[...],
        expected.layers.attention.qkv.kernel.codes[...],
    )


def test_a_whole_stack_is_never_on_the_device(folders, monkeypatch):
    seen = []
    original = quantised.quantise_kernel
    monkeypatch.setattr(
        quantised, "quantise_kernel", lambda w, s: (seen.append(w.shape), original(w, s))[1]
    )
    load_component(folders[0] / "transformer", TRANSFORMER, scheme="int8")
    stacked = [shape for shape in seen if len(shape) == 3]
    # Three stacks of four kernels are looked at as shapes; what is computed is one layer.
    assert len(stacked) == 3 * 4 and all(len(s) == 2 for s in seen if s not in stacked)


def test_a_pipeline_has_a_quantised_base_if_asked(folders):
    def run(base_dtype):
        pipe = dopsd_jax.load_pipeline(str(folders[0]), base_dtype=base_dtype)
        rng = np.random.default_rng(0)
        features = rng.standard_normal((1, 32, pipe.config.caption_dim), np.float32)
        context = family.Context(features, np.array([20]))
        return pipe.velocity(jnp.ones((1, 4, 4, pipe.config.channels)), 0.9, context)

    with pytest.raises(UserError, match=r"base_dtype: 'int7' is not one of .*int8"):
        run("int7")
    assert 1e-4 < relative_error(run("int8"), run(None)) < 0.05


# Settings.


def test_without_qwix_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load_config(**{"base_dtype": "int8", "data.path": "x"})
    for act in (
        lambda: schema.check(config),
        lambda: quantised.quantise_kernel(kernel(), "int8"),
    ):
        with pytest.raises(UserError, match=r"config.base_dtype: .*dopsd_jax\[quant\]") as caught:
            act()
        assert len(caught.value.problems) == 1
    schema.check(load_config(**{"data.path": "x"}))


def test_other_types_are_refused():
    with pytest.raises(
        UserError, match=r"base_dtype: 'int4' is not one of bfloat16, float32, int8"
    ):
        schema.check(load_config(**{"base_dtype": "int4", "data.path": "x"}))


# On devices.


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("fp8", 8), ("nf4", 4)])
def test_a_footprint_counts_codes(scheme, bits, monkeypatch):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: not compiled here")
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self, **given: (_ for _ in ()).throw(full)
    )
    config = load_config("random", base_dtype=scheme)
    report = compiled_step.compile_step(config, CASE, jax.devices()[:1])
    sizes = {True: 0, False: 0}
    for leaf in zimage_config.names(TINY):
        sizes[quantised.is_quantised(leaf.path)] += math.prod(leaf.shape)
    scales = report.account.live["base"] - sizes[True] * bits / 8 - 2 * sizes[False]
    assert 0 < scales < sizes[True]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_placement_does_not_change_the_result():
    run_python(SCRIPT)


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.slow
def test_the_tpu_compiler_makes_no_copy_of_the_base():
    """It does not dequantise all layers before the loop over them, or before that over the steps.

    The base is large against all else here, so that a copy of it would be seen.
    """
    size = zimage_config.ZImageConfig(
        dim=768, layers=12, refiner_layers=1, heads=6, caption_dim=64, axes_dims=(32, 48, 48)
    )
    case = abstract_step.Workload(
        family, size, height=128, width=128, rows_student=32, rows_teacher=64
    )
    config = load_config(base_dtype="int8", batch_size=1, **{"lora.rank": 4, "lora.alpha": 8.0})
    with jax.default_matmul_precision("default"):
        devices = tpu_topologies.devices("v5e-1")
        report = compiled_step.compile_step(config, case, devices)
    kernels = [leaf for leaf in zimage_config.names(size) if quantised.is_quantised(leaf.path)]
    weights = sum(np.prod(leaf.shape) for leaf in kernels)
    assert report.temporaries < weights / 2, "bfloat16 copies would have 2 bytes a weight"
