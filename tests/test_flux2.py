"""FLUX.2's transformer against diffusers, and its table of names against the published ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import Flux2Transformer2DModel
from fill import fill
from flax import nnx

from dopsd_jax.common.errors import UserError
from dopsd_jax.models import flux2
from dopsd_jax.models.flux2_config import Flux2Config, names

TINY = dict(
    in_channels=12, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=3,
    joint_attention_dim=20, timestep_guidance_channels=32, axes_dims_rope=(2, 4, 4, 6),
    guidance_embeds=False,
)  # fmt: skip
ODD = {
    "tiny": {},
    "one layer each, other sizes": dict(
        num_layers=1, num_single_layers=1, attention_head_dim=10, num_attention_heads=2,
        axes_dims_rope=(2, 2, 2, 4), mlp_ratio=2.5, rope_theta=100, eps=1e-3,
    ),
}  # fmt: skip
TEXT = 7


def build(overrides=None):
    """A diffusers model with random weights, none of them idle, and its config."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(**(TINY | (overrides or {}))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.1 if p.ndim == 1 else p.shape[-1] ** -0.5))
            if p.ndim == 1:
                p.add_(1.0)
    return model, Flux2Config.from_dict(dict(model.config), "config.json")


def port(model, cfg, **options):
    tensors = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    leaves = names(cfg)
    assert {s.name: s.shape for leaf in leaves for s in leaf.sources} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    abstract = nnx.eval_shape(lambda: flux2.Flux2(cfg, rngs=nnx.Rngs(0), **options))
    return fill(abstract, leaves, tensors)


def inputs(cfg, sizes=()):
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    references = tuple(draw(2, h, w, cfg.channels) for h, w in sizes)
    sigma = np.array([0.9, 0.3], np.float32)
    return draw(2, 6, 4, cfg.channels), sigma, draw(2, TEXT, cfg.text_dim), references


def run_torch(model, x, sigma, text, references, dtype=torch.float32):
    """As `Flux2KleinPipeline` calls it: frames 10, 20, ... for the references."""
    ids = lambda t, h, w, l: torch.cartesian_prod(*(torch.as_tensor(a) for a in (t, h, w, l)))
    image_ids = [ids([0], range(6), range(4), [0])]
    for k, latent in enumerate(references):
        image_ids.append(ids([10 * (k + 1)], *map(range, latent.shape[1:3]), [0]))
    tokens = [a.reshape(len(a), -1, a.shape[-1]) for a in (x, *references)]
    with torch.no_grad():
        out = model(
            hidden_states=torch.tensor(np.concatenate(tokens, axis=1)).to(dtype),
            encoder_hidden_states=torch.tensor(text).to(dtype),
            timestep=torch.tensor(sigma).to(dtype),
            img_ids=torch.cat(image_ids)[None].expand(2, -1, -1),
            txt_ids=ids([0], [0], [0], range(TEXT))[None].expand(2, -1, -1),
            return_dict=False,
        )[0]
    return out[:, :24].float().numpy().reshape(x.shape)


def run_jax(module, x, sigma, text, references):
    sizes = [latent.shape[1:3] for latent in references]
    text, tokens = module.embed(jnp.asarray(text), references)
    return np.asarray(module(x, sigma, text, tokens, sizes))


@pytest.mark.parametrize("sizes", [(), ((3, 5),), ((6, 4), (2, 3))], ids=["0", "1", "2"])
@pytest.mark.parametrize("name", ODD)
def test_the_transformer_is_that_of_diffusers(name, sizes):
    model, cfg = build(ODD[name])
    given = inputs(cfg, sizes)
    assert relative_error(run_jax(port(model, cfg), *given), run_torch(model, *given)) <= 1e-5


def test_bfloat16_is_as_near_to_float32_as_in_diffusers():
    model, cfg = build()
    module, given = port(model, cfg), inputs(cfg, ((3, 5),))
    expected = run_jax(module, *given)
    ours = relative_error(run_jax(port(model, cfg, dtype="bfloat16"), *given), expected)
    theirs = relative_error(run_torch(model.to(torch.bfloat16), *given, torch.bfloat16), expected)
    assert ours <= 1.5 * theirs < 0.2


def test_remat_changes_no_gradient():
    model, cfg = build()
    given = inputs(cfg, ((3, 5),))

    def gradient(remat):
        graph, params = nnx.split(port(model, cfg, remat=remat))
        loss = lambda p: jnp.sum(jnp.square(run(nnx.merge(graph, p))))
        return jax.tree.leaves(jax.grad(loss)(params))

    def run(module):
        text, tokens = module.embed(given[2], given[3])
        return module(*given[:2], text, tokens, [(3, 5)])

    for found in zip(*map(gradient, ("none", "full", "dots", "unrolled")), strict=True):
        one, *others = found
        for other in others:
            np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(one).max()) + 1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_embeds": True}, "guidance_embeds"),
        ({"axes_dims_rope": [2, 4, 4, 4]}, "axes_dims_rope .* add up to attention_head_dim, 16"),
        ({"num_layers": None}, "num_layers"),
        ({"eps": float("nan")}, "eps"),
        ({"patch_size": 2}, "patch_size"),
    ],
)
def test_a_configuration_that_is_not_this_network_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Flux2Config.from_dict(TINY | {"mlp_ratio": 3.0, "rope_theta": 2000, "eps": 1e-6,
                                      "patch_size": 1} | changes, "config.json")  # fmt: skip


@pytest.mark.parametrize(("size", "tensors", "parameters"), [
    (dict(), 169, 3_875_544_576),
    (dict(heads=32, double_layers=8, single_layers=24, text_dim=12288), 233, 9_078_581_248),
], ids=["4B", "9B"])  # fmt: skip
def test_the_published_sizes(size, tensors, parameters):
    sources = [source for leaf in names(Flux2Config(**size)) for source in leaf.sources]
    assert len(sources) == tensors
    assert sum(int(np.prod(source.shape)) for source in sources) == parameters


def test_the_configuration_is_written_as_it_was_read():
    cfg = Flux2Config(heads=2, head_dim=8, axes_dims=(2, 2, 2, 2), mlp_ratio=2.5)
    assert Flux2Config.from_dict(json.loads(json.dumps(cfg.to_dict())), "config.json") == cfg
