"""Tiny D-OPSD steps on several meshes of eight virtual devices; run by test_sharding.py.

python mesh_step.py OUT.npz
"""

import dataclasses
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax import dopsd
from dopsd_jax.adapters import attach
from dopsd_jax.adapters.lokr import Lokr
from dopsd_jax.estimation.collectives import collectives
from dopsd_jax.families.flux2_klein import family as klein
from dopsd_jax.families.zimage import family
from dopsd_jax.models import flux2, flux2_config, zimage, zimage_config
from dopsd_jax.models.attention import attention, per_device, splash_attention
from dopsd_jax.models.layers import Dense
from dopsd_jax.parallel import sharding
from dopsd_jax.training import optimizers, state, train_step

CFG = zimage_config.ZImageConfig(
    dim=96, layers=2, refiner_layers=0, heads=4, caption_dim=16, axes_dims=(8, 8, 8)
)
KLEIN = flux2_config.Flux2Config(
    heads=4, head_dim=16, double_layers=3, single_layers=3, channels=8, text_dim=24, mlp_ratio=2.5,
    axes_dims=(4, 4, 4, 4), time_frequencies=32,
)  # fmt: skip
REFINED = dataclasses.replace(CFG, refiner_layers=1)  # dear to compile: on one mesh only
ALL = "fsdp, context, tensor"
MESHES = {
    "one": {"data": 1},
    "one, refined": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "context": {"context": 8},
    "tensor": {"data": 2, "tensor": 4},
    f"{ALL}, refined": {"fsdp": 2, "context": 2, "tensor": 2},
    ALL: {"fsdp": 2, "context": 2, "tensor": 2},
}
# Each axis alone in one of the modes at least, all together in both; refiners in one.
CASES = [
    *(("lora", mesh) for mesh in ("one", "one, refined", "data", "fsdp", "context")),
    ("lora", f"{ALL}, refined"),
    *(("full", mesh) for mesh in ("one", "fsdp", "tensor", ALL)),
]
RANK, BATCH, LATENT, STEPS = 4, 8, (8, 4, 6, 16), 2
# No number of tokens (6 image tokens are padded to 32) is a side of a kernel.
ROWS = (128, 160)


@functools.cache
def model(mode, cfg):
    """Graph, what is trained, and the rest; adapters with a B that is not zero."""
    net = zimage.ZImage(cfg, rngs=nnx.Rngs(0))
    if mode == "full":
        return nnx.split(net, nnx.Param, ...)
    chosen = attach.select(attach.slots(zimage_config.names(cfg)), "blocks", family.LORA_PRESETS)
    attach.attach(net, chosen, RANK, 8.0, jax.random.key(1))
    graphdef, adapter, base = nnx.split(net, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [a + 0.05 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return graphdef, jax.tree.unflatten(tree, noisy), base


def batch():
    rng = np.random.default_rng(0)
    context = lambda rows: family.Context(
        rng.standard_normal((1, BATCH, rows, CFG.caption_dim), np.float32),
        rng.integers(1, rows, (1, BATCH)).astype(np.int32),
    )
    return dopsd.Contexts(*map(context, ROWS))


def kernel_shapes():
    """(in, out) of every kernel."""
    net = nnx.eval_shape(lambda: zimage.ZImage(REFINED, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(net))
    return {leaf.shape[-2:] for path, leaf in flat if path[-1] == "kernel"}


def run(name, mode, graphdef, student, base):
    single = name.startswith("one")
    mesh = sharding.make_mesh(MESHES[name], jax.devices()[:1] if single else None)
    sharding.check(mesh, CFG, batch_size=BATCH)
    config = {
        "learning_rate": 1e-2, "warmup_steps": 0, "steps": 9, "lr_schedule": "constant",
        # Adam divides by the gradient's size: a small eps would make steps out of rounding errors.
        "adam_b1": 0.9, "adam_b2": 0.999, "adam_eps": 1e-3, "weight_decay": 0.0, "grad_clip": 1.0,
        "optimizer": "adamw", "moments_dtype": "float32",
    }  # fmt: skip
    tx, teacher = optimizers.optimizer(config), state.Teacher(decay=0.9)
    net = family.denoiser(graphdef)

    def method(student, teacher, base, contexts, noise, key):
        nodes = dopsd.make_nodes((1.0, 0.7, 0.0), "x0", "all", key)
        return dopsd.loss_and_gradient(net, student, teacher, base, contexts, noise, nodes)

    with jax.set_mesh(mesh):
        train = state.create(student, teacher, tx)
        offloaded = ("teacher", "optimizer") if (mode, name) == ("full", ALL) else ()
        placement = state.offload(sharding.state_shardings(train, mesh), train, offloaded)
        train = jax.device_put(train, placement)
        base = jax.device_put(base, sharding.state_shardings(base, mesh))
        placed = sharding.put_batch(batch(), mesh)
        step = train_step.make_step(method, tx, teacher, optimizers.schedule(config), 0, placement)
        compiled = step.lower(train, base, placed, latent=LATENT).compile()
        for _ in range(STEPS):  # the second one refuses a state that lies elsewhere than the first
            train, metrics = compiled(train, base, placed)
    weights = train.student if mode == "full" else base
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(weights))
    named = {"student": train.student, "teacher": train.teacher, "moments": train.opt_state}
    flat = {
        f"{mode}/{name}/{kind}": np.concatenate(
            [np.ravel(x) for x in jax.tree.leaves(tree) if x.ndim]
        )
        for kind, tree in named.items()
    }
    sent = [(*a, t.count) for a, t in collectives(compiled.as_text()).arrays.items()]
    return flat | {
        f"{mode}/{name}/loss": np.asarray(metrics["loss_per_step"]),
        f"{mode}/{name}/split": np.asarray(split),
        f"{mode}/{name}/sent": np.asarray(json.dumps(sent)),
    }


def run_kernel():
    """Splash attention and its gradients with every axis but data split, and as they should be."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(4, 40, 4, 16), (4, 40, 2, 16), (4, 40, 2, 16), (4, 40, 4, 16)]
    *qkv, weight = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    lengths = jnp.array([40, 7, 23, 1])

    def gradients(function):
        loss = lambda q, k, v: jnp.sum(function(q, k, v) * weight)
        return jnp.concatenate([g.ravel() for g in jax.grad(loss, argnums=(0, 1, 2))(*qkv)])

    mesh = sharding.make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
    kernel = per_device(functools.partial(splash_attention, causal=False, interpret=True))
    with jax.set_mesh(mesh):
        actual = jax.jit(lambda: gradients(lambda q, k, v: kernel(q, k, v, lengths)))()
    expected = gradients(lambda q, k, v: attention(q, k, v, lengths=lengths))
    return {"kernel/actual": np.asarray(actual), "kernel/expected": np.asarray(expected)}


def run_klein():
    """FLUX.2-klein's velocity and the gradient of all that can be trained, on one device and on
    every axis. The reference makes the number of tokens odd: `context` then needs padding."""
    net = flux2.Flux2(KLEIN, remat="dots", rngs=nnx.Rngs(0))
    chosen = attach.select(attach.slots(flux2_config.names(KLEIN)), "blocks", klein.LORA_PRESETS)
    attach.attach(net, chosen, RANK, 8.0, jax.random.key(1))
    graphdef, adapter, weights, scales = nnx.split(net, nnx.LoRAParam, nnx.Param, ...)
    adapter = jax.tree.map(
        lambda a: a + 0.05 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), adapter
    )
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), (BATCH, *shape))
    given = draw(0, 5, 5, 8), draw(1, 16, KLEIN.text_dim), draw(2, 3, 4, 8)

    def loss(adapter, weights, x, text, reference):
        net = nnx.merge(graphdef, adapter, weights, scales)
        embedded = net.embed(text, (reference,))
        return jnp.mean(net(x, jnp.full(BATCH, 0.7), *embedded, [reference.shape[1:3]]) ** 2)

    results = {}
    axes = {"fsdp": 2, "context": 2, "tensor": 2}
    for name, sizes, devices in (("one", {"data": 1}, jax.devices()[:1]), ("all", axes, None)):
        mesh = sharding.make_mesh(sizes, devices)
        with jax.set_mesh(mesh):
            placed = jax.device_put(weights, sharding.state_shardings(weights, mesh))
            step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
            compiled = step.lower(adapter, placed, *given).compile()
            found = jax.tree.leaves(compiled(adapter, placed, *given))
        results[f"klein/{name}"] = np.concatenate([np.ravel(x) for x in found])
        sent = [(*a, t.count) for a, t in collectives(compiled.as_text()).arrays.items()]
        results[f"klein/{name}/sent"] = np.asarray(json.dumps(sent))
    return results


def run_lokr():
    """Two layers with LoKr, and the gradients of all, on one device and on every axis: `tensor`
    splits what is between them, whose parts are interleaved."""
    make = functools.partial(Dense, groups=4, rngs=nnx.Rngs(0))
    net = nnx.Dict(
        into=make(32, (16, 48), fused_before=True), out=make((16, 48), 32, fused_before=True)
    )
    chosen = {
        "into": attach.Slot("into", 0, None, 32, 64), "out": attach.Slot("out", 0, None, 64, 32)
    }  # fmt: skip
    attach.attach(net, chosen, 3, 8.0, jax.random.key(1), Lokr.of(4))
    graphdef, adapter, weights, rest = nnx.split(net, nnx.LoRAParam, nnx.Param, ...)
    adapter = jax.tree.map(
        lambda a: a + 0.05 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), adapter
    )
    x = jax.random.normal(jax.random.key(0), (BATCH, 6, 32))

    def loss(adapter, weights, x):
        net = nnx.merge(graphdef, adapter, weights, rest)
        return jnp.mean(net["out"](jnp.tanh(net["into"](x))) ** 2)

    results, axes = {}, {"fsdp": 2, "context": 2, "tensor": 2}
    for name, sizes, devices in (("one", {"data": 1}, jax.devices()[:1]), ("all", axes, None)):
        mesh = sharding.make_mesh(sizes, devices)
        order = {"into": ("fsdp", "tensor"), "out": ("tensor", "fsdp")}
        split = {layer: jax.P(*axes) for layer, axes in order.items()}
        place = lambda path, leaf, mesh=mesh, split=split: jax.device_put(
            leaf, jax.NamedSharding(mesh, split[path[0].key])
        )
        with jax.set_mesh(mesh):
            placed = jax.tree_util.tree_map_with_path(place, weights)
            found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(adapter, placed, x)
        results[f"lokr/{name}"] = np.concatenate([np.ravel(a) for a in jax.tree.leaves(found)])
    return results


def main(out):
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "float32")
    results = run_kernel() | run_klein() | run_lokr()
    for mode, name in CASES:
        start = time.process_time()
        results |= run(name, mode, *model(mode, REFINED if "refined" in name else CFG))
        print(mode, name, f"{time.process_time() - start:.1f} CPU s", flush=True)
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
