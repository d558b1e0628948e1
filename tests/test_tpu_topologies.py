"""TPU slices by name, and meshes on them: devices of the compiler, which are not here."""

import jax
import pytest
from jax.experimental import topologies
from test_estimate import needs_libtpu

from dopsd_jax.common.errors import UserError
from dopsd_jax.estimation import flops, tpu_topologies
from dopsd_jax.parallel import sharding


@needs_libtpu
@pytest.mark.tpu_aot
def test_an_unknown_slice_is_refused():
    with pytest.raises(
        UserError, match=r"--topology: v99:2x2: .*give local, a product such as v5p"
    ):
        tpu_topologies.devices("v99:2x2")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("v5litepod-1", "v5e:1x1"),
        ("v5e-8", "v5e:2x4"),
        ("v6e-256", "v6e:16x16"),
        ("v5p-8", "v5p:2x2x1"),  # TensorCores: four chips
        ("v5p-128", "v5p:4x4x4"),
        ("tpu7x-2", "tpu7x:1x1x1"),
        ("tpu7x-8", "tpu7x:2x2x1"),
        ("v5p:2x2x1", "v5p:2x2x1"),
        ("tpu7x:2x2x1", "tpu7x:2x2x1"),
    ],
)
def test_products_are_known_by_name(name, layout):
    assert tpu_topologies.chips(name) == layout


def test_an_unknown_product_is_refused():
    message = "no such slice; the number counts TensorCores, two a chip, and there are v5p-8, 16"
    with pytest.raises(UserError, match=message):
        tpu_topologies.devices("v5p-4")
    message = "TensorCores, two a chip, and there are tpu7x-2, 8, 16, .* chips, such as tpu7x:2x2x1"
    with pytest.raises(UserError, match=message):
        tpu_topologies.devices("tpu7x-4")
    with pytest.raises(UserError, match="the number counts chips, and there are v6e-1, 4, 8"):
        tpu_topologies.devices("v6e-2")


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("name", "chips"),
    [
        *[("v5e-1", 1), ("v5e-4", 4), ("v6e-1", 1), ("v5p-8", 4), ("v5p:4x4x4", 64)],
        *[("tpu7x-2", 1), ("tpu7x-8", 4), ("tpu7x:4x4x4", 64)],
    ],
)
def test_a_slice_has_its_chips(name, chips):
    devices = tpu_topologies.devices(name)
    assert len({tuple(device.coords) for device in devices}) == chips
    assert len(devices) == chips * (2 if name.startswith("tpu7x") else 1)


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["v5e-1", "v6e-1", "v5p-8", "tpu7x-8"])
def test_the_memory_of_a_device_is_what_the_compiler_says(name):
    device = tpu_topologies.devices(name)[0]
    place = jax.sharding.SingleDeviceSharding(device)
    large = jax.ShapeDtypeStruct((2**16, 2**20), "bfloat16", sharding=place)  # 128 GiB
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refused:
        jax.jit(lambda x: (x @ x.T, x + 1)).lower(large).compile()
    gib = flops.device_memory(device.device_kind) / 2**30
    assert f"exceeds available HBM ({gib:.2f}G)" in str(refused.value)


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 64, "context": 2}, {"tensor": 2}])
def test_an_axis_may_be_shorter_than_a_side_of_the_slice(sizes):
    devices = tpu_topologies.devices("v6e-256")
    mesh = sharding.make_mesh({"data": -1, **sizes}, devices)
    assert set(mesh.devices.flat) == set(devices)
    assert all(mesh.shape[axis] == size for axis, size in sizes.items())


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
@pytest.mark.parametrize("name", ["tpu7x-2", "tpu7x-8", "tpu7x-128"])
def test_an_axis_of_two_lies_within_the_chips_of_two_devices(name, axis):
    mesh = sharding.make_mesh({"data": -1, axis: 2}, tpu_topologies.devices(name))
    for pair in mesh.devices.reshape(-1, 2):
        assert pair[0] is not pair[1] and tuple(pair[0].coords) == tuple(pair[1].coords)


@needs_libtpu
@pytest.mark.tpu_aot
def test_weights_are_never_split_over_slices():
    tpu_topologies.devices("v5e-8")  # prepares the compiler's environment
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=2)
    mesh = sharding.make_mesh({"data": 4, "fsdp": 4}, found.devices)
    for copy in mesh.devices:
        assert len({device.slice_index for device in copy.flat}) == 1
    with pytest.raises(UserError, match=r"config.mesh.data: is 1, but there are 2 TPU slices"):
        sharding.make_mesh({"data": 1, "fsdp": 16}, found.devices)
