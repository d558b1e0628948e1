"""The miniature's training: what is trained is what is exported, and a stopped run goes on."""

import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_error
from flax import nnx
from jax.sharding import SingleDeviceSharding
from miniature_helpers import moving, texts_of
from torch_reference import sample_with_diffusers

import dopsd_jax
from dopsd_jax.common import errors
from dopsd_jax.miniature import (
    captions,
    endpoint,
    matching,
    optimizer,
    pool,
    pretrain,
    probe,
    render,
    train,
    training,
    world,
)
from dopsd_jax.miniature.families import Batch, Told
from dopsd_jax.miniature.zimage import configs
from dopsd_jax.miniature.zimage.family import IMAGE_TOKENS, TEACHER_ROWS, Miniature
from dopsd_jax.models.autoencoder import to_uint8

SMALL = Miniature(
    configs.Size(
        dim=24, layers=1, heads=1, text_dim=24, text_layers=2, vision_dim=32, vision_layers=1
    )
)
BIAS = "transformer.final_linear.bias"
PROMPT = "a large dax on the left on a navy background"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return texts_of(SMALL, tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def start():
    """Parameters whose velocity is not zero; those of the encoders as they will be stored."""
    parameters = moving(SMALL)
    stored = lambda value: value.astype(jnp.bfloat16).astype(jnp.float32)
    return {k: v if k.startswith("transformer") else stored(v) for k, v in parameters.items()}


@pytest.fixture(scope="module")
def vae():
    return SMALL.normalized(SMALL.autoencoder(), seed=0)


@pytest.fixture(scope="module")
def folder(start, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("miniature") / "model"
    SMALL.write(out, start, vae)
    return out


def test_the_exported_model_predicts_what_was_trained(folder, start, texts, vae):
    pipe = dopsd_jax.load_pipeline(folder)
    images = pool.plain_pictures(0, 0, 2)
    x = jax.random.normal(jax.random.key(2), (2, 16, 16, configs.LATENT_CHANNELS))
    net = optimizer.merge(SMALL.abstract(), start)

    @nnx.jit
    def velocity(net, told):
        return net.velocity(x, jnp.full(2, 0.7), net.context(told))

    contexts = {
        False: pipe.encode_prompt([PROMPT] * 2),
        True: pipe.encode_prompt_with_image(
            [PROMPT] * 2, list(images), min_pixels=64 * 64, max_pixels=64 * 64
        ),
    }
    seen = {}
    for image, context in contexts.items():
        told = SMALL.told(texts, [PROMPT] * 2, images if image else None, None)
        seen[image] = np.asarray(velocity(net, told))
        assert relative_error(pipe.velocity(x, 0.7, context), seen[image]) < 1e-4
    assert relative_error(seen[True], seen[False]) > 1e-3
    again = nnx.jit(lambda vae, x: to_uint8(vae.decode_images(vae.encode_images(x))))
    trained = np.asarray(again(vae, images), np.int32)
    found = np.asarray(pipe.decode(pipe.encode_image(images)), np.int32)
    # The autoencoder is stored in bfloat16.
    assert np.abs(found - trained).mean() < 3


def test_diffusers_draws_the_same_pictures(folder):
    latents = np.random.default_rng(0).standard_normal((1, 16, 16, configs.LATENT_CHANNELS))
    latents = latents.astype(np.float32)
    pipe = dopsd_jax.load_pipeline(folder)
    ours = pipe([PROMPT], height=64, width=64, latents=latents)
    theirs = sample_with_diffusers(folder, [PROMPT], latents)
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 2


def test_a_written_model_is_read_back(folder, start, vae):
    learned, again = SMALL.read(folder)
    assert learned.keys() == start.keys()
    for name, value in learned.items():  # those of the encoders fit the type they are stored in
        np.testing.assert_array_equal(value, start[name], err_msg=name)
    assert again.cfg == vae.cfg


def test_a_model_of_other_sizes_is_no_start(folder, monkeypatch):
    learned, vae = SMALL.read(folder)
    start = pretrain.start(SMALL, 0)
    monkeypatch.setattr(train, "START", SimpleNamespace(value=str(folder)))
    train._check_sizes(SMALL, start, learned, vae)
    with pytest.raises(errors.UserError, match=r"--start .*other sizes"):
        train._check_sizes(SMALL, pretrain.start(Miniature(), 0), learned, vae)


def test_a_model_of_fewer_steps_is_written_anew(tmp_path):
    model, state = tmp_path / "model", tmp_path / "matching.safetensors"
    state.touch()
    assert train._is_older(model, state)
    model.mkdir()
    os.utime(state, (1000, 1000))
    assert not train._is_older(model, state)  # a call that only measures leaves it
    os.utime(model, (900, 900))
    assert train._is_older(model, state)


def test_a_stopped_run_goes_on_bit_for_bit(texts, tmp_path, monkeypatch):
    start = pretrain.start(SMALL, 0)
    monkeypatch.setattr(pool, "POOL", 64)
    latents = lambda images: np.repeat(
        images[:, ::4, ::4, :1].astype(np.float16) / 128 - 1, configs.LATENT_CHANNELS, axis=-1
    )
    source, compiled = training.Source(SMALL, 3, texts, latents), []
    stage = pretrain.stage(SMALL, start, 3)._replace(
        tx=optax.adam(1e-3), texts=8, images=8, shown=lambda parameters: parameters
    )

    def run(name, steps, lines):
        own = stage._replace(steps=steps)
        return training.run(tmp_path / name, own, source, lambda *_: None, lines.append)

    monkeypatch.setattr(training, "step_function", _once(training.step_function, compiled))
    whole = run("whole", 3, [])
    run("parts", 2, lines := [])
    resumed = run("parts", 3, lines)
    assert len(lines) == 2
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
    # Distillation closes over them, on a mesh of its own.
    assert {type(value.sharding) for value in whole.values()} == {SingleDeviceSharding}
    changed = [n for n in whole if np.any(np.asarray(whole[n]) != np.asarray(start[n]))]
    assert {n.split(".")[0] for n in changed} == {"transformer", "text", "vision", "shown", "where"}


def _once(make, made):
    """The same compiled step for every run: what compiles differs by nothing."""

    def cached(*arguments):
        if not made:
            made.append(make(*arguments))
        return made[0]

    return cached


def test_a_damaged_state_is_named(tmp_path, start, texts):
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"not a state")
    with pytest.raises(errors.UserError, match=r"state\.safetensors.*delete it"):
        training.load_tree(path, {"a": np.zeros(2)})


def test_training_never_sees_the_words_kept_for_users(texts, monkeypatch):
    monkeypatch.setattr(pool, "POOL", 256)
    scenes = pool.make_pool(0, 0, lambda images: np.zeros((len(images), 16, 16, 1)))
    words = {thing.word for scene in scenes.scenes for thing in scene.things}
    assert not words & set(captions.NEW_WORDS)
    known = {word for word, _ in pool.bank(0)}
    fresh = [scene.things[0] for scene in scenes.scenes[len(scenes.scenes) // 2 : scenes.bank]]
    assert fresh and not {thing.word for thing in fresh} & known
    rng = np.random.default_rng(0)
    lengths = SMALL.batches(scenes, texts, rng, 8, 64)[1].told.lengths
    assert (lengths <= TEACHER_ROWS).all() and (lengths > IMAGE_TOKENS).all()


def test_muon_takes_kernels_as_matrices():
    shapes = {
        "encoder.levels.0.conv1.kernel": (3, 3, 8, 16),
        "decoder.conv_out.kernel": (3, 3, 8, 3),
        "transformer.layers.out.kernel": (6, 24, 24),
        "text.embedding": (704, 24),
        "layers.bias": (6, 24),
    }
    found = optimizer.matrices({name: jnp.zeros(shape) for name, shape in shapes.items()})
    assert found["encoder.levels.0.conv1.kernel"] == ((0, 1, 2), 3)
    assert found["transformer.layers.out.kernel"] == (1, 2)
    rest = [found[name] for name in shapes if name not in list(shapes)[0:3:2]]
    assert rest == [None] * 3


def _constant(start, seed):
    """Weights whose velocity is everywhere the same, so that guidance changes nothing."""
    bias = jax.random.normal(jax.random.key(seed), (32,))
    still = {"transformer.final_linear.kernel": jnp.zeros((SMALL.size.dim, 32)), BIAS: bias}
    return {**start, **still}


def _few(texts, images):
    """Four samples and keys, with images in context or without."""
    rng = np.random.default_rng(0)
    latents, noise = rng.standard_normal((2, 4, 16, 16, configs.LATENT_CHANNELS), np.float32)
    told = Told(*texts([PROMPT] * 4, images))
    if images:
        seen = pool.plain_pictures(0, 0, 4), np.float32([0, 0, 0.5, 0.75])
        told = Told(*told[:2], *seen, (latents,))
    batch = Batch(latents, noise, told, Told(*texts([""] * 4, False)))
    return batch, jax.random.split(jax.random.key(0), 4)


@pytest.mark.parametrize("images", [False, True])
def test_endpoint_regression_asks_for_where_the_many_step_model_ends(start, texts, images):
    many, student = _constant(start, 1), _constant(start, 2)
    loss = jax.jit(endpoint.loss(SMALL, many))
    assert float(loss(many, *_few(texts, images))) < 1e-9
    apart = float(jnp.mean((many[BIAS] - student[BIAS]) ** 2))
    expected = np.mean(np.square(SMALL.grid[:-1])) * apart
    assert float(loss(student, *_few(texts, images))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("images", [False, True])
def test_matching_moves_the_generator_from_fake_to_real_alone(start, texts, images):
    many, own, fake = (_constant(start, seed) for seed in (1, 2, 3))
    loss = matching.loss(SMALL, many)

    @jax.jit
    def gradients(own, fake):
        both = matching.stage(SMALL, own, fake, 1).start
        found = jax.grad(loss)(both, *_few(texts, images))
        return found[matching.GENERATOR + BIAS], found[matching.FAKE + BIAS]

    away, learned = gradients(own, fake)
    wanted = fake[BIAS] - many[BIAS]
    cosine = jnp.vdot(away, wanted) / jnp.linalg.norm(away) / jnp.linalg.norm(wanted)
    assert float(cosine) > 0.99
    # Where fake and real agree there is nothing to learn, however wrong both are about the fake's
    # own loss, which goes on.
    nothing, learned = gradients(own, many)
    assert float(jnp.linalg.norm(nothing)) < 1e-6 * float(jnp.linalg.norm(away))
    assert float(jnp.linalg.norm(learned)) > 0.01


def test_matching_begins_with_the_fake_alone():
    both = {matching.GENERATOR + "a": jnp.ones(3), matching.FAKE + "a": jnp.ones(3)}
    tx = matching.transform(100)
    updates, _ = tx.update(both, tx.init(both), both)
    assert not jnp.any(updates[matching.GENERATOR + "a"]) and jnp.all(
        updates[matching.FAKE + "a"] < 0
    )


def test_noise_tells_the_place_where_the_caption_does_not(texts):
    """Dealt out anew, not drawn anew; where a caption places the thing, it stays as it was."""
    rng = np.random.default_rng(0)
    scenes = [world.random_scene(rng, (world.random_thing(rng),)) for _ in range(64)]
    spoken = [captions.caption(s, rng, whole=i % 2 == 0) for i, s in enumerate(scenes)]
    said = np.array([captions.says_place(text) for text in spoken])
    assert said[::2].all() and (~said).sum() > 8
    things = np.repeat(world.pictures(scenes)[:, ::4, ::4, :1] / 255.0, configs.LATENT_CHANNELS, -1)
    found = pool.paired_noise(np.random.default_rng(1), things, spoken)
    plain = np.random.default_rng(1).standard_normal(things.shape, np.float32)
    np.testing.assert_array_equal(found[said], plain[said])
    order = lambda noise: np.sort(noise.reshape(len(noise), -1), axis=0)
    np.testing.assert_array_equal(order(found[~said]), order(plain[~said]))

    def told(noise):
        """How much more the noise has where the thing stands than elsewhere, in deviations."""
        x, y = (16 * world.compose(scenes, None).objects.centre[:, 0] / render.SIDE).T
        rows, columns = np.mgrid[:16, :16] + 0.5
        near = np.hypot(rows - y[:, None, None], columns - x[:, None, None]) < 4
        score = (noise.mean(-1) * near).sum((1, 2)) / np.sqrt(near.sum((1, 2)) / 8)
        return score[~said].mean()

    assert told(found) > told(plain) + 0.5


def test_what_training_measures_is_what_the_pipeline_draws(folder, start, texts):
    pipe = dopsd_jax.load_pipeline(folder)
    images = pool.plain_pictures(0, 0, 2)
    noise = np.random.default_rng(0).standard_normal((2, *SMALL.latent)).astype(np.float32)
    artist = probe.Sampler(SMALL, texts, None, None).artist(start, SMALL.grid)
    context = pipe.encode_prompt_with_image([PROMPT] * 2, list(images), **SMALL.teacher)
    drawn = pipe.sample(pipe.split[1], noise, context, pipe.deployed_grid(SMALL.latent))
    assert relative_error(artist.latents([PROMPT] * 2, images, noise), drawn) < 1e-4
    first = noise - pipe.velocity(noise, 1.0, pipe.encode_prompt([PROMPT] * 2))
    assert relative_error(artist.first([PROMPT] * 2, noise), first) < 1e-4
