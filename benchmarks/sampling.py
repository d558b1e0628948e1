"""Times pictures from noise, decoding included: our pipeline, or that of diffusers.

    python benchmarks/sampling.py --family=zimage --who=ours --batch=4
    python benchmarks/sampling.py --family=zimage --who=diffusers --batch=4

Both load one folder with random weights of the published sizes (`big_folder.py`), in bfloat16. The
texts are encoded before. The last line is the result as JSON.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import big_folder
from absl import flags

from dopsd_jax.common import program

FAMILY = flags.DEFINE_enum("family", "zimage", ["zimage", "flux2_klein"], "whose model")
WHO = flags.DEFINE_enum("who", "ours", ["ours", "diffusers"], "whose pipeline")
SIDE = flags.DEFINE_integer("side", 1024, "pixels")
BATCH = flags.DEFINE_integer("batch", 1, "pictures at once", 1)
REPEATS = flags.DEFINE_integer("repeats", 5, "timed batches", 1)
DRY = flags.DEFINE_bool("dry", False, "the random miniature")
PROMPT = "a large green circle on the left of a small red square, in soft light"


def main() -> None:
    begin = time.perf_counter()
    folder = big_folder.folder(FAMILY.value, DRY.value)
    print(f"folder: {time.perf_counter() - begin:.1f} s", flush=True)
    facts, draw, decode = (ours if WHO.value == "ours" else theirs)(folder)
    (first,) = timed(draw, 1)
    seconds = timed(draw, REPEATS.value)
    timed(decode, 1)
    found = facts() | {
        "first": first,
        "seconds": seconds,
        "median": statistics.median(seconds),
        "decode": statistics.median(timed(decode, REPEATS.value)),
        "images": BATCH.value,
    }
    print("result: " + json.dumps(found))


def timed(action: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each call; `action` returns arrays of the host."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return seconds


def ours(folder) -> tuple[Callable, Callable, Callable]:
    """(what to record, pictures, decoding) of our pipeline."""
    import jax

    import dopsd_jax
    from dopsd_jax.families.sampling import start_noise

    pipe = dopsd_jax.load_pipeline(str(folder), dtype="float32" if DRY.value else "bfloat16")
    prompts = [PROMPT] * BATCH.value
    context = jax.device_put(pipe.encode_prompt(prompts))
    pipe.release_encoders()
    side, latent = SIDE.value, pipe.latent_shape(SIDE.value, SIDE.value)
    noise = start_noise(0, BATCH.value, latent)

    def facts() -> dict:
        device = jax.devices()[0]
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        steps = len(pipe.deployed_grid(latent)) - 1
        return {"device": device.device_kind, "attention": pipe.attention, "steps": steps,
                "peak_bytes": peak}  # fmt: skip

    draw = lambda: pipe(prompts, height=side, width=side, latents=noise, context=context)
    return facts, draw, lambda: pipe.decode(noise)


def theirs(folder) -> tuple[Callable, Callable, Callable]:
    """The same of diffusers'."""
    import diffusers
    import torch

    from dopsd_jax import families

    torch.set_grad_enabled(False)
    cuda = torch.cuda.is_available()
    dtype = torch.float32 if DRY.value else torch.bfloat16
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe = pipe.to("cuda" if cuda else "cpu")
    pipe.set_progress_bar_config(disable=True)
    family, klein = families.load(FAMILY.value), FAMILY.value == "flux2_klein"
    own = {"guidance_scale": 1.0} if klein else {"guidance_scale": 0.0}
    embeds = pipe.encode_prompt([PROMPT] * BATCH.value, device=pipe.device)[0]
    if not klein:  # a list of captions; without guidance there are no negative ones
        embeds = [one.to(dtype) for one in embeds]
    pipe.text_encoder = None
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    side = SIDE.value
    draw = lambda: pipe(
        prompt_embeds=embeds, height=side, width=side, output_type="np",
        num_inference_steps=family.DEPLOYED_STEPS, **own,
    ).images  # fmt: skip
    factor = pipe.vae_scale_factor
    shape = BATCH.value, pipe.vae.config.latent_channels, side // factor, side // factor
    noise = torch.randn(shape, dtype=dtype, device=pipe.device)
    decode = lambda: pipe.vae.decode(noise).sample.float().cpu()

    def facts() -> dict:
        name = torch.cuda.get_device_name() if cuda else "cpu"
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return {"device": name, "steps": family.DEPLOYED_STEPS, "peak_bytes": peak}

    return facts, draw, decode


if __name__ == "__main__":
    program.run(main)
