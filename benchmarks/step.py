"""Times the compiled D-OPSD step of a configuration on the devices here, or PyTorch's.

    python benchmarks/step.py --config configs/zimage.py:random
    python benchmarks/step.py --config configs/flux2_klein.py:4b --config.batch_size=1 --repeats=20
    python benchmarks/step.py --config configs/zimage.py:lora --torch=checkpointing,per_step

Weights, captions and noise are random: the time does not depend on them, and nothing is read. The
sizes are those of config.model: `random`, a folder, or a published one by its name on the hub. With
--torch the loop of PyTorch (diffusers, peft) is timed instead, on the same sizes; the words are
those of `torch_step.py`, or `plain`. The last line is the result as JSON.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import random_arrays
from absl import flags

from dopsd_jax.common import program
from dopsd_jax.common.config_fields import name_or_list
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.config.flags import CONFIG, parse
from dopsd_jax.estimation import abstract_step, compiled_step, counted_step, remat
from dopsd_jax.estimation.abstract_step import Workload
from dopsd_jax.families.base import STUDENT, TEACHER
from dopsd_jax.methods import registry
from dopsd_jax.models import kinds
from dopsd_jax.parallel import sharding
from dopsd_jax.run import build, data_set

SIDE = flags.DEFINE_integer(
    "side", None, "pixels; else the largest size of the data", lower_bound=1
)
TOKENS = flags.DEFINE_list(
    "tokens", None, "rows of the student's and the teacher's captions; else those of long ones"
)
REPEATS = flags.DEFINE_integer("repeats", 10, "timed steps", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup", 2, "steps before them", lower_bound=1)
TORCH = flags.DEFINE_list("torch", None, "time PyTorch instead: plain, or words of torch_step.py")


def main() -> None:
    config = CONFIG.value
    config.data.path = config.data.path or build.RANDOM  # no data are read here
    family, size, factor, origin = abstract_step.find_network(config, full_size=False)
    size_of_data = data_set.largest_size(config, factor * size.patch)
    width, height = [SIDE.value] * 2 if SIDE.value else size_of_data
    rows = [*map(int, TOKENS.value)] if TOKENS.value else family.ROWS
    shape = {"rows_student": rows[STUDENT], "rows_teacher": rows[TEACHER], "factor": factor}
    case = Workload(family, size, height, width, **shape)
    print(f"{'network':9} {origin}, {width} x {height} pixels, captions {rows}", flush=True)
    found = time_torch(config, case, TORCH.value) if TORCH.value else time_jax(config, case)
    images, seconds = config.batch_size * config.accumulate, found["seconds"]
    median = statistics.median(seconds)
    print(
        f"{'time':9} {median:.4g} s a step (median of {len(seconds)}, {min(seconds):.4g} to"
        f" {max(seconds):.4g}), {images / median:.4g} images/s, on {found['device']}"
    )
    print("result: " + json.dumps(found | {"median": median, "images": images}))


def time_jax(config, case: Workload) -> dict[str, Any]:
    """Seconds of each timed step, memory and work."""
    mesh, device = sharding.make_mesh(config.mesh), jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    facts: dict[str, Any] = {"device": device.device_kind, "limit": limit}
    if config.remat == kinds.AUTO:
        told = device.platform, device.device_kind, compiled_step.device_memory(device)
        chosen = remat.choose(config, case, mesh, *told)
        config.remat = chosen.remat
        print(chosen.why, flush=True)
    count = counted_step.need(config, case, abstract_step.abstract_mesh(config, mesh.size))[2]
    program = abstract_step.make_program(config, case, mesh, device.platform)
    work = compiled_step.work(config, case, program, mesh)
    images = config.batch_size * config.accumulate
    facts |= {
        "remat": config.remat,
        "attention": program.attention,
        "counted_bytes": count,
        "model_flop": work.model * images / mesh.size,
        "executed_flop": work.executed * images / mesh.size,
    }
    print(f"{'step':9} {json.dumps(facts)}", flush=True)
    with jax.set_mesh(mesh):
        base = random_arrays.weights(program.base)
        state = program.plan.initial_state(
            random_arrays.weights(program.plan.abstract_state.student)
        )
        batch = random_arrays.batch(program.batch)
        anchors = random_arrays.batch(program.anchors) if program.anchors else None
        arguments = base, batch, 0, anchors  # all that is counted is run
        begin = time.perf_counter()
        lowered = program.plan.step.lower(state, *arguments, latent=program.latent)
        traced = time.perf_counter()
        compiled = lowered.compile()
        facts |= {"trace": traced - begin, "compile": time.perf_counter() - traced}
        print(f"{'compile':9} {facts['compile']:.1f} s", flush=True)
        stats = compiled.memory_analysis()
        facts["temporary_bytes"] = stats.temp_size_in_bytes if stats else None
        seconds = []
        for _ in range(WARMUP.value + REPEATS.value):
            begin = time.perf_counter()
            # The same program; called itself, it refuses 4-bit arrays that lie on a mesh.
            done = program.plan.step(state, *arguments, latent=program.latent)
            state, metrics = jax.block_until_ready(done)
            seconds.append(time.perf_counter() - begin)
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        if registry.rounds(config):
            facts["teacher_error"] = rounding_error(program, state, base, batch)
    if not math.isfinite(float(metrics["loss"])):
        raise UserError(f"the loss is {float(metrics['loss'])}: these times mean nothing")
    return facts | {"seconds": seconds[WARMUP.value :], "peak_bytes": peak}


def rounding_error(program: abstract_step.Program, state, base, batch) -> float:
    """What config.teacher.products changes of the teacher's velocity for noise, relative."""
    net, weights = program.plan.net, state.student if state.teacher is None else state.teacher
    context = jax.tree.map(lambda x: x[0], batch.contexts.teacher)
    noise = jax.random.normal(jax.random.key(0), program.latent)

    @jax.jit
    def error(weights, base, context, noise):
        exact, rounded = (
            one.velocity(weights, base, noise, jnp.float32(1), context, told)
            for one in (net, net.teacher)
            for told in [one.precompute(weights, base, context)]
        )
        return jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)

    return float(error(weights, base, context, noise))


def time_torch(config, case: Workload, words: list[str]) -> dict[str, Any]:
    """What `torch_step.py` measures, in a process of its own: it has all of the device's memory."""
    loss, loss_steps = name_or_list(config.loss), name_or_list(config.loss_steps)
    others = {
        "method": "dopsd" if config.method != "dopsd" else "",
        "train": "lora" if config.train == "full" else "",
        "lora.targets": "" if config.lora.targets == "blocks" else "blocks",
        "loss": "" if loss in ("x0", "velocity") or not isinstance(loss, str) else "x0 or a list",
        "loss_steps": "all or a list"
        if isinstance(loss_steps, str) and loss_steps != "all"
        else "",
        "base_dtype": "" if config.base_dtype in kinds.WHOLE else "bfloat16",
        "anchor.share": "0" if config.anchor.share else "",
    }
    raise_if(
        f"--torch: the PyTorch loop has not this config.{field}; use {other}"
        for field, other in others.items()
        if other
    )
    jax.config.update("jax_platforms", "cpu")  # the device is for PyTorch
    family, size = case.family, case.size
    mesh = abstract_step.abstract_mesh(config, 1)
    program = abstract_step.make_program(config, case, mesh, "cpu")
    job = {
        "family": family.NAME,
        "transformer": {k: v for k, v in size.to_dict().items() if not k.startswith("_")},
        "latent": program.latent,
        "accumulate": config.accumulate,
        # One sample's arrays by role: the rows of text, then clean references, if any.
        "contexts": [
            [x.shape[2:] for x in jax.tree.leaves(context) if jnp.issubdtype(x.dtype, jnp.floating)]
            for context in program.batch.contexts
        ],
        "sigmas": program.plan.schedule.grid(*case.latent)[:-1],
        "loss": loss,
        "loss_steps": None if loss_steps == "all" else loss_steps,
        "teacher": config.teacher.weights,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "base_dtype": config.base_dtype,
        "dtype": config.dtype,
        "words": [word for word in words if word != "plain"],
        "warmup": WARMUP.value,
        "repeats": REPEATS.value,
    }
    script = Path(__file__).with_name("torch_step.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(job)], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise UserError(f"--torch: {script.name} failed; its own message stands above")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parse(data=False)
    program.run(main)
