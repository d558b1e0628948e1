"""Pictures of a checkpoint are those of its LoRA file: a fault of the file is seen in them."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import RANDOM_CONFIG
from etils import epath
from flax import nnx

from dopsd_jax import dopsd, train
from dopsd_jax.adapters import attach
from dopsd_jax.common.files import local_file
from dopsd_jax.config.loading import load
from dopsd_jax.dopsd import Contexts
from dopsd_jax.families import pipeline, sampling
from dopsd_jax.reporting import previews
from dopsd_jax.training import trainable


def configured(**changed):
    given = dict(option.removeprefix("--config.").split("=", 1) for option in RANDOM_CONFIG[1:])
    return load(RANDOM_CONFIG[0].removeprefix("--config="), given | changed)


@pytest.mark.slow
def test_a_fault_of_the_writer_is_seen(tmp_path, monkeypatch):
    """Two steps, the second one saved, by a writer that makes everything far too strong."""
    config = configured(steps="2", sample_every="1", method="sft", learning_rate="1e-7")
    shown, traced = {}, []
    save, write, rollout = previews.pictures.save_grid, trainable.write_lora, dopsd.rollout

    def save_grid(path, columns, rows, **rest):
        if path.stem.startswith("step_"):
            shown[path.stem] = dict(zip(columns, rows[0].images, strict=True))
        save(path, columns, rows, **rest)

    def faulty(path, modules, *rest, **more):
        loud = {n: dataclasses.replace(m, scale=m.scale * 1e7) for n, m in modules.items()}
        write(path, loud, *rest, **more)

    monkeypatch.setattr(previews.pictures, "save_grid", save_grid)
    monkeypatch.setattr(trainable, "write_lora", faulty)
    monkeypatch.setattr(dopsd, "rollout", lambda *given: traced.append(1) or rollout(*given))
    assert train.train(config, epath.Path(tmp_path)) is None
    away = {
        step: np.abs(found["tuned"].astype(int) - found["base"]).max()
        for step, found in shown.items()
    }
    assert away["step_000000"] == 0
    assert away["step_000001"] <= 1  # from memory: one tiny step
    assert away["step_000002"] > 50  # from the file
    assert len(traced) == 1  # the file's weights need no other program


@pytest.fixture
def adapters(random_model):
    """A pipeline with adapters attached, what is trained there, and it after some training."""
    config = configured()
    pipe = pipeline.pipeline(random_model)
    what = trainable.trained(config, pipe.family, pipe.config)
    what.attach(pipe.transformer)
    leaves, tree = jax.tree.flatten(pipe.split[1])
    keys = jax.random.split(jax.random.key(5), len(leaves))
    more = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return pipe, what, jax.tree.unflatten(tree, more)


def test_what_was_written_draws_what_is_live(adapters, random_model, tmp_path):
    pipe, what, live = adapters
    what.export(random_model, tmp_path, 3, live, {})
    other = jax.tree.map(lambda x: x + 1.0, live)  # nothing of it must remain
    written = what.written(tmp_path, 3, other)
    picture = lambda state: attach.export(state, what.chosen, what.scale)
    before, after = picture(live), picture(written)
    for name in before:
        np.testing.assert_allclose(before[name].delta(), after[name].delta(), rtol=1e-6, atol=1e-7)
    # At the strength that the adapters have in the network: alpha / rank is 2 here.
    graphdef, _, base = pipe.split
    network = nnx.merge(graphdef, live, base)
    for name, slot in what.chosen.items():
        layer = functools.reduce(getattr, slot.dense.split("."), network)
        change = layer.adapters[str(slot.part)].delta()
        change = change if slot.index is None else change[slot.index]
        np.testing.assert_allclose(before[name].delta(), change.T, rtol=1e-5, atol=1e-6)
    # A run that begins with the file begins there.
    config = configured(**{"lora.init_from": str(tmp_path / "lora" / "step_3.safetensors")})
    begun = picture(trainable.trained(config, pipe.family, pipe.config).start(pipe.split[1]))
    for name in before:
        np.testing.assert_allclose(before[name].delta(), begun[name].delta(), rtol=1e-6, atol=1e-7)
    noise = sampling.start_noise(0, 1, pipe.latent_shape(32, 32))
    context = pipe.encode_prompt(["a red circle"])
    drawn = [
        pipe.decode(pipe.sample(state, noise, context, (1.0, 0.5, 0.0)))
        for state in (live, written, pipe.split[1])
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1
    assert np.abs(drawn[0].astype(int) - drawn[2]).max() > 20


def test_every_model_draws_its_own_column(monkeypatch):
    """The teacher in its context, the tuned model in the student's; a prompt has no teacher."""
    paint = lambda number: np.full((1, 1, 3), number, np.uint8)
    drawn = lambda pipe, weights, wishes: [paint(weights + w.context) for w in wishes]
    monkeypatch.setattr(previews, "draw", drawn)
    row = previews.Sample("a", Contexts(1, 2), None, paint(99), ())
    prompt = previews.Sample("b", Contexts(3, None), None, None, ())
    own = SimpleNamespace(
        pipe=None, columns=("target", "base", "teacher", "tuned"), _places=0, samples=[row],
        prompts=[prompt], base=[paint(7), paint(8)],
    )  # fmt: skip
    own._by_student = functools.partial(previews.Previews._by_student, own)
    found = previews.Previews.rows(own, student=10, teacher=20)
    numbers = [[x if x is None else int(x.max()) for x in each.images] for each in found]
    assert numbers == [[99, 7, 20 + 2, 10 + 1], [None, 8, None, 10 + 3]]


def test_a_whole_network_stays_the_live_one(tmp_path):
    live = nnx.State({})
    whole = trainable.FullNetwork(configured(train="full"), None, None)
    assert whole.written(tmp_path, 3, live) is live


def test_a_file_of_a_store_is_read_as_one_here(bucket, tmp_path):
    path = epath.Path(f"{bucket}/run/lora/step_3.safetensors")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"content")
    with local_file(path) as local:
        assert local.read_bytes() == b"content" and local.name == path.name
    assert not local.exists()
