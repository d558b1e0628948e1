"""Products of 8-bit floats in the teacher's forward: how far they are off, and where they are."""

import functools
import json
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import problems_of, relative_error, run_program
from flax import nnx
from jax.sharding import Mesh
from test_baselines import NET
from test_baselines import world as batch_world
from test_dopsd import GRID, nodes, toy_denoiser, world
from test_estimate import CASE, load_config
from test_losses import SCHEDULE
from test_step_waste import workload
from weights_helpers import run_python

from dopsd_jax import dopsd
from dopsd_jax.adapters import attach
from dopsd_jax.config import schema
from dopsd_jax.config.fields import defaults
from dopsd_jax.config.loading import load
from dopsd_jax.estimation import abstract_step, counted_step
from dopsd_jax.evaluation import teacher_rounding
from dopsd_jax.methods import registry
from dopsd_jax.models import fp8, quantised
from dopsd_jax.models.layers import Dense, rounded
from dopsd_jax.parallel import sharding
from dopsd_jax.run import build

DOT = r"f8E4M3FN>, tensor<[\dx]+xf8E4M3FN>\)"  # the operands of a product, in StableHLO


def numbers(*shape, seed=0):
    """Of very different sizes, as a trained network has."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape))).astype(np.float32)


# Products.


@pytest.mark.parametrize("axis", [0, -1])
def test_codes_are_the_nearest_numbers_of_the_type(axis):
    x = numbers(48, 32)
    codes, scales = jax.jit(fp8.rounded, static_argnums=1)(x, axis)
    np.testing.assert_allclose(scales, np.abs(x).max(axis) / 448, rtol=2.0**-22)
    nearest = (x / np.expand_dims(scales, axis)).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(codes).view(np.uint8), nearest.view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_as_far_off_as_its_operands_are_rounded(dtype):
    """A number of 3 bits after the first is off by 2^-4 of itself at most, or, where it is so small
    that it has fewer, by 2^-10 of its scale. The errors of two factors add, and multiply."""
    x, w = jnp.asarray(numbers(2, 24, 64), dtype), jnp.asarray(numbers(64, 40, seed=1))
    codes, scales = fp8.rounded(w, 0)
    y = jax.jit(fp8.product)(x, codes, scales)
    assert y.dtype == x.dtype and y.shape == (2, 24, 40)
    wide = lambda a: np.asarray(a, np.float64)
    x, w = wide(x), wide(w)
    most = lambda a, axis: np.maximum(
        2.0**-4 * np.abs(a), 2.0**-10 * np.abs(a).max(axis, keepdims=True) / 448
    )
    dx, dw = most(x, -1), most(w, 0)
    bound = np.abs(x) @ dw + dx @ np.abs(w) + dx @ dw
    # What the result's own type rounds; bfloat16 does so twice, before and after the scales.
    last = 2 * float(jnp.finfo(dtype).eps) * (np.abs(x @ w) + bound)
    error = np.abs(wide(y) - x @ w)
    assert (error <= bound + last).all()
    assert (error / bound).max() > 0.1, "the bound says nothing"
    exact = (wide(fp8.rounded(x, -1)[0]) @ wide(codes)) * wide(fp8.rounded(x, -1)[1])[..., None]
    assert relative_error(y, exact * wide(scales)) < (1e-5 if dtype == "float32" else 2.0**-7)


def test_a_token_depends_on_no_other():
    w = fp8.rounded(jnp.asarray(numbers(64, 40, seed=1)), 0)
    x = numbers(3, 64)
    own = np.asarray(fp8.product(jnp.asarray(x), *w))
    others = x.copy()
    others[1:] *= 1e6
    np.testing.assert_array_equal(fp8.product(jnp.asarray(others), *w)[0], own[0])
    others[1], others[2] = 0.0, np.nan
    found = np.asarray(fp8.product(jnp.asarray(others), *w))
    np.testing.assert_array_equal(found[0], own[0])
    assert not found[1].any() and np.isnan(found[2]).all()
    others[2] = x[2]
    others[2, 0] = np.inf
    assert not np.isfinite(fp8.product(jnp.asarray(others), *w)[2]).any()


@pytest.mark.parametrize("scheme", quantised.SCHEMES)
def test_a_quantised_kernel_is_rounded_once_if_its_codes_are_of_the_type(scheme):
    parts = quantised.quantise_kernel(jnp.asarray(numbers(64, 40)), scheme)
    kernel = quantised.QuantisedKernel(parts["codes"], parts["scales"], scheme)
    codes, scales = kernel.rounded()
    whole = quantised.dequantise(parts["codes"], parts["scales"], scheme)
    if scheme == "fp8":
        np.testing.assert_array_equal(codes, parts["codes"])
        np.testing.assert_array_equal(codes.astype(jnp.float32) * scales, whole)
    else:
        for mine, theirs in zip((codes, scales), fp8.rounded(whole, 0), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_only_large_kernels_of_blocks_are_rounded_and_no_adapter():
    class Owner(nnx.Module):
        def __init__(self, rngs):
            self.block = nnx.Dict(attention=nnx.Dict(out=Dense(64, 64, bias=True, rngs=rngs)))
            self.other = Dense(64, 64, rngs=rngs)

    owner = Owner(nnx.Rngs(0))
    slots = {name: attach.Slot(name, 0, None, 64, 64) for name in ("block.attention.out", "other")}
    attach.attach(owner, slots, 40, 40.0, jax.random.key(0))
    graphdef, adapters, base = nnx.split(owner, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapters)
    strong = jax.tree.unflatten(tree, [a + 0.1 for a in leaves])
    x = jnp.asarray(numbers(80, 64))  # so many rows that the exact layer merges its adapter

    def run(graph, adapters):
        net = nnx.merge(graph, adapters, base)
        return np.asarray(net.block.attention.out(x)), np.asarray(net.other(x))

    graph = rounded(graphdef, adapters, base)
    marked = nnx.merge(graph, adapters, base)
    assert marked.block.attention.out.rounds and not marked.other.rounds
    (exact, other), (found, same) = run(graphdef, strong), run(graph, strong)
    np.testing.assert_array_equal(other, same)
    assert 1e-3 < relative_error(found, exact) < 0.1
    none = jax.tree.map(jnp.zeros_like, adapters)
    added = (found - run(graph, none)[0]) - (exact - run(graphdef, none)[0])
    assert np.abs(added).max() < 1e-5 * np.abs(exact).max()


# Where they are.


def config_of(name, **fields):
    config = defaults()
    config.family, config.model = name, build.RANDOM
    config.dtype = config.base_dtype = "float32"
    config.batch_size, config.lora.rank = 1, 4
    config.grid, config.data.path = "1,0.6", "photos"
    config.update_from_flattened_dict(fields)
    return config


def lowered(name, platform="cpu", **fields):
    """The text of the step that the compiler of a platform is given."""
    config = config_of(name, **fields)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    program = abstract_step.make_program(config, workload(name), mesh, "cpu")
    given = program.plan.abstract_state, program.base, program.batch, 0, program.anchors
    traced = program.plan.step.trace(*given, latent=program.latent)
    return traced.lower(lowering_platforms=(platform,)).as_text()


SCRIPT = pathlib.Path(__file__).with_name("fp8_mesh.py")
OFF = 0.25
KERNELS = {"zimage": 3 * 4, "flux2_klein": 8 + 2}  # large ones of a layer of each stack
LAYERS = {"zimage": (2 + 2 + 5) * 4, "flux2_klein": 2 * 8 + 5 * 2}  # and of all of them


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("zimage", {"remat": "full"}, KERNELS),
        ("zimage", {"remat": "unrolled", "teacher.weights": "live"}, LAYERS),
        ("zimage", {"train": "full", "remat": "dots"}, KERNELS),
        ("zimage", {"base_dtype": "nf4", "teacher.weights": "frozen"}, KERNELS),
        ("zimage", {"anchor.share": 0.5}, KERNELS),
        ("zimage", {"method": "offpolicy", "remat": "none"}, KERNELS),
        ("zimage", {"method": "sft_teacher", "remat": "none"}, KERNELS),
        ("flux2_klein", {"remat": "full", "dtype": "bfloat16"}, KERNELS),
        ("flux2_klein", {"train": "full", "remat": "unrolled"}, LAYERS),
        ("flux2_klein", {"anchor.share": 0.5, "lora.kind": "lokr"}, KERNELS),
    ],
)
def test_each_large_product_of_the_teacher_is_rounded_and_no_other(name, fields, count):
    """Once, whatever else is in the step: none of the student's, in either direction, and none of
    the anchors'."""
    text = lowered(name, "cuda", **fields, **{"teacher.products": "fp8"})
    assert len(re.findall(DOT, text)) == count[name]


@pytest.mark.parametrize("name", KERNELS)
def test_without_the_option_nothing_is_rounded(name):
    assert "f8E4M3FN" not in lowered(name)


def test_the_compiled_step_has_them():
    text = lowered_compiled("zimage", **{"teacher.products": "fp8"})
    assert "f8e4m3fn" in text and "f8e4m3fn" not in lowered_compiled("zimage")


def lowered_compiled(name, **fields):
    config = config_of(name, **fields)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    program = abstract_step.make_program(config, workload(name), mesh, "cpu")
    given = program.plan.abstract_state, program.base, program.batch
    return program.plan.step.lower(*given, latent=program.latent).compile().as_text()


# What the student learns.


def off(net: dopsd.Denoiser) -> dopsd.Denoiser:
    """A network whose rounded products are off by a constant."""
    return net._replace(rounded=net._replace(velocity=lambda *args: net.velocity(*args) + OFF))


def learn(net, student, teacher, base, contexts, noise, which):
    own = functools.partial(dopsd.loss_and_gradient, net)
    return jax.jit(own)(student, teacher, base, contexts, noise, which)


def test_the_teachers_velocity_is_the_rounded_one_and_the_students_own_is_not():
    base, student, teacher, contexts, noise = world()
    given = student, teacher, base, contexts, noise, nodes("velocity")
    exact, found = (learn(net, *given) for net in (toy_denoiser(), off(toy_denoiser())))
    # The student visits the same states with the same velocities, bit for bit.
    np.testing.assert_array_equal(found[0].power[:, 0], exact[0].power[:, 0])
    assert relative_error(found[0].power[:, 1], exact[0].power[:, 1]) > 1e-2
    # The gradient is of the same loss with another target: d/ds mean (v - t - c)^2 is linear in c.
    pulled = jax.tree.map(lambda a, b: b - a, exact[1], found[1])

    def push(student):
        net, total, x = toy_denoiser(), 0.0, noise
        precomputed = net.precompute(student, base, contexts.student)
        for sigma, following in zip(*nodes("velocity")[:2], strict=True):
            v = net.velocity(student, base, x, sigma, contexts.student, precomputed)
            total += jnp.mean(-2 * OFF * v) / 4
            x = jax.lax.stop_gradient(x + (following - sigma) * v)
        return total

    expected = jax.grad(push)(student)
    for name in expected:
        assert relative_error(pulled[name], expected[name]) < 1e-4


def test_a_student_that_is_held_to_its_start_is_not_pulled_away_from_it():
    """Anchors, and nodes at which the teacher is not told: equal weights give no gap at all."""
    base, student, _, contexts, noise = world()
    net, key = off(toy_denoiser()), jax.random.key(0)
    half = nodes("velocity")._replace(told=jnp.arange(4) % 2 == 0)
    losses, _ = learn(net, student, dopsd.Teachers(student, student), base, contexts, noise, half)
    assert (losses.mse[1::2] == 0).all() and (losses.mse[::2] > 0).all()
    config = load("zimage:random", {"anchor.share": "0.5"})
    of_anchors = registry.anchor_loss(config, net, SCHEDULE)
    losses, gradient = of_anchors(student, student, base, contexts.student, noise, key)
    assert (losses.mse == 0).all()
    assert not any(g.any() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("method", ["dopsd", "offpolicy", "sft_teacher"])
def test_every_method_asks_its_teacher_so(method):
    base, student, teacher, batch, draws = batch_world()
    config = load("zimage:random", {"method": method})
    found = []
    for net in (NET, off(NET)):
        loss = registry.loss_function(config, net, SCHEDULE)
        own = draws.start if registry.method(config).start_only else draws
        losses, _ = loss(student, teacher, base, batch, own, jax.random.key(7))
        found.append(np.asarray(losses.total))
    assert relative_error(found[1], found[0]) > 1e-2


@pytest.mark.slow
@pytest.mark.multiprocess
def test_placement_changes_the_velocity_by_little_beside_the_rounding():
    run_python(SCRIPT)


# Settings, devices, what `check` says.


def test_methods_without_a_teacher_refuse_it():
    fields = {"teacher.products": "fp8", "method": "sft", "data.path": "x"}
    (line,) = problems_of(schema.check, load_config(**fields), ["teacher.products"])
    assert line == ("config.teacher.products: has no effect with config.method = sft; leave it out")
    schema.check(load_config(**fields | {"method": "dopsd"}), ["teacher.products"])
    assert not registry.rounds(load_config(**fields))


@pytest.mark.parametrize(
    ("platform", "kind", "version", "lack"),
    [
        ("gpu", "NVIDIA A100-SXM4-80GB", "8.0", "capability 8.9 or more, and this NVIDIA A100"),
        ("gpu", "NVIDIA L40S", "8.9", None),
        ("gpu", "NVIDIA H200", "9.0", None),
        ("gpu", "NVIDIA B200", "10.0", None),
        ("gpu", "AMD Instinct MI300X", "gfx942", None),
        ("tpu", "TPU v5 lite", None, "a TPU7x, and this is a TPU v5 lite"),
        ("tpu", "TPU7x", None, None),
        ("cpu", "cpu", None, None),
    ],
)
def test_a_device_without_such_products_is_refused(platform, kind, version, lack):
    own = {"platform": platform, "device_kind": kind}
    device = type("Device", (), own | ({"compute_capability": version} if version else {}))()
    mesh = Mesh(np.full((1, 1, 1, 1), device), sharding.AXES)
    own = load_config(**{"teacher.products": "fp8"}), mesh
    if lack is None:
        return build.check_products(*own)
    (line,) = problems_of(build.check_products, *own)
    assert line.startswith("config.teacher.products: fp8 needs ") and lack in line


@pytest.mark.parametrize(
    ("card", "method", "refused"),
    [("A100", "dopsd", True), ("3090", "dopsd", True), ("A100", "sft", False),
     ("H100", "dopsd", False), ("RTX 4090", "dopsd", False), ("80GB", "dopsd", False)],
)  # fmt: skip
def test_an_estimate_for_a_card_refuses_what_training_on_it_would(card, method, refused):
    """Of a card that is named by its memory nobody knows."""
    config = load_config("random", **{"teacher.products": "fp8", "method": method})
    gpu = counted_step.find_gpu(card)
    if refused:
        (line,) = problems_of(counted_step.count_step, config, CASE, gpu)
        assert line.startswith("config.teacher.products: fp8 needs a GPU of compute capability 8.9")
        assert f"this {gpu.name} has 8." in line
    else:
        assert counted_step.count_step(config, CASE, gpu).needed


def test_check_says_how_large_the_rounding_is_beside_the_gap():
    base, student, teacher, contexts, noise = world()
    one = lambda tree: jax.tree.map(lambda x: x[:1], tree)
    sample = SimpleNamespace(contexts=one(contexts), noise=noise[:1])
    pipe = SimpleNamespace(mesh=None, split=(None, None, base))
    own = pipe, off(toy_denoiser()), student, teacher, lambda height, width: GRID
    found = teacher_rounding.Measurement(*own)(sample)
    net, x = toy_denoiser(), noise[:1]
    told = sample.contexts.teacher
    v = net.velocity(teacher, base, x, GRID[0], told, net.precompute(teacher, base, told))
    size = np.sqrt(np.mean(np.square(v)))
    assert found.error[0] == pytest.approx(OFF / size, rel=1e-5)
    moved = np.asarray(v) + OFF
    assert found.norm_ratio[0] == pytest.approx(np.sqrt(np.mean(moved**2)) / size, rel=1e-5)
    cosine = float(np.sum(moved * v) / np.linalg.norm(moved) / np.linalg.norm(v))
    assert found.cosine[0] == pytest.approx(cosine, rel=1e-5)
    rows = [teacher_rounding.Rounding(*(np.full(2, n) for n in (0.1, gap, 1, 0.999)))
            for gap in (0.3, 0.5)]  # fmt: skip
    (line,) = teacher_rounding.describe(rows)
    assert line == (
        "teacher.products = fp8: relative error of the teacher's velocity by step 0.100 0.100, "
        "beside a gap to the student of 0.400 0.400; norm ratio 1.000 1.000, cosine 0.9990 0.9990"
    )
    large = [row._replace(gap=row.gap / 3) for row in rows]
    assert teacher_rounding.describe(large)[1].startswith("warning: the rounding is more than half")


@pytest.mark.slow
def test_the_miniature_learns_the_same(tmp_path):
    few = ("--config.steps=4", "--config.sample_every=0", "--config.sample_rows=1")
    gaps = {}
    for products in ("dtype", "fp8"):
        own = f"--config.teacher.products={products}", f"--workdir={tmp_path / products}"
        done = run_program("train", "--config=configs/zimage.py:tiny", *few, *own)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / products / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "gap" in row]
        gaps[products] = np.array([row["gap"] for row in rows])
        assert rows[0]["anchor_gap"] == 0 and rows[-1]["anchor_gap"] > 0
    assert len(gaps["fp8"]) == 4 and (gaps["fp8"] != gaps["dtype"]).all()
    assert relative_error(gaps["fp8"], gaps["dtype"]) < 0.02
