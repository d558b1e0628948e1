"""The miniature's training: what is trained is what is exported, and a stopped run goes on."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from conftest import relative_error
from flax import nnx
from jax.sharding import SingleDeviceSharding
from torch_reference import sample_with_diffusers

import dopsd_jax
from dopsd_jax.common import errors
from dopsd_jax.miniature import (
    autoencoder,
    captions,
    configs,
    distill,
    export,
    networks,
    optimizer,
    pool,
    pretrain,
    train,
    training,
)
from dopsd_jax.models.autoencoder import to_uint8
from dopsd_jax.random_model.tokenizer import QWEN3_TEMPLATE

SMALL = configs.Size(
    dim=24, layers=1, heads=1, text_dim=24, text_layers=2, vision_dim=32, vision_layers=1
)
PROMPT = "a large dax on the left on a navy background"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    export.write_words(folder, QWEN3_TEMPLATE, 131072)
    return pool.Texts(transformers.AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def start():
    """Parameters whose velocity is not zero; those of the encoders as they will be stored."""
    _, parameters = optimizer.flat(networks.start(SMALL, 0))
    key = jax.random.key(1)
    kernel = parameters["transformer.final_linear.kernel"]
    parameters["transformer.final_linear.kernel"] = 0.1 * jax.random.normal(key, kernel.shape)
    stored = lambda value: value.astype(jnp.bfloat16).astype(jnp.float32)
    return {k: v if k.startswith("transformer") else stored(v) for k, v in parameters.items()}


@pytest.fixture(scope="module")
def vae():
    return autoencoder.normalized(autoencoder.build(), seed=0)


@pytest.fixture(scope="module")
def folder(start, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("miniature") / "model"
    export.write_model(out, SMALL, start, vae)
    return out


def test_the_exported_model_predicts_what_was_trained(folder, start, texts, vae):
    pipe = dopsd_jax.load_pipeline(folder)
    images = pool.plain_pictures(0, 0, 2)
    x = jax.random.normal(jax.random.key(2), (2, 16, 16, configs.LATENT_CHANNELS))
    net = optimizer.merge(networks.abstract(SMALL), start)

    @nnx.jit
    def velocity(net, ids, lengths, patches):
        return net.velocity(x, jnp.full(2, 0.7), net.context(ids, lengths, patches), lengths)

    contexts = {
        False: pipe.encode_prompt([PROMPT] * 2),
        True: pipe.encode_prompt_with_image(
            [PROMPT] * 2, list(images), min_pixels=64 * 64, max_pixels=64 * 64
        ),
    }
    seen = {}
    for image, context in contexts.items():
        ids, lengths = texts([PROMPT] * 2, image)
        patches = networks.patches_of(images) if image else None
        seen[image] = np.asarray(velocity(net, ids, lengths, patches))
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
    learned, again = export.read_model(folder)
    assert learned.keys() == start.keys()
    for name, value in learned.items():  # those of the encoders fit the type they are stored in
        np.testing.assert_array_equal(value, start[name], err_msg=name)
    assert again.cfg == vae.cfg


def test_a_model_of_other_sizes_is_no_start(folder, monkeypatch):
    learned, vae = export.read_model(folder)
    start = pretrain.start(SMALL, 0)
    monkeypatch.setattr(train, "START", SimpleNamespace(value=str(folder)))
    train._check_sizes(SMALL, start, learned, vae)
    with pytest.raises(errors.UserError, match=r"--start .*other sizes"):
        train._check_sizes(SMALL, pretrain.start(configs.Size(), 0), learned, vae)


def test_a_stopped_run_goes_on_bit_for_bit(texts, tmp_path, monkeypatch):
    start = pretrain.start(SMALL, 0)
    monkeypatch.setattr(pool, "POOL", 64)
    monkeypatch.setattr(training, "TEXTS", 8)
    monkeypatch.setattr(training, "IMAGES", 8)
    latents = lambda images: np.repeat(
        images[:, ::4, ::4, :1].astype(np.float16) / 128 - 1, configs.LATENT_CHANNELS, axis=-1
    )
    source, loss = training.Source(3, texts, latents), pretrain.loss(SMALL)
    compiled = []

    def run(name, steps, lines):
        tx = optax.adam(1e-3)
        return training.run(
            tmp_path / name, "x", steps, loss, tx, start, source, lambda *_: None, lines.append
        )

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

    def cached(loss, tx, mesh):
        if not made:
            made.append(make(loss, tx, mesh))
        return made[0]

    return cached


def test_a_damaged_state_is_named(tmp_path, start, texts):
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"not a state")
    with pytest.raises(errors.UserError, match=r"state\.safetensors.*delete it"):
        training.load_tree(path, {"a": np.zeros(2)})


def test_training_never_sees_the_words_kept_for_users(texts, monkeypatch):
    monkeypatch.setattr(pool, "POOL", 256)
    scenes = pool.make_pool(0, 0, lambda images: np.zeros((len(images), 1, 1, 1)))
    words = {thing.word for scene in scenes.scenes for thing in scene.things}
    assert not words & set(captions.NEW_WORDS)
    known = {word for word, _ in pool.bank(0)}
    fresh = [scene.things[0] for scene in scenes.scenes[len(scenes.scenes) // 2 : scenes.bank]]
    assert fresh and not {thing.word for thing in fresh} & known
    rng = np.random.default_rng(0)
    batch = pool.image_batch(scenes, texts, rng, 64)
    assert (batch.lengths <= pool.TEACHER_ROWS).all() and (batch.lengths > pool.IMAGE_TOKENS).all()


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


def test_distillation_asks_for_the_mean_velocity_of_the_teacher(start, texts):
    """Where a velocity is everywhere the same, so is its mean, guided or not: a closed form."""
    bias = "transformer.final_linear.bias"
    still = start | {"transformer.final_linear.kernel": jnp.zeros((SMALL.dim, 32))}
    constant = lambda seed: still | {bias: jax.random.normal(jax.random.key(seed), (32,))}
    teacher, student = constant(1), constant(2)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((4, 16, 16, configs.LATENT_CHANNELS)).astype(np.float16)
    batch = pool.Batch(latents, *texts([PROMPT] * 4, False))
    loss = jax.jit(distill.loss(SMALL, teacher, texts([""], False)))
    keys = jax.random.split(jax.random.key(0), 4)
    assert float(loss(teacher, batch, keys)) < 1e-10
    expected = float(jnp.mean((teacher[bias] - student[bias]) ** 2))
    assert float(loss(student, batch, keys)) == pytest.approx(expected, rel=1e-5)
