"""Pictures in batches: those that one alone would be, by one program for each shape."""

import functools

import jax
import mesh_draw
import numpy as np
import pytest
from mesh_draw import PROMPTS
from weights_helpers import run_python

import dopsd_jax
from dopsd_jax import dopsd, families
from dopsd_jax.families import drawing
from dopsd_jax.families.drawing import Wish, draw, filled, together
from dopsd_jax.families.pipeline import pipeline
from dopsd_jax.families.sampling import start_noise


def test_small_pictures_are_drawn_together_and_large_ones_alone():
    assert [together(20, side**2) for side in (1024, 768, 512, 64)] == [1, 1, 4, 7]
    assert [together(count, 64**2) for count in (1, 5, 8, 9)] == [1, 5, 8, 5]


def test_batches_are_of_one_size():
    assert list(filled("abcde", 2)) == [(["a", "b"], 2), (["c", "d"], 2), (["e", "e"], 1)]
    assert list(filled("", 2)) == []


def test_pictures_are_those_drawn_alone_in_the_order_of_the_wishes(random_model, monkeypatch):
    """Of two sizes, of which the larger makes a batch of two and one that is not full."""
    pipe = dopsd_jax.load_pipeline(random_model)
    monkeypatch.setattr(pipe.family, "DEPLOYED_STEPS", 2)
    monkeypatch.setattr(drawing, "PIXELS", 2 * 32 * 48)
    traced = []
    rollout = dopsd.rollout
    monkeypatch.setattr(dopsd, "rollout", lambda *given: traced.append(1) or rollout(*given))
    jax.clear_caches()  # other tests of this process may have drawn such pictures
    context = pipe.encode_prompt(PROMPTS)
    sizes = (32, 48), (32, 32), (32, 48), (32, 48)
    wishes = []
    for number, size in enumerate(sizes):
        one = number % len(PROMPTS)
        own = context._replace(
            features=context.features[one : one + 1], lengths=context.lengths[one : one + 1]
        )
        wishes.append(Wish(start_noise(1, 1, pipe.latent_shape(*size), number), own))
    found = draw(pipe, pipe.split[1], wishes)
    assert len(traced) == 2
    assert [picture.shape for picture in found] == [(*size, 3) for size in sizes]
    for picture, (noise, own), size in zip(found, wishes, sizes, strict=True):
        height, width = size
        alone = pipe([""], height=height, width=width, latents=noise, context=own)[0]
        assert np.abs(picture.astype(int) - alone).max() <= 1
    assert np.abs(found[0].astype(int) - found[2]).max() > 20, "all pictures are alike"


@pytest.mark.slow
def test_devices_of_a_mesh_share_the_pictures(random_model, tmp_path):
    """Each does its part of the work, whichever axis it is on, and the pictures are the same."""
    run_python(mesh_draw.__file__, random_model, tmp_path / "out.npz")
    results = np.load(tmp_path / "out.npz")
    found = lambda name, what: results[f"{name}/{what}"]
    alone = found("one", "pictures").astype(int)
    assert np.abs(alone[0] - alone[1]).max() > 20, "all pictures are alike"
    # Of three pictures each of two devices draws two; the tokens' device does half of each.
    for name, share in (("data", 2 / 3), ("data, fsdp", 1 / 3), ("context", 1 / 2)):
        assert np.abs(found(name, "pictures") - alone).max() <= 1, name
        assert found(name, "flops") <= 1.1 * share * found("one", "flops"), name
        assert found(name, "compiled") == 0, name


@pytest.mark.parametrize("family", ["zimage", "flux2_klein"])
def test_pictures_are_drawn_by_one_program_however_layers_are_trained(family, tmp_path):
    folder = families.load(family).write_random_model(tmp_path)
    found = []
    for remat in ("none", "unrolled"):
        pipe = pipeline(folder, remat=remat)
        noise, context = start_noise(0, 1, pipe.latent_shape(32, 32)), pipe.encode_prompt(["a dog"])
        sample = functools.partial(pipe.sample, noise=noise, context=context, grid=(1.0, 0.5, 0.0))
        found.append(str(jax.make_jaxpr(sample)(pipe.split[1])))
    assert found[0] == found[1]
