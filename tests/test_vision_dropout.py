"""teacher.vision_dropout: which tokens of the teacher's picture are left out, in each family."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_error
from flax import nnx
from test_dopsd import GRID, SHAPE, toy_denoiser, world

from dopsd_jax.common.errors import UserError
from dopsd_jax.config import schema
from dopsd_jax.config.loading import load
from dopsd_jax.families.flux2_klein import family as klein
from dopsd_jax.families.zimage import family as zimage
from dopsd_jax.methods import flow_matching, registry
from dopsd_jax.methods.flow_matching import Batch
from dopsd_jax.methods.losses import Schedule
from dopsd_jax.models import flux2
from dopsd_jax.models.flux2_config import Flux2Config
from dopsd_jax.training import state, train_step

FIRST, COUNT, LENGTHS = 2, (8, 5), (13, 11)
KEYS = jax.random.split(jax.random.key(0), 2)


def contexts():
    """Two samples of 16 rows, each row with its number; pictures of 8 and of 5 tokens."""
    features = jnp.broadcast_to(jnp.arange(16.0)[:, None], (2, 16, 3))
    picture = jnp.array([[FIRST, count] for count in COUNT], jnp.int32)
    return zimage.Context(features, jnp.array(LENGTHS, jnp.int32), picture)


@pytest.mark.parametrize(
    ("share", "left"), [(0.5, (4, 2)), (0.75, (2, 1)), (0.1, (7, 4)), (0.99, (1, 1))]
)
def test_rows_of_the_picture_are_left_out_and_no_others(share, left):
    found = jax.jit(zimage.drop_picture, static_argnums=2)(contexts(), KEYS, share)
    rows = np.asarray(found.features[..., 0]).astype(int)
    for i, count in enumerate(COUNT):
        own = rows[i, : found.lengths[i]].tolist()
        assert own == sorted(set(own)) and LENGTHS[i] - len(own) == count - left[i]
        others = [row for row in own if not FIRST <= row < FIRST + count]
        assert others == [row for row in range(LENGTHS[i]) if not FIRST <= row < FIRST + count]


def test_a_sample_draws_for_itself_and_anew_with_another_key():
    drop = jax.jit(zimage.drop_picture, static_argnums=2)
    both = drop(contexts(), KEYS, 0.5)
    alone = drop(jax.tree.map(lambda x: x[1:], contexts()), KEYS[1:], 0.5)
    np.testing.assert_array_equal(both.features[1], alone.features[0])
    drawn = {tuple(np.ravel(drop(contexts(), jax.random.split(k, 2), 0.5).features[0]))
             for k in jax.random.split(jax.random.key(1), 4)}  # fmt: skip
    assert len(drawn) > 1


def test_features_that_do_not_say_where_the_picture_is_are_refused():
    with pytest.raises(UserError, match="prepare the data set again"):
        zimage.drop_picture(contexts()._replace(picture=None), KEYS, 0.5)


def test_contexts_say_where_the_picture_is_only_if_all_features_do():
    own = {"features": np.ones((5, 3), np.float32), "picture": np.array([1, 2], np.int32)}
    assert zimage.collate([own, own]).picture.tolist() == [[1, 2], [1, 2]]
    assert zimage.collate([own, {"features": own["features"]}]).picture is None


# --- FLUX.2-klein


def klein_context(rows=3):
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), (2, *shape))
    return klein.Context(draw(0, 4, 20), (draw(1, 2, 2, 12), draw(2, 6, 1, 12)[:, :rows]))


def test_klein_keeps_some_cells_of_its_last_reference():
    found = klein.drop_picture(klein_context(6), KEYS, 0.5)
    kept = np.asarray(found.kept)
    assert kept.shape == (2, 3) and (np.diff(kept) > 0).all() and kept.max() < 6
    assert (kept[0] != kept[1]).any()
    alone = klein.drop_picture(jax.tree.map(lambda x: x[1:], klein_context(6)), KEYS[1:], 0.5)
    np.testing.assert_array_equal(alone.kept[0], kept[1])
    assert klein.drop_picture(klein_context(6), KEYS, 0.99).kept.shape == (2, 1)


def test_what_klein_does_not_keep_is_not_there():
    """The first cells of a reference of one column are a shorter reference."""
    cfg = Flux2Config(
        channels=12, double_layers=1, single_layers=1, head_dim=16, heads=2, text_dim=20,
        axes_dims=(2, 4, 4, 6), time_frequencies=32,
    )  # fmt: skip
    net = flux2.Flux2(cfg, rngs=nnx.Rngs(0))
    x, sigma = jax.random.normal(jax.random.key(3), (2, 3, 2, 12)), jnp.array([0.9, 0.3])

    def run(context):
        sizes = [latent.shape[1:3] for latent in context.references]
        return net(x, sigma, *net.embed(*context), sizes, context.kept)

    first = klein_context(6)._replace(kept=jnp.array([[0, 1, 2]] * 2))
    short, whole = run(klein_context(3)), run(klein_context(6))
    assert relative_error(run(first), short) < 1e-5 < 1e-3 < relative_error(whole, short)
    every = klein_context(6)._replace(kept=jnp.array([list(range(6))] * 2))
    assert relative_error(run(every), whole) < 1e-5


# --- the step


def seen(share, method="dopsd"):
    """What a toy's teacher sees in three steps: its context times a number of each draw."""
    fields = {"teacher.vision_dropout": str(share), "method": method, "loss": "velocity"}
    config = load("zimage:random", fields)
    base, adapters, _, both, _ = world()
    told = []

    def drop(context, keys, share):
        chance = jax.vmap(jax.random.uniform)(keys)
        jax.debug.callback(lambda c: told.append(c.tolist()), chance)
        return context * chance[:, None]

    net = toy_denoiser()._replace(drop_picture=drop)
    schedule = Schedule(lambda h, w: GRID, lambda h, w: 3.0)
    loss, tx = registry.loss_function(config, net, schedule), optax.sgd(0.0)
    role = registry.teacher(config)
    step = train_step.make_step(
        loss, tx, role, lambda _: 1.0, 0, draw=registry.draw(config)
    )  # fmt: skip
    now, gaps = state.create(adapters, role, tx), []
    batch = jax.tree.map(lambda x: x[None], Batch(both))
    for n in range(2):
        now, metrics = step(now, base, batch, n, latent=SHAPE)
        gaps.append(float(metrics["gap"]))
    jax.effects_barrier()
    return told, gaps


def test_every_step_and_sample_draws_anew():
    told, gaps = seen(0.5)
    assert len({chance for step in told for chance in step}) == 2 * SHAPE[0]
    assert gaps[0] != gaps[1]


def test_without_it_the_program_is_that_of_before():
    told, _ = seen(0)
    assert told == []
    assert registry.draw(load("zimage:random", {})) is flow_matching.start_noise
    prompt = {"teacher.context": "prompt", "teacher.prompt_key": "x"}
    assert registry.vision_dropout(load("zimage:random", prompt)) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher.vision_dropout": "1"}, "vision_dropout: 1.0 must be at most 0.99"),
        ({"method": "sft"}, "vision_dropout: has no effect with config.method = sft"),
        (
            {"teacher.context": "prompt", "teacher.prompt_key": "x"},
            "vision_dropout: has no effect with config.teacher.context = prompt",
        ),
    ],
)
def test_what_does_not_go_together_with_it(fields, message):
    fields = {"teacher.vision_dropout": "0.5"} | fields
    with pytest.raises(UserError, match=message):
        schema.check(load("zimage:random", fields), fields)


def test_families_without_it_refuse_it():
    config = load("zimage:random", {"teacher.vision_dropout": "0.5"})
    loss = registry.loss_function(config, toy_denoiser(), Schedule(lambda h, w: GRID, None))
    draws = flow_matching.draw(jax.random.key(0), SHAPE)
    with pytest.raises(UserError, match="vision_dropout: models of this family cannot"):
        loss(None, None, None, Batch(world()[3]), draws, jax.random.key(0))
