"""Pictures of a model folder on one device and on meshes of virtual ones; run by test_drawing.py.

python mesh_draw.py FOLDER OUT.npz
"""

import sys

import jax
import numpy as np

from dopsd_jax.families import sampling
from dopsd_jax.families.drawing import Wish, draw
from dopsd_jax.families.pipeline import pipeline
from dopsd_jax.parallel import sharding

MESHES = {
    "one": {"data": 1},
    "data": {"data": 2},
    "data, fsdp": {"data": 2, "fsdp": 2},
    "context": {"context": 2},
}
PROMPTS = ["a red circle", "a blue star", "a large green square on the left"]
SIDE = 32


def run(folder, name):
    """Pictures, what a device does for them, and how often a program was compiled for it."""
    sizes, sample, flops = MESHES[name], sampling.sample, []
    mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])
    place = lambda path, shape: sharding.base_sharding(path, shape, mesh)
    pipe = pipeline(folder, sharding_for=place, mesh=mesh)
    shape = pipe.latent_shape(SIDE, SIDE)
    wishes = [
        Wish(sampling.start_noise(1, 1, shape, number), pipe.encode_prompt([prompt]))
        for number, prompt in enumerate(PROMPTS)
    ]

    def seen(*arrays, **static):
        own = jax.jit(lambda *arrays: sample(*arrays, **static))
        flops.append(own.lower(*arrays).compile().cost_analysis()["flops"])
        return sample(*arrays, **static)

    sampling.sample = seen
    found = draw(pipe, pipe.split[1], wishes)
    sampling.sample = sample
    compiled = []
    listen = lambda event, seconds, **more: compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    again = draw(pipe, pipe.split[1], wishes)
    np.testing.assert_array_equal(again, found)
    return {
        f"{name}/pictures": np.stack(found),
        f"{name}/flops": np.sum(flops),
        f"{name}/compiled": sum("backend_compile" in event for event in compiled),
    }


def main(folder, out):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_default_matmul_precision", "float32")
    results = {}
    for name in MESHES:
        results |= run(folder, name)
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
