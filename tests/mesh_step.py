"""One tiny D-OPSD step on several meshes of eight virtual devices; run by test_sharding.py.

python mesh_step.py OUT.npz
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax import dopsd, lora, optimizers, sharding, state
from dopsd_jax.families import zimage as family
from dopsd_jax.models import zimage
from dopsd_jax.models.attention import attention, per_device, splash_attention

CFG = zimage.ZImageConfig(
    dim=96, layers=2, refiner_layers=1, heads=4, caption_dim=16, axes_dims=(8, 8, 8)
)
MESHES = {
    "one": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "context": {"context": 8},
    "tensor": {"data": 2, "tensor": 4},
    "fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp, context": {"data": 2, "fsdp": 2, "context": 2},
    "context, tensor": {"data": 2, "context": 2, "tensor": 2},
    "all but data": {"fsdp": 2, "context": 2, "tensor": 2},
}
MODES = ("lora", "full")
BATCH, LATENT, STEPS = 8, (8, 4, 6, 16), 2


def model(mode):
    """Graph, what is trained, and the rest; adapters with a B that is not zero."""
    net = zimage.ZImage(CFG, rngs=nnx.Rngs(0))
    if mode == "full":
        return nnx.split(net, nnx.Param, ...)
    chosen = lora.select(lora.slots(zimage.names(CFG)), "blocks", family.LORA_PRESETS)
    lora.attach(net, chosen, 4, 8.0, jax.random.key(1))
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
    return dopsd.Contexts(context(32), context(64))


def run(name, mode, graphdef, student, base):
    mesh = sharding.make_mesh(MESHES[name], jax.devices()[:1] if name == "one" else None)
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
        placement = sharding.state_shardings(train, mesh)
        train = jax.device_put(train, placement)
        base = jax.device_put(base, sharding.state_shardings(base, mesh))
        step = state.make_step(method, tx, teacher, optimizers.schedule(config), 0, placement)
        for _ in range(STEPS):
            placed = sharding.put_batch(batch(), mesh)
            train, metrics = step(train, base, placed, latent=LATENT)
    assert step._cache_size() == 1, "the second step was compiled anew"
    weights = train.student if mode == "full" else base
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(weights))
    named = {"student": train.student, "teacher": train.teacher, "moments": train.opt_state}
    flat = {
        f"{mode}/{name}/{kind}": np.concatenate(
            [np.ravel(x) for x in jax.tree.leaves(tree) if x.ndim]
        )
        for kind, tree in named.items()
    }
    return flat | {
        f"{mode}/{name}/loss": np.asarray(metrics["loss_per_step"]),
        f"{mode}/{name}/split": np.asarray(split),
    }


def run_kernel():
    """Splash attention and its gradients under the mixed mesh, and what they should be."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(4, 40, 4, 16), (4, 40, 2, 16), (4, 40, 2, 16), (4, 40, 4, 16)]
    *qkv, weight = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    lengths = jnp.array([40, 7, 23, 1])

    def gradients(function):
        loss = lambda q, k, v: jnp.sum(function(q, k, v) * weight)
        return jnp.concatenate([g.ravel() for g in jax.grad(loss, argnums=(0, 1, 2))(*qkv)])

    mesh = sharding.make_mesh(MESHES["all but data"])
    kernel = per_device(functools.partial(splash_attention, causal=False, interpret=True))
    with jax.set_mesh(mesh):
        actual = jax.jit(lambda: gradients(lambda q, k, v: kernel(q, k, v, lengths)))()
    expected = gradients(lambda q, k, v: attention(q, k, v, lengths=lengths))
    return {"kernel/actual": np.asarray(actual), "kernel/expected": np.asarray(expected)}


def main(out):
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "float32")
    results = {}
    for mode in MODES:
        parts = model(mode)
        for name in MESHES:
            start = time.monotonic()
            results |= run(name, mode, *parts)
            print(mode, name, f"{time.monotonic() - start:.1f} s", flush=True)
    results |= run_kernel()
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
