"""The counts are those of the programs that run, and of the documented budget."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from dopsd_jax import dopsd
from dopsd_jax.adapters import attach
from dopsd_jax.adapters.lokr import Lokr
from dopsd_jax.adapters.lora import Lora
from dopsd_jax.estimation import flops
from dopsd_jax.families.work import adapter_work
from dopsd_jax.families.zimage import family
from dopsd_jax.methods import registry
from dopsd_jax.methods.method import Count, Passes
from dopsd_jax.models import zimage, zimage_config

FULL = zimage_config.ZImageConfig()
TINY = zimage_config.ZImageConfig(
    dim=96, layers=3, refiner_layers=2, heads=4, caption_dim=16, axes_dims=(8, 8, 8)
)


def chosen(cfg, targets="blocks"):
    return attach.select(attach.slots(zimage_config.names(cfg)), targets, family.LORA_PRESETS)


def of_rank(rank, kind=Lora, which="products"):
    return lambda slot: getattr(kind, which)(slot.din, slot.dout, rank)


def dopsd_passes(steps, with_loss=None, precomputed=True):
    """precomputed: captions are refined once a rollout, as `dopsd` does; False: at every node."""
    with_loss = steps if with_loss is None else with_loss
    if precomputed:
        return registry.METHODS["dopsd"].passes({}, Count(steps, with_loss, 0))
    return Passes(with_loss, steps - with_loss, with_loss, steps - with_loss, with_loss, with_loss)


def adapted(cfg, targets, rank, remat="none", kind=Lora):
    """(graph, adapters, base), all abstract."""

    def build():
        net = zimage.ZImage(cfg, remat=remat, rngs=nnx.Rngs(0))
        attach.attach(net, chosen(cfg, targets), rank, rank, jax.random.key(0), kind)
        return net

    return nnx.split(nnx.eval_shape(build), nnx.LoRAParam, ...)


def product_flops(jaxpr) -> float:
    """FLOP of every matrix product of a traced program, scan bodies times their length."""
    total = 0
    jaxpr = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        inner = sum(product_flops(getattr(j, "jaxpr", j)) for j in jaxprs_in_params(eqn.params))
        total += inner * eqn.params.get("length", 1)
    return total


@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize(
    ("targets", "kind"),
    [("blocks", Lora), ("attention", Lora), ("main", Lora), ("everything", None), ("main", Lokr),
     ("blocks", Lokr.of(4))],
)  # fmt: skip
def test_a_traced_step_has_the_counted_products(targets, kind, remat):
    """The tiny step, exactly: one sample, odd sizes, padding tokens."""
    latent, rows, rank, grid = (6, 10), (32, 64), 4, (1.0, 0.8, 0.5, 0.0)
    full = kind is None
    if full:
        whole = nnx.eval_shape(lambda: zimage.ZImage(TINY, remat=remat, rngs=nnx.Rngs(0)))
        graphdef, adapter, base = nnx.split(whole, nnx.Param, ...)
    else:
        graphdef, adapter, base = adapted(TINY, targets, rank, remat, kind)
    context = lambda n: family.Context(jnp.zeros((1, n, TINY.caption_dim)), jnp.array([n]))
    nodes = dopsd.make_nodes(grid, "x0", "all", jax.random.key(0))

    def step(student, teacher, base, contexts, noise):
        net = family.denoiser(graphdef)
        return dopsd.loss_and_gradient(net, student, teacher, base, contexts, noise, nodes)

    contexts = dopsd.Contexts(*map(context, rows))
    traced = jax.make_jaxpr(step)(adapter, adapter, base, contexts, jnp.zeros((1, *latent, 16)))
    counted = flops.step_work(
        family,
        TINY,
        (dopsd_passes(3), None),
        rows,
        height=latent[0],
        width=latent[1],
        chosen={} if full else chosen(TINY, targets),
        products=of_rank(rank, kind),
        inner=of_rank(rank, kind, "inner"),
        full=full,
        remat=remat,
    )
    assert counted.executed == product_flops(traced.jaxpr)
    assert counted.executed > counted.model  # attention keeps no probabilities


@pytest.mark.parametrize("gradient", [False, True])
def test_a_layer_costs_what_xla_says(gradient):
    """XLA's count of a program of two layers less that of one layer: scans are left out."""
    cfg = zimage_config.ZImageConfig(dim=768, layers=2, heads=6, caption_dim=16)
    tokens, rank = 256, 16
    graphdef, adapter, base = adapted(cfg, "main", rank)
    rope = (jnp.ones((1, tokens, 1, cfg.head_dim // 2)),) * 2

    def run(adapter, base, x, c, layers):
        blocks = nnx.merge(graphdef, adapter, base).layers
        for i in range(layers):
            x = jax.tree.map(lambda a, i=i: a[i], blocks)(x, rope, jnp.array([tokens]), c)
        return jnp.sum(x * x)

    def cost(layers):
        function = lambda *args: run(*args, layers)
        if gradient:
            function = jax.grad(function, argnums=(0, 2))
        x, c = jnp.ones((1, tokens, cfg.dim)), jnp.ones((1, cfg.modulation_dim))
        return jax.jit(function).lower(adapter, base, x, c).cost_analysis()["flops"]

    two, one = (
        family.velocity_work(
            zimage_config.ZImageConfig(**{**vars(cfg), "layers": n}), 32, 32, 0,
            chosen(zimage_config.ZImageConfig(**{**vars(cfg), "layers": n}), "main"), of_rank(rank),
        )
        for n in (2, 1)
    )  # fmt: skip
    counted = two.forward - one.forward + (two.backward - one.backward if gradient else 0)
    # XLA counts sums, norms and exponentials too: about 1 % at this size.
    assert counted < cost(2) - cost(1) < 1.02 * counted


@pytest.mark.parametrize(
    ("rows", "remat", "model", "executed"),
    [
        ((512, 1024), "none", 846, 867),
        ((512, 1024), "full", 846, 1123),
        ((128, 704), "none", 771, 788),
        ((128, 704), "full", 771, 1019),
    ],
)
def test_the_documented_budget(rows, remat, model, executed):
    """TFLOP for an image of 1024 x 1024, K = 4, rank 64; captions refined at every node."""
    work = flops.step_work(
        family,
        FULL, (dopsd_passes(4, precomputed=False), None), rows, height=128, width=128,
        chosen=chosen(FULL), products=of_rank(64), remat=remat,
    )  # fmt: skip
    assert abs(work.model / 1e12 - model) < 0.51
    assert abs(work.executed / 1e12 - executed) < 0.51


def test_options_change_the_count_as_they_should():
    def count(with_loss=4, precomputed=True, held=None, rows=(512, 1024), **options):
        settings = {
            "height": 128, "width": 128, "chosen": chosen(FULL), "products": of_rank(64),
        }  # fmt: skip
        passes = dopsd_passes(4, with_loss, precomputed), held
        return flops.step_work(family, FULL, passes, rows, **{**settings, **options})

    assert count().model < count(precomputed=False).model < 1.01 * count().model
    nothing, all_four = count(with_loss=0), count(with_loss=4)
    assert all_four == count()
    assert count(with_loss=2).model - nothing.model == pytest.approx(
        (all_four.model - nothing.model) / 2
    )
    none, dots, full = (count(remat=remat) for remat in ("none", "dots", "full"))
    assert none.model == dots.model == full.model
    assert none.model < none.executed == dots.executed < full.executed
    assert count(remat="unrolled") == count(remat="none")
    # Anchors have contexts of their own; as long as the student's, they are as much work.
    beside = Passes(1, 2, captions=1)
    more = [count(held=beside, rows=(512, 1024, n)).model - count().model for n in (64, 512)]
    as_rows = Passes(*(a + b for a, b in zip(dopsd_passes(4), beside, strict=True)))
    whole = flops.step_work(
        family, FULL, (as_rows, None), (512, 1024), height=128, width=128, chosen=chosen(FULL),
        products=of_rank(64),
    )  # fmt: skip
    assert count().model + more[1] == pytest.approx(whole.model, rel=1e-12)
    assert more[0] < more[1]


def test_the_published_network_has_its_published_size():
    assert flops.parameters(family, FULL) == 6_154_908_736
    assert adapter_work(chosen(FULL).values(), of_rank(64)) == 2 * 158_760_960


def test_the_counted_parameters_are_those_of_the_module():
    _, adapter, base = adapted(TINY, "blocks", 4)
    size = lambda tree, kind: sum(
        leaf.size for _, leaf in nnx.to_flat_state(tree) if type(leaf) is kind
    )
    assert size(base, nnx.Param) == flops.parameters(family, TINY)
    assert 2 * size(adapter, nnx.LoRAParam) == adapter_work(chosen(TINY).values(), of_rank(4))


def test_rates_of_devices():
    assert flops.peak_rate("TPU v5") == flops.peak_rate("TPU v5p") == 459e12
    assert flops.peak_rate("TPU v5 lite") == 197e12
    assert flops.peak_rate("TPU v6 lite") == 918e12
    assert 2 * flops.peak_rate("TPU7x") == 2307e12, "a chip is two devices"
    assert flops.peak_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_rate("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_rate("cpu") is None
