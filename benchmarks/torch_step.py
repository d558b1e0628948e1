"""The PyTorch D-OPSD loop of the tests, timed; `step.py --torch` runs it with its job as JSON.

Prints {"device", "seconds"} as JSON. bfloat16 runs under autocast, with adapters in float32.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import torch
import torch_reference as reference
from diffusers import ZImageTransformer2DModel


def main(job: dict) -> dict:
    """Builds the model, runs warm-up and timed steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, job["base_dtype"]))
    with device:
        model = ZImageTransformer2DModel(**job["transformer"]).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    adapters = reference.random_adapters(model, job["rank"], seed=0)
    for name in ("teacher", "student"):
        reference.load_adapters(model, adapters, name, job["alpha"])
        for p in reference.adapter_parameters(model, name):
            p.data = p.data.float()
    if job["checkpointing"]:
        model.enable_gradient_checkpointing()
    settings = reference.Settings(
        sigmas=job["sigmas"],
        loss=job["loss"],
        loss_steps=job["loss_steps"],
        teacher=job["teacher"],
        accumulate=job["accumulate"],
    )
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    b, h, w, c = job["latent"]
    width = job["transformer"]["cap_feat_dim"]
    captions = lambda role: [draw(job[f"{role}_tokens"], width) for _ in range(b)]
    batches = [
        reference.Batch(captions("student"), captions("teacher"), draw(b, c, h, w))
        for _ in range(job["accumulate"])
    ]
    half = job["dtype"] == "bfloat16"
    cast = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
    optimizer = reference.make_optimizer(model, settings)
    seconds = []
    for _ in range(job["warmup"] + job["repeats"]):
        begin = time.perf_counter()
        with cast:
            reference.backward(model, batches, settings)
        reference.update(model, optimizer, settings)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    kind = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "device": f"{kind}, torch {torch.__version__}",
        "seconds": seconds[job["warmup"] :],
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
