"""Steps of DreamBooth, which draws all that a method may, on one device and on four; see
test_methods.py.

python methods_step.py OUT.npz
"""

import runpy
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.config import schema
from dopsd_jax.estimation.abstract_step import Workload, make_program
from dopsd_jax.families.zimage import family
from dopsd_jax.models import zimage_config
from dopsd_jax.parallel import sharding

GET_CONFIG = runpy.run_path(str(Path(__file__).parents[1] / "configs/zimage.py"))["get_config"]
SIZE = zimage_config.ZImageConfig(
    dim=32, layers=2, refiner_layers=0, heads=2, caption_dim=16, axes_dims=(4, 6, 6)
)
CASE = Workload(family, SIZE, height=32, width=48, rows_student=32, rows_teacher=64)
MESHES = {"one": {"data": 1}, "four": {"data": 2, "fsdp": 2}}
FIELDS = {
    "method": "dreambooth",
    "dreambooth.class_word": "dog",
    "sft.samples": 2,
    "batch_size": 4,
    "grid": "1,0.5",
    "adam_eps": 1e-3,  # Adam divides by the gradient's size: no steps out of rounding errors
    "lora.targets": "attention",
    "learning_rate": 0.5,  # the anchors' loss is then no rounding error
    "data.masks": "files",
    "anchor.share": 0.5,  # as many anchors as rows, on either mesh
}
STEPS = 2


def random(like, seed, scale):
    """Arrays of the same shapes, Gaussian; lengths of captions where integers are asked."""
    leaves, tree = jax.tree.flatten(like)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return rng.integers(1, CASE.rows_student, leaf.shape).astype(leaf.dtype)
        return (scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree.unflatten(tree, [jax.device_put(draw(x), x.sharding) for x in leaves])


def run(name):
    config = GET_CONFIG("random")
    config.update_from_flattened_dict(FIELDS)
    config.mesh.update(MESHES[name])
    mesh = sharding.make_mesh(MESHES[name], jax.devices()[:1] if name == "one" else None)
    schema.check(config)
    with jax.set_mesh(mesh):
        program = make_program(config, CASE, mesh, "cpu")
        plan, batch = program.plan, random(program.batch, 2, 1.0)
        batch = batch._replace(region=jnp.abs(batch.region))
        base, student = random(program.base, 0, 0.1), random(plan.abstract_state.student, 1, 0.1)
        anchors = random(program.anchors, 3, 1.0)
        state, records = plan.initial_state(student), []
        for n in range(STEPS):
            state, metrics = plan.step(state, base, batch, n, anchors, latent=program.latent)
            records.append(jax.device_get(metrics))
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.student)])
    found = {f"{name}/{k}": np.stack([r[k] for r in records]) for k in records[0]}
    return {**found, f"{name}/student": flat}


def main(out):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_default_matmul_precision", "float32")
    results = {}
    for name in MESHES:
        start = time.process_time()
        results |= run(name)
        print(name, f"{time.process_time() - start:.1f} CPU s", flush=True)
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
