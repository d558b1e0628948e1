"""LoKr as a second kind of adapter in the same network: what the interface promises of both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_error
from flax import nnx
from test_lora import CFG, choose, merge, noisy, run, split

from dopsd_jax.adapters import attach, lokr
from dopsd_jax.adapters.lora import Lora
from dopsd_jax.common.errors import UserError
from dopsd_jax.models import zimage
from dopsd_jax.models.layers import Dense

# A layer in the middle of a stack, whose kernel holds to_q, to_k and to_v; and a plain layer.
TARGETS = ("layers.1.attention.to_k", "cap_embedder.1")


Lokr = lokr.Lokr.of(2)


def build(kind=None):
    model = zimage.ZImage(CFG, rngs=nnx.Rngs(0))
    for name in ("layers", "noise_refiner"):
        getattr(model, name).modulation.bias[...] += 0.5
    if kind is not None:
        attach.attach(model, choose(TARGETS), 4, 8.0, jax.random.key(1), kind)
    return model


def test_it_starts_as_nothing_trains_and_exports_what_was_trained():
    graphdef, start, base = split(build(Lokr))
    # Compiled in another program the same sums may be rounded otherwise: nothing is added.
    plain = run(*split(build()))
    assert relative_error(run(graphdef, start, base), plain) < 1e-6
    sizes = sum(x.size for x in jax.tree.leaves(start))
    slots = choose(TARGETS)
    one = {path: Lokr.size(slot.din, slot.dout, 4) for path, slot in slots.items()}
    # The stack is adapted as a whole.
    assert sizes == CFG.layers * one[TARGETS[0]] + one[TARGETS[1]]

    # Trained: a step of plain descent on each of two losses.
    adapter = start
    for sign in (1.0, -1.0):
        loss = lambda a, sign=sign: jnp.mean(jnp.square(run(graphdef, a, base) - sign))
        value, gradient = jax.value_and_grad(loss)(adapter)
        adapter = optax.apply_updates(adapter, jax.tree.map(lambda g: -g, gradient))
        assert loss(adapter) < value
    moved = {
        path[-1]: np.abs(leaf[...]).max(axis=(1, 2))
        for path, leaf in nnx.to_flat_state(jax.tree.map(jnp.subtract, adapter, start))
        if "layers" in path
    }
    for change in moved.values():
        assert change[1] > 0 and change[0] == change[2] == 0

    # Exported: the same network with the change in its weights.
    exported = attach.export(adapter, slots, 2.0, Lokr)
    assert exported.keys() == set(TARGETS)
    merged = build()
    merge(merged, {path: module.delta() for path, module in exported.items()})
    found = run(graphdef, adapter, base)
    assert relative_error(found, plain) > 1e-4
    assert relative_error(found, run(*split(merged))) < 5e-6

    # Loaded again.
    back = attach.load(start, slots, exported, 2.0, "file", Lokr)
    assert relative_error(run(graphdef, back, base), found) < 1e-6


def test_what_does_not_fit_is_a_line_that_names_the_layer():
    _, start, _ = split(build(Lokr))
    exported = attach.export(start, choose(TARGETS), 2.0, Lokr)
    exported[TARGETS[1]] = dataclasses.replace(
        exported[TARGETS[1]],
        factors={**exported[TARGETS[1]].factors, "w2_b": np.zeros((4, 3), np.float32)},
    )
    with pytest.raises(UserError) as error:
        attach.load(start, choose(TARGETS), exported, 2.0, "some.safetensors", Lokr)
    (line,) = error.value.problems
    assert line == (
        f"some.safetensors: {TARGETS[1]} has w1 [2, 2], w2_a [24, 4], w2_b [4, 3]; "
        "config.lora.rank, config.lora.factor and the model need w1 [2, 2], w2_a [24, 4], "
        "w2_b [4, 10]"
    )


@pytest.mark.parametrize("kind", [Lora, Lokr])
def test_an_update_is_the_product_with_delta(kind):
    """In two of the three parts of a fused layer whose columns are interleaved."""
    layer = Dense(12, (8, 4, 4), groups=2, rngs=nnx.Rngs(0))
    slots = {str(i): attach.Slot("dense", i, None, 12, (8, 4, 4)[i]) for i in (0, 2)}
    attach.attach(nnx.Dict(dense=layer), slots, 2, 6.0, jax.random.key(0), kind)
    nnx.update(layer, noisy(nnx.state(layer, nnx.LoRAParam)))
    x = jax.random.normal(jax.random.key(3), (5, 12))
    plain = layer.outputs.split(x @ layer.kernel[...])
    for part, (found, base) in enumerate(zip(layer.parts(x), plain, strict=True)):
        if part == 1:
            np.testing.assert_array_equal(found, base)
        else:
            change = x @ layer.adapters[str(part)].delta()
            assert relative_error(found - base, change) < 1e-5


@pytest.mark.parametrize("kind", [Lora, Lokr])
@pytest.mark.parametrize("fused_before", [False, True])
def test_updates_meet_the_output_in_its_parts(kind, fused_before):
    """Nothing is joined, and the base's product alone has the width of all parts."""
    layer = Dense(12, (8, 4, 4), groups=2, fused_before=fused_before, rngs=nnx.Rngs(0))
    douts = {0: 16} if fused_before else {0: 8, 2: 4}
    slots = {str(i): attach.Slot("dense", i, None, 12, dout) for i, dout in douts.items()}
    attach.attach(nnx.Dict(dense=layer), slots, 2, 6.0, jax.random.key(0), kind)
    for adapter in layer.adapters.values():
        adapter.is_wide = False
    x = jax.random.normal(jax.random.key(3), (5, 12))
    lines = jax.make_jaxpr(layer.parts)(x).jaxpr.eqns
    made = {e.primitive.name for e in lines if e.outvars[0].aval.size == 5 * 16}
    # A Kronecker product has no columns to cut: of one PyTorch layer its update is whole.
    whole = {"reshape", "dot_general", "transpose"} if fused_before and kind is Lokr else set()
    assert {"dot_general"} <= made <= {"dot_general", "reshape", "name", *whole}, made
    joined = layer.outputs.join(layer.parts(x))
    np.testing.assert_array_equal(joined, layer(x))


@pytest.mark.parametrize("kind", [Lora, Lokr])
@pytest.mark.parametrize("fused_before", [False, True])
def test_in_the_kernel_it_does_what_it_does_alone(kind, fused_before):
    """Outputs and gradients; and only where nothing is lost by rounding, and many rows pay."""
    layer = Dense((8, 4), (8, 4, 4), groups=2, fused_before=fused_before, rngs=nnx.Rngs(0))
    douts = {0: 16} if fused_before else {0: 8, 2: 4}
    slots = {str(i): attach.Slot("dense", i, None, 12, dout) for i, dout in douts.items()}
    attach.attach(nnx.Dict(dense=layer), slots, 4, 6.0, jax.random.key(0), kind)
    nnx.update(layer, noisy(nnx.state(layer, nnx.LoRAParam)))
    assert all(adapter.is_wide for adapter in layer.adapters.values())

    def products(run, adapters, x):
        lines = jax.make_jaxpr(run)(adapters, x).jaxpr.eqns
        return sum(e.primitive.name == "dot_general" and len(x) in e.outvars[0].aval.shape
                   for e in lines)  # fmt: skip

    x, found = jax.random.normal(jax.random.key(3), (20, 12)), []
    for wide in (True, False):
        for adapter in layer.adapters.values():
            adapter.is_wide = wide
        graphdef, adapters, base = nnx.split(layer, nnx.LoRAParam, ...)
        run = lambda adapters, x, g=graphdef, b=base: nnx.merge(g, adapters, b)(x)
        loss = lambda adapters, x, run=run: jnp.sum(jnp.sin(run(adapters, x)))
        found.append(jax.value_and_grad(loss, argnums=(0, 1))(adapters, x))
        # On other platforms the sum would be rounded.
        assert (products(run, adapters, x) == 1) == (wide and jax.default_backend() == "cpu")
        assert products(run, adapters, x.astype(jnp.bfloat16)) > 1
        assert products(run, adapters, x[:11]) > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)
