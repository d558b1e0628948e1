"""PyTorch's D-OPSD step (diffusers, peft), timed; `step.py --torch` runs it with its job as JSON.

The loop is that of the tests. Words of a job change how it is computed, not what:

    checkpointing   activations are computed again in the backward pass
    per_step        a backward pass after each step of the rollout, as ours; else one over all
    compile         the blocks compiled by torch.compile; compile_eager: traced only, to try it

Prints {"device", "seconds", "peak_bytes"} as JSON. bfloat16 runs under autocast, with adapters in
float32.
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
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel

MODELS = {"zimage": ZImageTransformer2DModel, "flux2_klein": Flux2Transformer2DModel}
WORDS = {"checkpointing", "per_step", "compile", "compile_eager"}


def main(job: dict) -> dict:
    """Builds the model, runs warm-up and timed steps."""
    words = set(job["words"])
    if words - WORDS:
        sys.exit(f"error: --torch: {', '.join(words - WORDS)}: not one of {', '.join(WORDS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(os.cpu_count())
    model = build(job, device)
    if "checkpointing" in words:
        model.enable_gradient_checkpointing()
    if words & {"compile", "compile_eager"}:
        backend = "inductor" if "compile" in words else "eager"
        model.compile_repeated_blocks(backend=backend)
    settings = reference.Settings(
        sigmas=job["sigmas"],
        loss=job["loss"],
        loss_steps=job["loss_steps"],
        teacher=job["teacher"],
        accumulate=job["accumulate"],
    )
    batches = make_batches(job, device)
    half = job["dtype"] == "bfloat16"
    cast = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
    optimizer = reference.make_optimizer(model, settings)
    backward = backward_per_step if "per_step" in words else reference.backward
    seconds = []
    for _ in range(job["warmup"] + job["repeats"]):
        begin = time.perf_counter()
        with cast:
            backward(model, batches, settings)
        reference.update(model, optimizer, settings)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    cuda = device.type == "cuda"
    kind = torch.cuda.get_device_name() if cuda else "cpu"
    return {
        "device": f"{kind}, torch {torch.__version__}",
        "words": sorted(words),
        "first": seconds[0],
        "seconds": seconds[job["warmup"] :],
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def build(job: dict, device: torch.device) -> torch.nn.Module:
    """The transformer, frozen, in job["base_dtype"], with both adapters in float32."""
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, job["base_dtype"]))
    with device:
        model = MODELS[job["family"]].from_config(job["transformer"]).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    adapters = reference.random_adapters(model, job["rank"], seed=0)
    for name in ("teacher", "student"):
        reference.load_adapters(model, adapters, name, job["alpha"])
        for p in reference.adapter_parameters(model, name):
            p.data = p.data.float()
    return model


def make_batches(job: dict, device: torch.device) -> list[reference.Batch]:
    """Unit noise of the job's shapes, on the device."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    b, h, w, c = job["latent"]

    def context(shapes):
        text, *references = (torch.from_numpy(draw(*shape)).to(device) for shape in shapes)
        return text if job["family"] == "zimage" else (text, references)

    contexts = lambda shapes: [context(shapes) for _ in range(b)]
    return [
        reference.Batch(*map(contexts, job["contexts"]), draw(b, c, h, w))
        for _ in range(job["accumulate"])
    ]


def backward_per_step(model, batches, s: reference.Settings) -> None:
    """As `reference.backward`, with a graph of one step at a time instead of all of them."""
    for p in reference.adapter_parameters(model, "student"):
        p.grad = None
    chosen = range(len(s.sigmas)) if s.loss_steps is None else s.loss_steps
    teacher = "student" if s.teacher == "live" else "teacher"
    for batch in batches:
        x = torch.tensor(batch.noise, device=model.device)
        ends = (*s.sigmas[1:], s.sigma_end)
        for k, (sigma, end) in enumerate(zip(s.sigmas, ends, strict=True)):
            if k in chosen:
                with torch.no_grad():
                    target = reference.predict(model, teacher, x, sigma, batch.teacher)
                raw = reference.predict(model, "student", x, sigma, batch.student)
                node = reference.node_loss(s, k, sigma, x, raw, target)
                (node / len(chosen) / len(batches)).backward()
            else:
                with torch.no_grad():
                    raw = reference.predict(model, "student", x, sigma, batch.student)
            x = (x - (end - sigma) * raw).detach()


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
