"""What few bits cost in accuracy: the velocity's error and the LoRA gradient's direction.

    python benchmarks/quantised.py --report=docs/quantised.md

Of a quantised base, and of the teacher's products in fp8. One D-OPSD step of a Z-Image of smaller
width and depth, its weights random: no published weights are read. Activations are float32, so that
nothing else differs.
"""

import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from dopsd_jax import dopsd
from dopsd_jax.adapters import attach
from dopsd_jax.families.zimage import family
from dopsd_jax.models import layers, quantised, zimage, zimage_config

HEADS = flags.DEFINE_integer("heads", 10, "of 128; the published network has 30", lower_bound=1)
LAYERS = flags.DEFINE_integer("layers", 6, "the published network has 30", lower_bound=1)
PIXELS = flags.DEFINE_integer("side", 128, "of the image, in pixels; a multiple of 16")
REPORT = flags.DEFINE_string("report", None, "file for the page")

PAGE = """# A base in few bits

`config.base_dtype` may be `int8`, `fp8` or `nf4` (`pip install 'dopsd_jax[quant]'`): the frozen
kernels of attention and feed-forward parts, 98 % of Z-Image, are then stored in 8 or 4 bits with
float32 scales (qwix) and dequantised one layer at a time, where they are used. Norms, modulations,
embedders and the final layer stay bfloat16; adapters, optimizer and teacher float32. Kernels are
quantised while they are loaded, tensor by tensor. Memory on a TPU: [scaling.md](scaling.md). The
LoRA file is for the unquantised model, whose kernels differ from those of the training by the error
below. Full fine-tuning has no frozen base.

A scale is shared by {tiles}.

Made by `python benchmarks/quantised.py --report=docs/quantised.md`; do not edit. {about}

* *kernels*: root mean square error of the stored weights, relative.
* *velocity*: the same of the student's first velocity.
* *cosine*: of one step's LoRA gradient with the gradient of the base in the column *against*.
* *outliers*: weights with a heavy tail (Student's t, 4 degrees of freedom), {share:.1%} of a
  kernel's inputs {gain:.0f} times larger. Gaussian weights are easy to quantise; the published
  weights were not measured.
* *{whole}*: not an option; it shows the gain of int8's tiles.

{table}

## The teacher's products in 8-bit floats

With `config.teacher.products=fp8` ([how](running.md#the-teachers-products-in-8-bit-floats)) the
products with these kernels are of 8-bit floats in the teacher's forward pass: their inputs are
rounded too. The same step; the CPU multiplies the rounded numbers in float32. The base `fp8` is
rounded only once: its codes are used as they are.

* *velocity*, *norm*, *cosine*: of the teacher's first velocity, against that of the same base
  without the option: relative error, ratio of the norms, cosine.
* *gradient*: cosine of one step's LoRA gradients with and without.

{products}
"""
WHOLE = "int8, one scale an output"  # to compare: do tiles help?
OUTLIERS, GAIN = 0.005, 10.0  # share of a kernel's inputs that are larger, and how much


def main(_) -> None:
    jax.config.update("jax_default_matmul_precision", "float32")
    quantised.SCHEMES[WHOLE] = quantised.Scheme("int8")
    cfg = zimage_config.ZImageConfig(
        dim=128 * HEADS.value, heads=HEADS.value, layers=LAYERS.value, refiner_layers=1
    )
    lines = [
        "| weights | base | against | kernels | velocity | cosine of the LoRA gradient |",
        "|---|---|---|---|---|---|",
    ]
    products = [
        "| weights | base | velocity | norm | cosine | gradient |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ("Gaussian", "outliers"):
        for table, rows in ((lines, compare(cfg, kind)), (products, compare_products(cfg, kind))):
            for row in rows:
                table.append(f"| {kind} | " + " | ".join(row) + " |")
                print(table[-1], flush=True)
    about = (
        f"One step of width {cfg.dim}, {cfg.layers} layers and one of each refiner, "
        f"{PIXELS.value}² pixels, rank 64, K = 2; jax {jax.__version__}, "
        f"{jax.default_backend()}, Python {platform.python_version()}."
    )
    if REPORT.value:
        offered = [(name, s) for name, s in quantised.SCHEMES.items() if name != WHOLE]
        share = lambda s: f"{s.tile} inputs of an output" if s.tile else "all inputs of an output"
        Path(REPORT.value).write_text(
            PAGE.format(
                tiles=", ".join(f"{share(s)} ({name})" for name, s in offered),
                about=about,
                share=OUTLIERS,
                gain=GAIN,
                whole=WHOLE,
                table="\n".join(lines),
                products="\n".join(products),
            )
        )
    print(about)


def compare(cfg: zimage_config.ZImageConfig, kind: str):
    """(base, reference, error of kernels, error of the velocity, cosine) for each base type."""
    exact = network(cfg, kind)
    reference = measure(cfg, *exact)
    half = rounded(exact[2])
    result = measure(cfg, exact[0], exact[1], half)
    yield "bfloat16", "float32", *scores(result, reference, kernels(half), kernels(exact[2]))
    for scheme in quantised.SCHEMES:
        module = nnx.merge(exact[0], exact[1], half)
        short = nnx.split(quantised.quantised(module, scheme), nnx.LoRAParam, ...)
        found = measure(cfg, *short)
        yield scheme, "bfloat16", *scores(found, result, kernels(short[2], scheme), kernels(half))


def compare_products(cfg: zimage_config.ZImageConfig, kind: str):
    """(base, error, ratio of norms and cosine of the teacher's velocity, cosine of the gradients)
    for each base type, with the teacher's products in fp8 against those without."""
    graphdef, adapter, base = network(cfg, kind)
    half = rounded(base)
    for scheme in ("bfloat16", *(name for name in quantised.SCHEMES if name != WHOLE)):
        parts = graphdef, adapter, half
        if scheme != "bfloat16":
            module = quantised.quantised(nnx.merge(*parts), scheme)
            parts = nnx.split(module, nnx.LoRAParam, ...)
        exact, found = (measure(cfg, *parts, asked=True, rounds=rounds) for rounds in (False, True))
        norm = np.linalg.norm(found[0]) / np.linalg.norm(exact[0])
        off = f"{error(found[0], exact[0]):.2%}"
        yield scheme, off, f"{norm:.4f}", *(f"{cosine(found[i], exact[i]):.4f}" for i in (0, 1))


def network(cfg: zimage_config.ZImageConfig, kind: str):
    """(graph, adapters that are not zero, base) with random weights."""
    net = zimage.ZImage(cfg, remat="full", rngs=nnx.Rngs(0))
    for part in (net.layers, net.noise_refiner):  # open gates: otherwise blocks hardly act
        part.modulation.bias[...] += 0.5
    chosen = attach.select(attach.slots(zimage_config.names(cfg)), "blocks", family.LORA_PRESETS)
    attach.attach(net, chosen, 64, 128.0, jax.random.key(1))
    graphdef, adapter, base = nnx.split(net, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [1e-3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    adapter = jax.tree.unflatten(tree, [a + n for a, n in zip(leaves, noise, strict=True)])
    if kind == "outliers":
        base = changed(base, with_outliers)
    return graphdef, adapter, base


def with_outliers(kernel):
    """`kernel` with a Student t's tail (4 degrees of freedom) and a few large input channels."""
    size, (key, other) = jnp.std(kernel), jax.random.split(jax.random.key(kernel.shape[-1]))
    tail = jax.random.t(key, 4.0, kernel.shape) * size / jnp.sqrt(2.0)
    large = jax.random.uniform(other, (*kernel.shape[:-1], 1)) < OUTLIERS
    return jnp.where(large, GAIN, 1.0) * tail


def rounded(base: nnx.State) -> nnx.State:
    """The large kernels as bfloat16 holds them."""
    return changed(base, lambda w: w.astype(jnp.bfloat16).astype(jnp.float32))


def changed(base: nnx.State, change) -> nnx.State:
    flat = nnx.to_flat_state(base)
    pick = lambda p: quantised.is_quantised(".".join(map(str, p)))
    return nnx.from_flat_state([(p, v.replace(change(v[...])) if pick(p) else v) for p, v in flat])


def kernels(base: nnx.State, scheme: str | None = None) -> dict[str, np.ndarray]:
    """The main layers' large kernels, dequantised."""
    flat = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(base["layers"])}
    if scheme is None:
        return {p: np.asarray(w) for p, w in flat.items() if quantised.is_quantised(f".{p}")}
    names = [p.removesuffix(".codes") for p in flat if p.endswith(".codes")]
    return {
        p: np.asarray(quantised.dequantise(flat[f"{p}.codes"], flat[f"{p}.scales"], scheme))
        for p in names
    }


def measure(cfg: zimage_config.ZImageConfig, graphdef, adapter, base, asked=False, rounds=False):
    """The student's first velocity and the gradient of one step, flat.

    asked: the teacher's velocity instead. rounds: the teacher's products are those of `models.fp8`.
    """
    rng = np.random.default_rng(0)
    context = lambda rows: family.Context(
        jnp.asarray(rng.standard_normal((1, rows, cfg.caption_dim), np.float32)), jnp.array([rows])
    )
    contexts, side = dopsd.Contexts(context(32), context(64)), PIXELS.value // 8
    noise = jnp.asarray(rng.standard_normal((1, side, side, cfg.channels), np.float32))
    nodes = dopsd.make_nodes((1.0, 0.6, 0.0), "x0", "all", jax.random.key(0))
    net = family.denoiser(graphdef)
    if rounds:
        graph = layers.rounded(graphdef, adapter, base)
        net = net._replace(rounded=family.denoiser(graph))
    one, context = (net.teacher, contexts.teacher) if asked else (net, contexts.student)

    @jax.jit
    def step(adapter, base):
        _, gradient = dopsd.loss_and_gradient(net, adapter, adapter, base, contexts, noise, nodes)
        told = one.precompute(adapter, base, context)
        return one.velocity(adapter, base, noise, nodes.sigma[0], context, told), gradient

    velocity, gradient = step(adapter, base)
    return np.ravel(velocity), np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradient)])


def scores(found, reference, weights, exact) -> tuple[str, str, str]:
    off = sum(np.sum((weights[p] - exact[p]) ** 2) for p in exact)
    size = sum(np.sum(exact[p] ** 2) for p in exact)
    return (
        f"{np.sqrt(off / size):.2%}",
        f"{error(found[0], reference[0]):.2%}",
        f"{cosine(found[1], reference[1]):.4f}",
    )


def cosine(found, reference) -> float:
    return float(found @ reference / np.linalg.norm(found) / np.linalg.norm(reference))


def error(found, reference) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


if __name__ == "__main__":
    app.run(main)
