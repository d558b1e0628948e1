"""Products of float32 numbers ask for all their bits, in every network and its gradients.

What else a device makes of them cannot be seen on a processor; what is asked for can.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from dopsd_jax import families
from dopsd_jax.adapters import attach
from dopsd_jax.adapters.lokr import Lokr
from dopsd_jax.adapters.lora import Lora
from dopsd_jax.families import sampling
from dopsd_jax.families.pipeline import pipeline
from dopsd_jax.families.texts import hidden_states
from dopsd_jax.models import qwen3_vl


def asked(jaxpr):
    """(type, precision) of every product of a traced program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn.invars[0].aval.dtype, eqn.params["precision"]
        for inner in jaxprs_in_params(eqn.params):
            yield from asked(getattr(inner, "jaxpr", inner))


def exact(run, *arguments) -> int:
    """The number of products of a program; in float32 each asks for all bits."""
    with jax.default_matmul_precision("bfloat16"):  # what is left to the device
        found = list(asked(jax.make_jaxpr(run)(*arguments).jaxpr))
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert all(precision == highest for dtype, precision in found if dtype == jnp.float32)
    return len(found)


@pytest.fixture(scope="module", params=["zimage", "flux2_klein"])
def pipe(request, tmp_path_factory):
    family = families.load(request.param)
    return pipeline(family.write_random_model(tmp_path_factory.mktemp(request.param) / "model"))


@pytest.mark.parametrize("kind", [Lora, Lokr.of(4)])
def test_the_transformer_and_its_gradients(pipe, kind):
    net = nnx.clone(pipe.transformer)
    slots = attach.slots(pipe.family.NETWORKS["transformer"].names(pipe.config))
    chosen = attach.select(slots, next(iter(pipe.family.LORA_PRESETS)), pipe.family.LORA_PRESETS)
    attach.attach(net, chosen, 4, 4.0, jax.random.key(0), kind)
    graph, trained, base = nnx.split(net, nnx.LoRAParam, ...)
    context = pipe.encode_prompt(["a red cube"])
    x = jnp.ones((1, *pipe.latent_shape(32, 32)))

    def loss(trained, base):
        return sampling.velocity(pipe.family, graph, trained, base, x, 0.5, context).sum()

    assert exact(jax.grad(loss, argnums=(0, 1), allow_int=True), trained, base) > 100


def test_the_encoders_and_the_autoencoder(pipe):
    ids, one = jnp.ones((1, 32), jnp.int32), jnp.array([32])
    text = lambda ids: hidden_states(pipe.text_encoder, ids, one, (-2,), jnp.float32, None)
    picture = jnp.ones((1, 32, 32, 3))
    assert exact(text, ids) > 5
    assert exact(pipe.vae.encode, picture) > 5
    assert exact(pipe.vae.decode, pipe.vae.encode(picture)[0]) > 5
    if "vlm" in pipe.ENCODERS[1]:
        cfg, grid = pipe.vlm_config, (8, 8)
        patches = jnp.ones((1, 64, 3 * 2 * cfg.vision.patch_size**2))
        count = cfg.vision.image_tokens(grid)
        ids = jnp.where(jnp.arange(32) < count, cfg.image_token_id, 1)[None]

        def shown(ids, patches):
            both = pipe.vlm, pipe.text_encoder
            return qwen3_vl.encode(*both, cfg, ids, one, patches, grid, hidden=(-2,))

        assert exact(shown, ids, patches) > 10
