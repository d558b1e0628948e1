"""The mesh, its placement rules, and that placement does not change a step's result."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import mesh_step
import numpy as np
import optax
import pytest
from conftest import relative_error
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from weights_helpers import run_python

from dopsd_jax.adapters import attach
from dopsd_jax.common.errors import UserError
from dopsd_jax.families import sampling
from dopsd_jax.families.zimage import family
from dopsd_jax.models import flux2, zimage, zimage_config
from dopsd_jax.models.flux2_config import Flux2Config
from dopsd_jax.parallel import sharding
from dopsd_jax.training import state

SCRIPT = pathlib.Path(__file__).with_name("mesh_step.py")


def abstract_mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("mesh") / "results.npz"
    run_python(SCRIPT, out)
    return np.load(out)


def sent(results, case):
    """(kind, type, shape without ones, count) of what a step sends between devices."""
    arrays = json.loads(str(results[f"{case}/sent"]))
    return [(k, t, tuple(n for n in shape if n > 1), count) for k, t, shape, count in arrays]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("mode", "mesh"), [c for c in mesh_step.CASES if "one" not in c[1]])
def test_a_step_is_the_same_on_every_mesh(results, mode, mesh):
    one = "one, refined" if "refined" in mesh else "one"
    for what in ("loss", "student", "teacher", "moments"):
        actual, expected = (results[f"{mode}/{m}/{what}"] for m in (mesh, one))
        assert relative_error(actual, expected) < 1e-5, what
    assert np.abs(results[f"{mode}/{one}/loss"]).min() > 1e-3
    split = mesh_step.MESHES[mesh].keys() & {"fsdp", "tensor"}
    assert bool(results[f"{mode}/{mesh}/split"]) == bool(split)
    assert not sent(results, f"{mode}/{one}")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_data_parallel_adapters_send_one_sum_of_gradients_in_float32(results):
    """Adapter gradients once a step, however many nodes and layers; besides only the losses."""
    arrays = sent(results, "lora/data")
    assert {(kind, dtype) for kind, dtype, _, _ in arrays} == {("all-reduce", "f32")}
    numbers = sum(math.prod(shape) * count for _, _, shape, count in arrays)
    adapters = results["lora/one/student"].size
    losses = 1 + 4 * 2  # the sum, and of each of two nodes: loss, error, both powers
    assert adapters <= numbers <= adapters + losses


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_fsdp_gathers_weights_and_no_activations(results, mode):
    kernels = {tuple(sorted(shape)) for shape in mesh_step.kernel_shapes()}
    arrays = sent(results, f"{mode}/fsdp")
    gathered = {
        tuple(sorted(shape)) for kind, _, shape, _ in arrays if kind in ("all-gather", "all-to-all")
    }
    small = max(mesh_step.CFG.dim * 4, mesh_step.CFG.hidden_dim)  # of one layer's modulation
    assert gathered & kernels
    assert {shape for shape in gathered - kernels if math.prod(shape) > small} == set()
    if mode == "lora":
        sums = [(math.prod(s), count) for k, _, s, count in arrays if k == "all-reduce"]
        assert sum(n * count for n, count in sums if n > small) == results["lora/one/student"].size


@pytest.mark.slow
@pytest.mark.multiprocess
def test_klein_is_the_same_on_every_axis_and_its_layers_gather_only_keys_and_values(results):
    assert relative_error(results["klein/all"], results["klein/one"]) < 1e-5
    cfg = mesh_step.KLEIN
    tokens = 16 + 5 * 5 + 3 * 4 + 1  # text, image, reference, padding
    own = mesh_step.BATCH // 2 * tokens * cfg.dim // 2  # of a device's samples and heads
    moved = [
        (math.prod(shape), count)
        for kind, _, shape, count in sent(results, "klein/all")
        if kind != "all-reduce" and len(shape) > 2
    ]
    assert {size for size, count in moved if count >= cfg.double_layers} == {own}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_lokr_is_the_same_on_every_axis(results):
    assert relative_error(results["lokr/all"], results["lokr/one"]) < 1e-5


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_kernel_runs_on_each_devices_own_samples_and_heads(results):
    assert relative_error(results["kernel/actual"], results["kernel/expected"]) < 5e-6


def test_sizes_of_a_mesh():
    assert sharding.mesh_shape({"data": -1, "fsdp": 2}, 8) == (4, 2, 1, 1)
    assert sharding.mesh_shape({"data": 2, "fsdp": 2, "context": 1, "tensor": -1}, 8) == (
        2,
        2,
        1,
        2,
    )
    assert sharding.mesh_shape({"data": -1}, 1) == (1, 1, 1, 1)
    mesh = sharding.make_mesh({"data": -1})
    assert mesh.axis_names == sharding.AXES and mesh.size == jax.device_count()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"config.mesh: data 3 x fsdp 1 .* = 3 does not equal the 8 devices"),
        ({"data": -1, "tensor": 3}, "= 3 does not divide the 8 devices"),
        ({"data": -1, "fsdp": -1}, "config.mesh.fsdp: only one axis can be -1, and data is alr"),
        ({"date": 8}, "config.mesh.date: there is no such axis; there are data, fsdp, context, t"),
        ({"data": 0}, "config.mesh.data: 0 is not a whole number of devices"),
        ({"data": 2.5}, "config.mesh.data: 2.5 is not a whole number of devices"),
    ],
)
def test_an_impossible_mesh_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.mesh_shape(sizes, 8)


def test_what_the_mesh_cannot_split_is_refused_all_at_once():
    mesh = abstract_mesh(data=4, fsdp=2, tensor=4)
    with pytest.raises(UserError) as caught:
        sharding.check(mesh, zimage_config.ZImageConfig(), batch_size=12)
    batch, heads = caught.value.problems
    assert batch.startswith("config.batch_size: 12 images cannot be spread over mesh.data 4 x mesh")
    assert batch.endswith("use a multiple of 8")
    assert heads.startswith("config.mesh.tensor: 4 does not divide the network's 30 heads")
    assert heads.endswith("it can be 1, 2, 5, 10")
    with pytest.raises(UserError) as caught:
        sharding.check(abstract_mesh(fsdp=7, context=3), zimage_config.ZImageConfig(), batch_size=7)
    fsdp, context = caught.value.problems
    assert fsdp.startswith("config.mesh.fsdp: 7 does not divide the network's width 3840; it can")
    assert fsdp.endswith("be 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 20")
    assert context.startswith("config.mesh.context: 3 does not divide the numbers of tokens, all m")
    assert context.endswith("multiples of 32; it can be 1, 2, 4, 8, 16")
    for sizes in ({"data": 4, "tensor": 5}, {"fsdp": 256}, {"context": 32, "tensor": 10}):
        sharding.check(abstract_mesh(**sizes), zimage_config.ZImageConfig(), batch_size=256)


@pytest.fixture(scope="module")
def full_base():
    """Parameters of the published network, abstract."""
    return published(zimage.ZImage, zimage_config.ZImageConfig())


def published(network, size):
    return nnx.state(nnx.eval_shape(lambda: network(size, rngs=nnx.Rngs(0))))


def local_share(state, shardings):
    sizes = jax.tree.map(lambda a, s: np.prod(s.shard_shape(a.shape)), state, shardings)
    return sum(jax.tree.leaves(sizes)) / sum(a.size for a in jax.tree.leaves(state))


def test_without_fsdp_and_tensor_the_base_is_whole_everywhere(full_base):
    shardings = sharding.state_shardings(full_base, abstract_mesh(data=8))
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 64}, {"fsdp": 4, "tensor": 2}])
def test_fsdp_and_tensor_split_nearly_everything(full_base, sizes):
    mesh = abstract_mesh(**sizes)
    klein = published(
        flux2.Flux2, Flux2Config()
    )  # has larger modulations, which tensor leaves whole
    for base, rest in ((full_base, 3e-3), (klein, 7e-3)):
        share = local_share(base, sharding.state_shardings(base, mesh))
        assert 1 / mesh.size <= share < 1 / mesh.size + rest


def test_the_layer_axis_is_never_split(full_base):
    mesh = abstract_mesh(fsdp=2, tensor=2)  # both divide the 30 layers
    spec = lambda path, *shape: sharding.parameter_spec(path, shape, mesh)
    assert spec("layers.attention.qkv.kernel", 30, 3840, 11520) == PartitionSpec(
        None, "fsdp", "tensor"
    )
    assert spec("layers.feed_forward.w2.kernel", 30, 10240, 3840) == PartitionSpec(
        None, "tensor", "fsdp"
    )
    assert spec("layers.modulation.kernel", 30, 256, 15360) == PartitionSpec(None, None, "fsdp")
    assert spec("time_out.kernel", 1024, 256) == PartitionSpec("fsdp", None)
    assert spec("layers.attention_norm1.scale", 30, 3840) == PartitionSpec()
    for leaf in jax.tree.leaves(sharding.state_shardings(full_base, mesh)):
        assert not leaf.spec or len(leaf.spec) < 3 or leaf.spec[0] is None


def by_path(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in flat}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_moments_and_teacher_are_split_as_their_parameter(full_base, name):
    tx = optax.chain(optax.clip_by_global_norm(1.0), getattr(optax, name)(1e-4))
    start = jax.eval_shape(lambda p: state.create(p, state.Teacher(), tx), full_base)
    mesh = abstract_mesh(fsdp=4, tensor=2)
    shardings, shapes = by_path(sharding.state_shardings(start, mesh)), by_path(start)
    assert shardings.keys() == shapes.keys()
    student = {p[8:]: s for p, s in shardings.items() if p.startswith("student.")}
    matched = 0
    for path, placed in shardings.items():
        parameter = next((p for p in student if path.endswith(f".{p}")), None)
        if parameter and shapes[path].shape == shapes[f"student.{parameter}"].shape:
            assert placed == student[parameter], path
            matched += 1
        else:  # counts, and Adafactor's rows and columns: small
            assert placed.is_fully_replicated, path
    assert matched > (4 if name == "adamw" else 2) * len(student) - 1
    assert local_share(start, sharding.state_shardings(start, mesh)) < 1 / 8 + 0.01


def test_adapters_are_whole_everywhere():
    cfg = zimage_config.ZImageConfig(layers=2, refiner_layers=1)
    chosen = attach.select(attach.slots(zimage_config.names(cfg)), "blocks", family.LORA_PRESETS)

    def build():
        net = zimage.ZImage(cfg, rngs=nnx.Rngs(0))
        attach.attach(net, chosen, 4, 4.0, jax.random.key(0))
        return nnx.split(net, nnx.LoRAParam, ...)[1]

    student = nnx.eval_shape(build)
    start = jax.eval_shape(lambda p: state.create(p, state.Teacher(), optax.adamw(1e-4)), student)
    placed = jax.tree.leaves(sharding.state_shardings(start, abstract_mesh(fsdp=2, tensor=2)))
    assert placed and all(s.is_fully_replicated for s in placed)


def test_what_does_not_divide_stays_whole():
    mesh = abstract_mesh(fsdp=8, tensor=3)
    spec = sharding.parameter_spec("layers.attention.out.kernel", (2, 100, 64), mesh)
    assert spec == PartitionSpec(None, None, "fsdp")
    assert sharding.parameter_spec("x.kernel", (3, 3), mesh) == PartitionSpec(None, None)
    assert sharding.axes_dividing(abstract_mesh(data=2, fsdp=3), ("data", "fsdp"), 4) == ("data",)
    assert sharding.axes_dividing(abstract_mesh(data=2, fsdp=3), ("data", "fsdp"), 6) == (
        "data",
        "fsdp",
    )
    assert sharding.axes_dividing(abstract_mesh(), ("data", "fsdp"), 6) is None


def test_a_batch_on_the_mesh_is_the_batch():
    mesh = sharding.make_mesh({"data": -1})
    host = {"a": np.arange(24.0, dtype=np.float32).reshape(1, 4, 6), "b": np.ones((1, 4), np.int32)}
    placed = sharding.put_batch(host, mesh)
    for name, array in host.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].dtype == array.dtype


def test_constraints_do_nothing_without_a_mesh():
    x = jnp.ones((3, 2))
    assert sharding.constrain_batch(x) is x


def test_a_backward_pass_keeps_no_copy_of_a_base_that_is_whole_everywhere():
    """Without recomputation a scan keeps what its layers need: of a frozen base only the base."""
    cfg = dataclasses.replace(mesh_step.CFG, layers=3)

    def build():
        net = zimage.ZImage(cfg, remat="none", rngs=nnx.Rngs(0))
        slots = attach.slots(zimage_config.names(cfg))
        attach.attach(
            net, attach.select(slots, "blocks", family.LORA_PRESETS), 4, 4.0, jax.random.key(0)
        )
        return net

    graph, adapters, base = nnx.split(nnx.eval_shape(build), nnx.LoRAParam, ...)
    context = family.Context(jnp.zeros((8, 32, cfg.caption_dim)), jnp.full(8, 32))
    x = jnp.zeros((8, 8, 8, cfg.channels))

    def loss(adapters, base):
        return sampling.velocity(family, graph, adapters, base, x, 0.5, context).sum()

    with jax.sharding.use_abstract_mesh(abstract_mesh(data=8)):
        traced = jax.make_jaxpr(jax.grad(loss))(adapters, base)
    stacked = {leaf.shape for leaf in jax.tree.leaves(base) if leaf.ndim == 3}
    made = {var.aval.shape for eqn in scans(traced.jaxpr) for var in eqn.outvars}
    assert stacked and made and not stacked & made


def scans(jaxpr):
    """Every loop of a traced program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from scans(getattr(inner, "jaxpr", inner))
