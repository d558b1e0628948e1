"""Adapters: the identity at the start, merging, targets, export and import."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from flax import nnx

from dopsd_jax.adapters import attach
from dopsd_jax.adapters.lora import Lora
from dopsd_jax.common.errors import UserError
from dopsd_jax.families.zimage.family import LORA_PRESETS, Context, denoiser
from dopsd_jax.models import zimage, zimage_config
from dopsd_jax.models.names import to_flax

CFG = zimage_config.ZImageConfig(
    dim=48, layers=3, refiner_layers=2, heads=3, channels=4, caption_dim=20, axes_dims=(4, 6, 6),
    axes_lens=(128, 32, 32),
)  # fmt: skip
FULL = zimage_config.ZImageConfig()


def build(chosen=None, rank=4, alpha=8.0):
    model = zimage.ZImage(CFG, rngs=nnx.Rngs(0))
    for name in ("layers", "noise_refiner"):  # open gates: otherwise little would be seen
        getattr(model, name).modulation.bias[...] += 0.5
    if chosen is not None:
        attach.attach(model, chosen, rank, alpha, jax.random.key(1))
    return model


def run(graphdef, adapter, base):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 8, 8, 4), np.float32))
    context = Context(rng.standard_normal((2, 32, 20)).astype(np.float32), np.array([9, 30]))
    net = denoiser(graphdef)
    f = jax.jit(lambda a, b: net.velocity(a, b, x, 0.6, context, net.precompute(a, b, context)))
    return f(adapter, base)


def split(model):
    return nnx.split(model, nnx.LoRAParam, ...)


def choose(targets, cfg=CFG):
    return attach.select(attach.slots(zimage_config.names(cfg)), targets, LORA_PRESETS)


def noisy(adapter, seed=2):
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, noise)


def merge(model, deltas):
    """Adds the changes [out, in], by PyTorch path, to the weights of a network."""
    for leaf in zimage_config.names(CFG):
        names = [s.name.removesuffix(".weight") for s in leaf.sources]
        if not deltas.keys() & set(names):
            continue
        parts = [
            deltas.get(n, np.zeros(s.shape, np.float32))
            for n, s in zip(names, leaf.sources, strict=True)
        ]
        owner = model
        for name in leaf.path.split(".")[:-1]:
            owner = getattr(owner, name)
        place = () if leaf.index is None else leaf.index
        owner.kernel[...] = owner.kernel[...].at[place].add(to_flax(leaf, parts))


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in the kernel"])
def test_new_adapters_change_nothing_bit_for_bit(alone):
    plain, model = build(), build(choose("blocks"))
    for _, part in nnx.iter_graph(model):
        if isinstance(part, Lora):
            part.is_wide = not alone
    graphdef, adapter, base = split(model)
    with jax.disable_jit():  # operation by operation: a whole program may round the same otherwise
        np.testing.assert_array_equal(run(graphdef, adapter, base), run(*split(plain)))
    found = run(*split(plain))
    assert relative_error(run(graphdef, adapter, base), found) < 1e-6
    assert relative_error(run(graphdef, noisy(adapter), base), found) > 1e-3


@pytest.mark.parametrize(
    "targets", ["blocks", ("attention.to_q", "feed_forward.w3"), ("layers.1.*", "cap_embedder.1")]
)
def test_merged_equals_adapted(targets):
    chosen = choose(targets)
    graphdef, adapter, base = split(build(chosen))
    adapter = noisy(adapter)
    merged = build()
    deltas = {path: m.delta() for path, m in attach.export(adapter, chosen, 2.0).items()}
    merge(merged, deltas)
    assert relative_error(run(graphdef, adapter, base), run(*split(merged))) < 5e-6


def test_layers_of_a_stack_that_were_not_chosen_neither_act_nor_learn():
    chosen = choose(("layers.1.attention.to_q",))
    graphdef, adapter, base = split(build(chosen))
    gradient = jax.grad(lambda a: jnp.sum(run(graphdef, a, base) ** 2))(noisy(adapter))
    for _, leaf in nnx.to_flat_state(gradient):
        per_layer = np.abs(leaf[...]).max(axis=(1, 2))
        assert per_layer[1] > 0 and per_layer[0] == 0 and per_layer[2] == 0
    assert attach.export(adapter, chosen, 1.0).keys() == {"layers.1.attention.to_q"}


def test_the_published_model_gets_238_layers_and_158760960_parameters_at_rank_64():
    chosen = choose("blocks", FULL)
    assert len(chosen) == 238
    assert sum(64 * (s.din + s.dout) for s in chosen.values()) == 158_760_960
    assert len(attach.slots(zimage_config.names(FULL))) == 276
    assert len(choose("before_pr5", FULL)) == 5 * 34
    assert len(choose("main", FULL)) == 7 * 30
    # Beside its layers they are small, and so act alone; those of a small network do not.
    wide = lambda cfg, rank: [
        Lora.is_wide_for(s.din, s.dout, rank) for s in choose("blocks", cfg).values()
    ]
    assert not any(wide(FULL, 64)) and all(wide(CFG, 16))


def test_start_has_the_spread_of_peft():
    _, adapter, _ = split(build(choose("blocks"), rank=8))
    flat = {path[-1]: leaf[...] for path, leaf in nnx.to_flat_state(adapter) if "w13" in path}
    assert float(jnp.std(flat["a"])) == pytest.approx(1 / 8, rel=0.03)
    assert not flat["b"].any()


def test_no_two_adapters_begin_alike():
    """Nor two layers of a stack: each learns from random numbers of its own."""
    chosen = choose(("attention.to_q", "attention.to_k", "attention.to_v"))
    _, adapter, _ = split(build(chosen))
    begun = [module.a.tobytes() for module in attach.export(adapter, chosen, 1.0).values()]
    assert len(set(begun)) == len(chosen) == 3 * (3 + 2 * 2)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("attention.to_q", "ff.net.0.proj", "attn.to_q"),
            "'ff.net.0.proj' matches no linear layer",
        ),
        ("everything", "not a preset"),
        ((), "empty"),
        (("attention.norm_q",), "matches no linear layer"),
    ],
)
def test_targets_that_match_nothing_are_errors(targets, message):
    with pytest.raises(UserError, match=r"config\.lora\.targets") as error:
        choose(targets)
    assert message in str(error.value)
    assert len(error.value.problems) == (2 if "ff.net.0.proj" in targets else 1)


def test_export_and_load_are_inverses_and_a_smaller_rank_fits():
    chosen = choose("blocks")
    graphdef, adapter, base = split(build(chosen))
    trained = noisy(adapter)
    modules = attach.export(trained, chosen, 2.0)
    back = attach.load(adapter, chosen, modules, 2.0, "file")
    jax.tree.map(np.testing.assert_array_equal, back, trained)
    _, wider, wide_base = split(build(chosen, rank=6, alpha=6.0))
    wide = attach.load(noisy(wider), chosen, modules, 1.0, "file")  # of other numbers none stay
    wide_graph = split(build(chosen, rank=6, alpha=6.0))[0]
    assert relative_error(run(wide_graph, wide, wide_base), run(graphdef, trained, base)) < 5e-6


def test_loading_names_every_layer_that_does_not_fit():
    chosen = choose("attention")
    _, adapter, _ = split(build(chosen))
    modules = attach.export(adapter, choose("attention"), 1.0)
    modules.pop("layers.0.attention.to_q")
    modules["layers.0.feed_forward.w1"] = modules["layers.0.attention.to_k"]
    _, narrow, _ = split(build(chosen, rank=2))
    with pytest.raises(UserError) as error:
        attach.load(narrow, chosen, modules, 1.0, "some.safetensors")
    text = str(error.value)
    assert "adapts layers.0.feed_forward.w1" in text
    assert "nothing for layers.0.attention.to_q" in text
    assert "to_k has rank 4; set config.lora.rank, 2, to 4 or more" in text


def test_loading_tells_layers_of_another_size():
    chosen = choose("attention")
    _, adapter, _ = split(build(chosen))
    modules = attach.export(adapter, choose("attention"), 1.0)
    short = modules["layers.0.attention.to_k"]
    modules["layers.0.attention.to_k"] = dataclasses.replace(short, a=short.a[:, :-1])
    with pytest.raises(UserError, match=r"inputs and .* made for this model"):
        attach.load(adapter, chosen, modules, 1.0, "some.safetensors")
