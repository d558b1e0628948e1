"""What the TPU compiler makes of a step on many chips: what is sent, and what each chip does."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from dopsd_jax import dopsd
from dopsd_jax.estimation import tpu_topologies
from dopsd_jax.estimation.collectives import KINDS, collectives
from dopsd_jax.families.zimage import family
from dopsd_jax.models import zimage, zimage_config
from dopsd_jax.parallel import sharding
from dopsd_jax.training import state, train_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
    ),
]

CFG = zimage_config.ZImageConfig(
    dim=640, layers=2, refiner_layers=0, heads=5, caption_dim=64, axes_dims=(32, 48, 48)
)
GRID, LATENT, ROWS = (1.0, 0.7, 0.0), (32, 40, 16), (128, 160)
PASSES = CFG.layers * (len(GRID) - 1)  # of a layer in each of the step's forwards and backwards
TOKENS = 16 * 20


@functools.cache
def full_step(chips: int):
    """The compiled step of full fine-tuning on a v5e slice, one image a chip, fsdp over 8 chips."""
    mesh = sharding.make_mesh({"data": -1, "fsdp": 8}, tpu_topologies.devices(f"v5e-{chips}"))
    sharding.check(mesh, CFG, batch_size=chips)
    build = lambda: zimage.ZImage(CFG, dtype="bfloat16", remat="full", rngs=nnx.Rngs(0))
    graphdef, student, base = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    tx, teacher = optax.adamw(1e-4), state.Teacher()
    net = family.denoiser(graphdef)

    def method(student, teacher, base, contexts, noise, key):
        nodes = dopsd.make_nodes(GRID, "x0", "all", key)
        return dopsd.loss_and_gradient(net, student, teacher, base, contexts, noise, nodes)

    start = jax.eval_shape(lambda s: state.create(s, teacher, tx), student)
    placement = sharding.state_shardings(start, mesh)
    step = train_step.make_step(method, tx, teacher, optax.constant_schedule(1e-4), 0, placement)
    place = sharding.batch_sharding(mesh)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((1, chips, *shape), dtype, sharding=place)
    contexts = dopsd.Contexts(
        *(family.Context(array(jnp.bfloat16, n, CFG.caption_dim), array(jnp.int32)) for n in ROWS)
    )
    start = sharding.abstract(start, placement)
    with jax.set_mesh(mesh):
        return step.lower(start, base, contexts, latent=(chips, *LATENT)).compile()


def kernels(room: str = "") -> set[int]:
    """Numbers in each kernel of a layer; those below an attribute called `room`."""
    net = nnx.eval_shape(lambda: zimage.ZImage(CFG, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(net))
    return {
        math.prod(leaf.shape[-2:])
        for path, leaf in flat
        if path[-1] == "kernel" and (not room or room in path)
    }


def test_full_gradients_are_scattered_and_weights_gathered_layer_by_layer():
    sent = collectives(full_step(8).as_text())
    assert not sent.unknown_loops
    blocks = kernels("attention") | kernels("feed_forward")
    by_kind = {kind: {} for kind in KINDS}
    for array, traffic in sent.arrays.items():
        of_size = by_kind[array.kind].setdefault((array.dtype, math.prod(array.shape)), [])
        of_size.append(traffic.count)
    # Never a stack of layers, never an activation; as bfloat16, not as the float32 master.
    assert not {TOKENS * CFG.dim, (TOKENS + ROWS[0]) * CFG.dim} & kernels()
    assert {size for _, size in by_kind["all-gather"]} <= kernels()
    gathered = {key: sum(v) for key, v in by_kind["all-gather"].items() if key[1] in blocks}
    assert gathered.keys() == {("bf16", n) for n in blocks}
    # For teacher, student, recomputation and gradients; each of these once.
    assert max(gathered.values()) <= 4 * PASSES
    for n in blocks:
        assert sum(by_kind["reduce-scatter"]["bf16", n // 8]) == PASSES
    assert max(size for _, size in by_kind["all-reduce"]) < min(blocks)
    assert not by_kind["all-to-all"] | by_kind["collective-permute"]


def test_a_chips_work_does_not_grow_with_the_slice():
    few, many = full_step(8), full_step(64)
    flop = [compiled.cost_analysis()["flops"] for compiled in (few, many)]
    assert flop[1] == pytest.approx(flop[0], rel=0.01)
    memory = [compiled.memory_analysis().peak_memory_in_bytes for compiled in (few, many)]
    assert memory[1] < 1.02 * memory[0]
    data = [sum(t.bytes for t in collectives(c.as_text()).traffic.values()) for c in (few, many)]
    assert data[1] < 2 * data[0]
