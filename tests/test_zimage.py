"""Z-Image's transformer against diffusers, module by module and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import ZImageTransformer2DModel
from fill import fill
from flax import nnx

from dopsd_jax.common.errors import UserError
from dopsd_jax.models import zimage, zimage_config

TINY = dict(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=48, n_layers=3,
    n_refiner_layers=2, n_heads=3, n_kv_heads=3, norm_eps=1e-5, qk_norm=True, cap_feat_dim=20,
    rope_theta=256.0, t_scale=1000.0,
    axes_dims=[4, 6, 6], axes_lens=[200, 64, 64],
)  # fmt: skip
ODD = {
    "tiny": {},
    "wide, more time features than width": dict(
        dim=288, n_heads=6, axes_dims=[16, 16, 16], n_layers=1
    ),
    "one refiner, no qk norm": dict(n_refiner_layers=1, qk_norm=False, norm_eps=1e-3),
    "patch 4, other rope": dict(
        all_patch_size=(4,), rope_theta=100.0, t_scale=300.0, axes_dims=[2, 4, 10]
    ),
}


def build(overrides=None, seed=0):
    """A diffusers model with random, non-degenerate weights, and its config."""
    torch.manual_seed(seed)
    config = TINY | (overrides or {})
    model = ZImageTransformer2DModel(**config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.1 if p.ndim == 1 else p.shape[-1] ** -0.5))
            if "norm" in name:
                p.add_(1.0)
    return model, zimage_config.ZImageConfig.from_dict(dict(model.config), "config.json")


def port(model, cfg, **options):
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    leaves = zimage_config.names(cfg)
    assert {s.name: s.shape for leaf in leaves for s in leaf.sources} == {
        k: v.shape for k, v in tensors.items()
    }
    abstract = nnx.eval_shape(lambda: zimage.ZImage(cfg, rngs=nnx.Rngs(0), **options))
    return fill(abstract, leaves, tensors)


def inputs(cfg, h, w, lengths, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(lengths), h, w, cfg.channels), np.float32)
    t = rng.uniform(0, 1, len(lengths)).astype(np.float32)
    rows = max(zimage.padded_length(np.array(lengths)))
    features = rng.standard_normal((len(lengths), rows, cfg.caption_dim), np.float32)
    return x, t, features, np.array(lengths, np.int32)


def run_torch(model, x, t, features, lengths):
    images = [torch.tensor(i).permute(2, 0, 1)[:, None] for i in x]
    captions = [torch.tensor(f[:n]) for f, n in zip(features, lengths, strict=True)]
    with torch.no_grad():
        cfg = model.config
        out = model(
            images,
            torch.tensor(t),
            captions,
            patch_size=cfg.all_patch_size[0],
            f_patch_size=1,
            return_dict=False,
        )[0]
    return np.stack([o[:, 0].permute(1, 2, 0).float().numpy() for o in out])


@jax.jit
def run_jax(model, x, t, features, lengths):
    return model(x, t, model.refine(features, lengths), lengths)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("size", [(8, 8), (12, 20)], ids=["square", "non-square"])
def test_whole_network_equals_diffusers(name, size):
    model, cfg = build(ODD[name])
    args = inputs(cfg, *size, lengths=[7, 40, 32])
    assert relative_error(run_jax(port(model, cfg), *args), run_torch(model, *args)) < 1e-5


def test_modules_equal_diffusers():
    model, cfg = build()
    ours = port(model, cfg)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 32, cfg.dim), np.float32)
    c = rng.standard_normal((2, cfg.modulation_dim), np.float32)
    t = np.array([0.3, 0.9], np.float32)
    positions = np.stack([rng.integers(0, n, (2, 32)) for n in cfg.axes_lens], -1)
    freqs = torch.stack([model.rope_embedder(torch.tensor(p)) for p in positions])
    rope = ours._rope(positions)
    np.testing.assert_allclose(rope[0][:, :, 0] + 1j * rope[1][:, :, 0], freqs.numpy(), atol=2e-7)
    layer = lambda stack, i: jax.tree.map(lambda a: a[i], stack)
    lengths = jnp.array([32, 32])
    with torch.no_grad():
        tx, tc = torch.tensor(x), torch.tensor(c)
        pairs = {
            "time": (
                ours.time_out(jax.nn.silu(ours.time_in(zimage.sinusoids(t * 1000, 256)))),
                model.t_embedder(torch.tensor(t) * 1000),
            ),
            "attention": (
                layer(ours.layers, 1).attention(x, rope, lengths),
                model.layers[1].attention(tx, freqs_cis=freqs),
            ),
            "feed forward": (
                layer(ours.layers, 1).feed_forward(x),
                model.layers[1].feed_forward(tx),
            ),
            "block": (
                layer(ours.layers, 2)(x, rope, lengths, c),
                model.layers[2](tx, None, freqs, tc),
            ),
            "plain block": (
                layer(ours.context_refiner, 0)(x, rope, lengths),
                model.context_refiner[0](tx, None, freqs),
            ),
        }
    for name, (actual, expected) in pairs.items():
        assert relative_error(actual, expected) < 1e-5, name


def test_bfloat16_is_as_close_as_diffusers_own():
    model, cfg = build()
    args = inputs(cfg, 8, 12, lengths=[7, 40])
    exact = run_torch(model, *args)
    ours = relative_error(run_jax(port(model, cfg, dtype=jnp.bfloat16), *args), exact)
    half = model.to(torch.bfloat16)
    x, t, features, lengths = args
    images = [torch.tensor(i).permute(2, 0, 1)[:, None].bfloat16() for i in x]
    captions = [torch.tensor(f[:n]).bfloat16() for f, n in zip(features, lengths, strict=True)]
    with torch.no_grad():
        out = half(images, torch.tensor(t).bfloat16(), captions, return_dict=False)[0]
    theirs = relative_error(
        np.stack([o[:, 0].permute(1, 2, 0).float().numpy() for o in out]), exact
    )
    assert ours < max(theirs, 0.02), f"ours {ours:.4f}, diffusers {theirs:.4f}"


def test_a_batch_equals_its_items_and_padding_rows_do_not_matter():
    model, cfg = build()
    ours = port(model, cfg)
    x, t, features, lengths = inputs(cfg, 12, 8, lengths=[5, 64, 33])
    whole = run_jax(ours, x, t, features, lengths)
    for i in range(len(lengths)):
        rows = int(zimage.padded_length(lengths)[i])
        alone = run_jax(
            ours, x[i : i + 1], t[i : i + 1], features[i : i + 1, :rows], lengths[i : i + 1]
        )
        assert relative_error(alone[0], whole[i]) < 5e-6
    noisy = np.where(np.arange(64)[None, :, None] < lengths[:, None, None], features, 1e3)
    np.testing.assert_array_equal(run_jax(ours, x, t, noisy, lengths), whole)


@pytest.mark.parametrize("token", ["x_pad_token", "caption_pad_token"])
def test_pad_tokens_are_attended(token):
    model, cfg = build()
    ours = port(model, cfg)
    args = inputs(cfg, 8, 8, lengths=[7])
    before = run_jax(ours, *args)
    setattr(ours, token, nnx.Param(getattr(ours, token)[...] + 1.0))
    assert relative_error(run_jax(ours, *args), before) > 1e-3


def test_closed_gates_make_modulated_layers_the_identity():
    model, cfg = build()
    for stack in (model.layers, model.noise_refiner):
        for block in stack:
            torch.nn.init.zeros_(block.adaLN_modulation[0].weight)
            torch.nn.init.zeros_(block.adaLN_modulation[0].bias)
    ours = port(model, cfg)
    x, t, features, lengths = inputs(cfg, 8, 8, lengths=[7])
    image = ours.x_embedder(zimage.patchify(x, cfg.patch))
    c = ours.time_out(jax.nn.silu(ours.time_in(zimage.sinusoids(t * 1000, 256))))
    y = zimage.normalize(image, 1e-6) * (1 + ours.final_modulation(jax.nn.silu(c)))[:, None]
    expected = zimage.unpatchify(ours.final_linear(y), 4, 4, cfg.patch)
    assert relative_error(run_jax(ours, x, t, features, lengths), expected) < 1e-6


@pytest.mark.parametrize("remat", ["full", "dots", "unrolled"])
def test_remat_changes_neither_value_nor_gradient(remat):
    model, cfg = build()
    args = inputs(cfg, 8, 8, lengths=[7])
    loss = jax.jit(jax.value_and_grad(lambda x, m: jnp.sum(run_jax(m, x, *args[1:]) ** 2)))
    plain, other = loss(args[0], port(model, cfg)), loss(args[0], port(model, cfg, remat=remat))
    assert relative_error(other[0], plain[0]) < 1e-6
    assert relative_error(other[1], plain[1]) < 1e-5


def test_config_faults_are_all_named():
    with pytest.raises(UserError) as error:
        zimage_config.ZImageConfig.from_dict(
            {k: v for k, v in TINY.items() if k not in ("dim", "n_heads")}, "t/config.json"
        )
    assert len(error.value.problems) == 2 and all(
        "t/config.json" in p for p in error.value.problems
    )
    with pytest.raises(UserError, match="axes_dims"):
        zimage_config.ZImageConfig.from_dict(TINY | {"axes_dims": [4, 4, 4]}, "config.json")
