"""The miniature FLUX.2-klein: what is trained is what is exported; edits change what they name."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import Flux2KleinPipeline
from flax import nnx
from miniature_helpers import moving, texts_of

import dopsd_jax
from dopsd_jax.families.base import STUDENT
from dopsd_jax.miniature import (
    data_judge,
    edit_trial,
    edits,
    gates,
    optimizer,
    pool,
    pretrain,
    world,
    world_scorers,
)
from dopsd_jax.miniature.flux2_klein import configs, pairs
from dopsd_jax.miniature.flux2_klein.family import Miniature
from dopsd_jax.miniature.zimage import configs as zimage_configs
from dopsd_jax.miniature.zimage.family import Miniature as ZImage

SMALL = Miniature(configs.Size(heads=1, double_layers=1, single_layers=1, text_dim=24))
PROMPT = "a large red heart on the left on a white background"
EDIT = "the same thing, smaller"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return texts_of(SMALL, tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def start():
    """Parameters as they will be stored, whose velocity is not zero."""
    return {k: v.astype(jnp.bfloat16).astype(jnp.float32) for k, v in moving(SMALL).items()}


@pytest.fixture(scope="module")
def vae():
    return SMALL.normalized(SMALL.autoencoder(), seed=0)


@pytest.fixture(scope="module")
def folder(start, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("miniature") / "model"
    SMALL.write(out, start, vae)
    return out


def test_every_word_is_one_token(texts):
    apart = [
        word
        for word in configs.words()
        for said in (word, f" {word}")
        if len(texts.tokenizer(said)["input_ids"]) > 1
    ]
    assert not apart
    assert len(texts.tokenizer) <= configs.VOCABULARY


def test_the_exported_model_predicts_what_was_trained(folder, start, texts):
    """From a text, with a reference, and with two of which the first is edited."""
    pipe = dopsd_jax.load_pipeline(folder)
    images = pool.plain_pictures(0, 0, 2)
    x = jax.random.normal(jax.random.key(2), (2, *SMALL.latent))
    net = optimizer.merge(SMALL.abstract(), start)
    run = nnx.jit(lambda net, told: net.velocity(x, jnp.full(2, 0.7), net.context(told)))
    encode, both = lambda shown: np.asarray(pipe.encode_image(shown)), (images, images[::-1])
    editing = [pipe.features(STUDENT, EDIT, pair) for pair in zip(*both, strict=True)]
    cases = [
        (SMALL.told(texts, [PROMPT] * 2, None, encode), pipe.encode_prompt([PROMPT] * 2)),
        (
            SMALL.told(texts, [PROMPT] * 2, images, encode),
            pipe.encode_prompt_with_image([PROMPT] * 2, list(images), **SMALL.teacher),
        ),
        (SMALL.asked_to_edit(texts, [EDIT] * 2, both, encode), pipe.family.collate(editing)),
    ]
    seen = []
    for told, context in cases:
        seen.append(np.asarray(run(net, told)))
        assert relative_error(pipe.velocity(x, 0.7, context), seen[-1]) < 1e-4
    assert all(relative_error(seen[0], other) > 1e-3 for other in seen[1:])


def test_diffusers_draws_the_same_picture(folder):
    """Given the rows that the model was made for."""
    noise = np.random.default_rng(0).standard_normal((1, *SMALL.latent), np.float32)
    ours = dopsd_jax.load_pipeline(folder)([PROMPT], height=64, width=64, latents=noise)
    theirs = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompt=PROMPT, height=64, width=64, num_inference_steps=4, output_type="np",
        latents=torch.tensor(noise).permute(0, 3, 1, 2), max_sequence_length=configs.ROWS,
    ).images[0]  # fmt: skip
    assert np.abs(ours[0] - np.round(255 * expected)).max() <= 2


def test_a_written_model_is_read_back(folder, start, vae):
    learned, again = SMALL.read(folder)
    assert learned.keys() == start.keys()
    for name, value in learned.items():
        used = slice(3) if name.startswith("text.layers") else slice(None)  # the last is not
        np.testing.assert_array_equal(value[used], start[name][used], err_msg=name)
    assert again.cfg == vae.cfg


def test_a_miniature_zimage_is_a_start(tmp_path, texts):
    """Its text encoder, word by word, and its autoencoder."""
    theirs = ZImage(
        zimage_configs.Size(
            dim=24, layers=1, heads=1, text_dim=24, text_layers=4, vision_dim=32, vision_layers=1
        )
    )
    whole = optimizer.flat(theirs.start(3))[1]
    whole = {k: v.astype(jnp.bfloat16).astype(jnp.float32) for k, v in whole.items()}
    theirs.write(tmp_path / "model", whole, theirs.normalized(theirs.autoencoder(), 0))
    learned, vae = SMALL.read(tmp_path / "model")
    initial = pretrain.start(SMALL, 0)
    assert {name: v.shape for name, v in learned.items()} == {
        name: v.shape for name, v in initial.items() if name.startswith("text.")
    }
    pipe = dopsd_jax.load_pipeline(tmp_path / "model")
    for token in ("heart", "<|im_start|>"):
        rows = [t.convert_tokens_to_ids(token) for t in (texts.tokenizer, pipe.tokenizer)]
        ours, old = learned["text.embedding"][rows[0]], whole["text.embedding"][rows[1]]
        np.testing.assert_array_equal(ours, old)
    images = pool.plain_pictures(0, 0, 2)
    assert vae.encode_images(images).shape[1:] == SMALL.latent
    z = vae.encode(jnp.float32(images) / 127.5 - 1)[0]
    np.testing.assert_allclose(z, pipe.vae.encode(jnp.float32(images) / 127.5 - 1)[0], atol=1e-5)


def test_normalized_latents_have_unit_size_in_every_channel(vae):
    latents = vae.encode_images(pool.plain_pictures(0, -1 % 2**31, 256))
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1, atol=1e-3)


@pytest.mark.parametrize("kind", edits.KINDS)
def test_an_edit_changes_what_it_names_alone(kind):
    rng = np.random.default_rng(0)
    for _ in range(20):
        edit = edits.random_edit(rng, (kind,))
        (old,), (new,) = edit.before.things, edit.after.things
        changed = {
            "ground": edit.before.ground != edit.after.ground,
            "place": old.place != new.place,
            "size": old.size != new.size,
        }
        assert {name for name, there in changed.items() if there} == {kind} - {"thing"}
        same = (old.shape, old.colour, old.texture) == (new.shape, new.colour, new.texture)
        assert same or kind == "thing"
        assert edit.before.finish == edit.after.finish
        assert edit.before.ground_texture == edit.after.ground_texture


def test_batches_are_of_every_kind(texts, monkeypatch):
    monkeypatch.setattr(pool, "POOL", 64)
    monkeypatch.setattr(pairs, "PAIRS", 32)
    latents = lambda images: np.repeat(np.float16(images[:, ::8, ::8, :1] / 128), 32, axis=-1)
    scenes = SMALL.scenes(0, 0, latents)
    found = SMALL.batches(scenes, texts, np.random.default_rng(0), 4, 16)
    assert len(found) == len(SMALL.kinds) and sum(SMALL.kinds.values()) == pytest.approx(1)
    assert [len(batch.latents) for batch in found] == [4, 8, 4, 4]
    assert [len(batch.told.references) for batch in found] == [0, 1, 1, 2]
    kept = found[2].told.kept
    assert kept.shape == (4, pairs.KEPT) and (np.diff(kept, axis=1) > 0).all()
    assert all(not batch.away.references for batch in found)
    # An edit's references are its own: before it, all but what it names is as after it.
    before, after = found[3].told.references[0], found[3].latents
    assert before.shape == after.shape


def test_flow_matching_reaches_every_parameter(texts, start, monkeypatch):
    """But the text encoder's last layer and final norm, which give no feature."""
    monkeypatch.setattr(pool, "POOL", 64)
    monkeypatch.setattr(pairs, "PAIRS", 32)
    latents = lambda images: (
        np.float16(images[:, ::8, ::8, :1] / 128 - 1) + np.zeros(32, np.float16)
    )
    batch = SMALL.batches(SMALL.scenes(0, 0, latents), texts, np.random.default_rng(0), 4, 8)[3]
    parameters = {**pretrain.start(SMALL, 0), **start}
    keys = jax.random.split(jax.random.key(0), len(batch.latents))
    found = jax.jit(jax.grad(pretrain.loss(SMALL)))(parameters, batch, keys)
    still = {name for name, value in found.items() if not np.any(np.asarray(value))}
    assert still == {"text.norm.scale"}


class Cheat:
    """An editor whose latents are pictures: those of `turns`, or what it is given to edit."""

    shape = (1, 1, 1)
    encode, decode = (staticmethod(f) for f in (np.float32, lambda x: x.astype(np.uint8)))

    def __init__(self, turns=None):
        self.turns = turns

    def edited(self, prompts, images, noise):
        return np.float32(images[0] if self.turns is None else world.pictures(self.turns.pop(0)))


def test_who_edits_as_told_passes_and_who_copies_does_not(monkeypatch):
    asked, draw = [], edits.random_edit
    monkeypatch.setattr(
        edits, "random_edit", lambda *a, **k: asked.append(draw(*a, **k)) or asked[-1]
    )
    copied = edit_trial.scores(Cheat(), np.random.default_rng(0))
    bounds = {gate.name: gate for gate in gates.EDITING}
    assert set(copied) == set(bounds)
    assert copied["left alone"] > 0.95 and copied["edited identity"] > 0.9
    for name in ("edited", "result"):
        assert not bounds[name].holds(copied[name]), name
    count = edit_trial.COUNT
    after = [edit.after for edit in asked]
    parts = [after[: 3 * count], after[3 * count : 4 * count], after[4 * count :]]
    right = edit_trial.scores(Cheat([*parts, parts[2]]), np.random.default_rng(0))
    assert all(right[name] > 0.95 for name in bounds)


def test_pairs_are_a_data_set_of_edits_that_has_a_judge(tmp_path):
    concept = world.random_concept(np.random.default_rng(0))
    folder = edits.write_pairs(tmp_path / "pairs", concept, "dax", 4)
    names = sorted(path.name for path in (folder / "before").iterdir())
    assert names == sorted(path.name for path in (folder / "after").glob("*.png"))
    told = [path.read_text() for path in (folder / "after").glob("*.txt")]
    assert told == ["a dax in its place\n"] * 4
    own = data_judge.of_folder(folder / "after")
    assert own.word == "dax" and own.edits and data_judge.of_folder(folder / "before") is None
    cases = own.cases(3, (), 0)
    counts = collections.Counter(case.kind for case in cases)
    assert counts == {"concept": 3, "ordinary": 6, "other": 3}
    for case in cases:
        (before,) = case.references
        assert before.shape == (64, 64, 3) and ("dax" in case.prompt) == (case.kind == "concept")
        # Everything but the thing stays as it was: far corners are of the ground.
        if case.kind == "concept":
            np.testing.assert_array_equal(before[-4:, :4], case.target[-4:, :4])
    truth = np.stack([case.target for case in cases[:3]])
    assert world_scorers.likeness(truth, [case.truth for case in cases[:3]]).min() > 0.9
    kinds = {case.kind for case in cases}
    assert all(kinds & set(make().kinds) for make in own.scorers().values())
