"""Text from Qwen3-VL, token by token, against transformers' generate and our own full forward."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import relative_error
from fill import fill
from flax import nnx
from test_qwen3 import fast_jit, numpy_state, randomize
from test_qwen3_vl import DATA, END, IMAGE, START, VISION, run, torch_config, torch_inputs

from dopsd_jax.models import decoding
from dopsd_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig, embed, names

GRID, LAYERS, MOST, ROOM = (4, 6), 4, 6, 32
SHIFT = 3 - 6  # positions after the picture: 2 x 3 tokens take three of them
STOPS = (7, 11)


@functools.cache
def pair(tied: bool):
    """transformers' model with its head, our config and model, and our head."""
    config = torch_config(VISION, LAYERS)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = randomize(transformers.Qwen3VLForConditionalGeneration(config), seed=3)
    model.tie_weights()
    cfg = Qwen3VLConfig.from_dict(config.to_dict(), "config.json")
    tensors = numpy_state(model)
    ours = fill(nnx.eval_shape(lambda: Qwen3VL(cfg, rngs=nnx.Rngs(0))), names(cfg), tensors)
    head = ours.language.embedding[...] if tied else jnp.asarray(tensors["lm_head.weight"])
    return model, cfg, ours, head


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Three texts of one length with a picture each."""
    random = np.random.default_rng(1)
    own = random.integers(12, 50, (3, 7))
    image = np.tile([START, *[IMAGE] * 6, END], (3, 1))
    patches = random.normal(size=(3, 24, 96)).astype(np.float32)
    return np.concatenate([own[:, :2], image, own[:, 2:]], axis=1), patches


@functools.partial(fast_jit, static_argnames=("cfg",))
def read(model, cfg, ids, patches):
    lengths = jnp.full(ids.shape[:1], ids.shape[1])
    inputs = embed(model.vision, model.language, cfg, ids, lengths, patches, GRID)
    return decoding.prefill(model.language, *inputs, ROOM)


step = fast_jit(decoding.decode)


def answer(tied: bool, ids, patches, *, sampling=None, numbers=(0, 1, 2), stops=STOPS):
    _, cfg, ours, head = pair(tied)
    hidden, cache = read(ours, cfg, ids, patches)
    count = ids.shape[1]
    keys = jnp.stack([jax.random.key(number) for number in numbers[: len(ids)]])
    found = decoding.generate(
        ours.language, head, hidden, cache, jnp.int32(count), jnp.int32(count + SHIFT), keys,
        jnp.int32(stops), sampling, most=MOST,
    )  # fmt: skip
    return np.asarray(found)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_and_logits_equal_transformers_generate(tied):
    model, cfg, ours, head = pair(tied)
    ids, patches = prompts()
    with torch.no_grad():
        expected = model.generate(
            **torch_inputs(ids, np.full(3, ids.shape[1]), patches, GRID),
            do_sample=False, max_new_tokens=MOST, eos_token_id=list(STOPS), pad_token_id=STOPS[0],
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    theirs = expected.sequences[:, ids.shape[1] :].numpy()
    tokens = answer(tied, ids, patches)
    np.testing.assert_array_equal(tokens[:, : theirs.shape[1]], theirs)
    assert len(np.unique(theirs)) > 4  # no model that says one thing always

    # The logits of each step, with their tokens put in.
    hidden, cache = read(ours, cfg, ids, patches)
    for n, logits in enumerate(expected.logits):
        found = decoding.logits_of(hidden, head)
        assert relative_error(found, logits.numpy()) <= 1e-4, n
        index = jnp.int32(ids.shape[1] + n)
        hidden, cache = step(ours.language, theirs[:, n], index, index + SHIFT, cache)


def test_the_cache_equals_the_full_forward():
    _, cfg, ours, _ = pair(False)
    ids, patches = prompts()
    more = np.random.default_rng(2).integers(12, 50, (3, 4))
    whole = np.concatenate([ids, more], axis=1)
    lengths = np.full(3, whole.shape[1])
    (full,) = run(ours.vision, ours.language, cfg, whole, lengths, patches, GRID, (-1,))
    hidden, cache = read(ours, cfg, ids, patches)
    for n in range(more.shape[1] + 1):
        index = ids.shape[1] + n
        assert relative_error(hidden, full[:, index - 1]) <= 1e-5, n
        if n < more.shape[1]:
            index = jnp.int32(index)
            hidden, cache = step(ours.language, more[:, n], index, index + SHIFT, cache)


def test_a_text_ends_at_any_stop_token_and_waits_for_the_others():
    ids, patches = prompts()
    free = answer(False, ids, patches, stops=(0, 1))
    # The second token of the first text is made a stop token.
    stop = int(free[0, 1])
    ended = answer(False, ids, patches, stops=(1, stop))
    assert ended[0, 1] == stop and (ended[0, 2:] == 1).all()
    for own, before in zip(ended[1:], free[1:], strict=True):
        count = list(before).index(stop) if stop in before else MOST
        np.testing.assert_array_equal(own[:count], before[:count])


def test_drawn_tokens_depend_on_the_text_and_its_key_alone():
    ids, patches = prompts()
    sampling = decoding.Sampling(jnp.float32(1.5), jnp.float32(0.9))
    whole = answer(False, ids, patches, sampling=sampling, numbers=(4, 5, 6), stops=(0, 1))
    turned = answer(
        False, ids[::-1], patches[::-1], sampling=sampling, numbers=(6, 5, 4), stops=(0, 1)
    )
    np.testing.assert_array_equal(turned[::-1], whole)
    other = answer(False, ids, patches, sampling=sampling, numbers=(7, 8, 9), stops=(0, 1))
    assert (other != whole).any(axis=1).all()


def test_top_p_and_temperature_keep_what_transformers_keeps():
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32) * 2
    warped = TemperatureLogitsWarper(0.7)(None, torch.tensor(logits))
    kept = torch.isfinite(TopPLogitsWarper(0.8)(None, warped))[0].numpy()
    probability = torch.softmax(warped, -1)[0].numpy() * kept
    sampling = decoding.Sampling(jnp.float32(0.7), jnp.float32(0.8))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(decoding.choose(jnp.tile(logits, (4000, 1)), keys, sampling))
    share = np.bincount(drawn, minlength=12) / len(drawn)
    assert 1 < kept.sum() < 12
    assert np.abs(share - probability / probability.sum()).max() < 0.03
    assert not share[~kept].any()
    only = decoding.Sampling(jnp.float32(0.7), jnp.float32(0.0))
    assert (decoding.choose(jnp.tile(logits, (9, 1)), keys[:9], only) == logits.argmax()).all()


def test_the_published_sizes_decode_in_the_type_of_the_activations():
    published = json.loads((DATA / "qwen3_vl_4b.json").read_text())["config"]
    cfg = Qwen3VLConfig.from_dict(published, "config.json")
    model = nnx.eval_shape(lambda: Qwen3VL(cfg, rngs=nnx.Rngs(0)))
    ids = jnp.zeros((2, 700), jnp.int32)
    patches = jnp.zeros((2, 48 * 48, cfg.vision.patch_dim))

    def whole(model):
        both, type16 = (model.vision, model.language), jnp.bfloat16
        inputs = embed(*both, cfg, ids, ids[:, 0], patches, (48, 48), dtype=type16)
        hidden, cache = decoding.prefill(model.language, *inputs, 1024)
        keys, sampling = jax.random.split(jax.random.key(0)), decoding.Sampling(*jnp.ones(2))
        head, where = model.language.embedding[...], jnp.int32(700)
        stops = jnp.int32(STOPS)
        found = decoding.generate(
            model.language, head, hidden, cache, where, where, keys, stops, sampling, most=64
        )
        return found, cache

    tokens, cache = jax.eval_shape(whole, model)
    assert tokens.shape == (2, 64)
    assert {leaf.dtype for leaf in cache} == {jnp.dtype("bfloat16")}
    assert 2 * sum(leaf.size for leaf in cache) == 2 * 1024 * 147456  # as docs/data.md says


def test_a_prompt_that_the_cache_has_no_room_for_is_refused():
    _, _, ours, _ = pair(True)
    x, angles = jnp.zeros((1, 5, 24)), jnp.zeros((1, 5, 8))
    with pytest.raises(ValueError, match="5 tokens"):
        decoding.prefill(ours.language, x, angles, angles, [], 4)
