"""A quantised network's velocity and gradient on eight devices and on one; run by its test.

python quantised_mesh.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from mesh_step import CFG, batch

from dopsd_jax.adapters import attach
from dopsd_jax.families.zimage import family
from dopsd_jax.models import quantised, zimage, zimage_config
from dopsd_jax.parallel import sharding

MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8})


def gradient(parts, mesh):
    graphdef, adapter, base = parts
    net = family.denoiser(graphdef)
    base = jax.device_put(base, sharding.state_shardings(base, mesh))
    context = jax.tree.map(lambda a: a[0], batch().student)
    x = jax.random.normal(jax.random.key(3), (8, 4, 6, 16))

    def loss(adapter, base):
        precomputed = net.precompute(adapter, base, context)
        return jnp.sum(net.velocity(adapter, base, x, jnp.float32(0.7), context, precomputed) ** 2)

    with jax.set_mesh(mesh):
        result = jax.jit(jax.value_and_grad(loss))(adapter, base)
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(base))
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(result)]), split


def main():
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "float32")
    for scheme in quantised.SCHEMES:
        net = quantised.quantised(zimage.ZImage(CFG, remat="full", rngs=nnx.Rngs(0)), scheme)
        chosen = attach.select(
            attach.slots(zimage_config.names(CFG)), "attention", family.LORA_PRESETS
        )
        attach.attach(net, chosen, 4, 8.0, jax.random.key(1))
        parts = nnx.split(net, nnx.LoRAParam, ...)
        expected, _ = gradient(parts, sharding.make_mesh({"data": 1}, jax.devices()[:1]))
        for sizes in MESHES if scheme == "nf4" else MESHES[:1]:
            found, split = gradient(parts, sharding.make_mesh(sizes))
            error = np.abs(found - expected).max() / np.abs(expected).max()
            assert error < 1e-5, (scheme, sizes, error)
            assert split >= 12, "codes are not split"
            print(scheme, sizes, error)


if __name__ == "__main__":
    main()
