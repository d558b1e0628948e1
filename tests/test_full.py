"""Full fine-tuning: laws of its step, its optimizers, what lies in host memory."""

import functools
import itertools
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, relative_error
from flax import nnx

from dopsd_jax import dopsd, families
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.flow import euler
from dopsd_jax.config import schema
from dopsd_jax.config.loading import load
from dopsd_jax.families.zimage import family
from dopsd_jax.methods.flow_matching import Batch
from dopsd_jax.models import zimage, zimage_config
from dopsd_jax.models.names import to_flax
from dopsd_jax.parallel import sharding
from dopsd_jax.run import build
from dopsd_jax.training import optimizers, state, trainable
from dopsd_jax.training.checkpoint import Checkpoints
from dopsd_jax.weights.live import LiveTensors

SIZE = zimage_config.ZImageConfig(
    dim=48, layers=2, refiner_layers=2, heads=3, channels=4, caption_dim=16,
    axes_dims=(4, 6, 6), axes_lens=(160, 32, 32),
)  # fmt: skip
LATENT = (2, 4, 6, 4)
GRID = (1.0, 0.75, 0.5, 0.0)


@functools.cache
def world():
    """(graphdef, student, teacher, contexts, noise) of a network no part of which is idle."""
    net = zimage.ZImage(SIZE, rngs=nnx.Rngs(0))
    graphdef, start, _ = nnx.split(net, nnx.Param, ...)
    leaves, treedef = jax.tree.flatten(start)

    def perturbed(seed):
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(treedef, noisy)

    def context(seed, rows):
        features = jax.random.normal(jax.random.key(seed), (2, 64, SIZE.caption_dim))
        return family.Context(features, jnp.array([rows, 40]))

    contexts = dopsd.Contexts(context(3, 20), context(4, 61))
    noise = jax.random.normal(jax.random.key(5), LATENT)
    return graphdef, perturbed(1), perturbed(2), contexts, noise


def by_path(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(x) for p, x in flat}


@functools.cache
def gradient_program():
    net = family.denoiser(world()[0])
    nodes = dopsd.make_nodes(GRID, "x0", "all", jax.random.key(0))
    return jax.jit(lambda *args: dopsd.loss_and_gradient(net, *args, nodes))


EMPTY = nnx.State({})


def test_the_gradient_of_every_parameter_is_that_of_one_backward_pass():
    """The refined caption is computed once before the scan; its parameters lose nothing by it."""
    graphdef, student, teacher, contexts, noise = world()
    _, gradient = gradient_program()(student, teacher, EMPTY, contexts, noise)

    refined = lambda net, c: net.refine(c.features, c.lengths)

    def whole(student):
        net, x, total = nnx.merge(graphdef, student, EMPTY), noise, 0.0
        other = nnx.merge(graphdef, teacher, EMPTY)
        for sigma, following in itertools.pairwise(GRID):
            run = lambda n, c, x=x, s=sigma: -n(x, jnp.full(2, 1 - s), refined(n, c), c.lengths)
            v, target = run(net, contexts.student), run(other, contexts.teacher)
            loss = sigma**2 * jnp.mean((v - jax.lax.stop_gradient(target)) ** 2)
            total, x = total + loss / (len(GRID) - 1), euler(x, v, sigma, following)
            x = jax.lax.stop_gradient(x)
        return total

    expected = by_path(jax.jit(jax.grad(whole))(student))
    found = by_path(gradient)
    assert found.keys() == expected.keys()
    refiner = [name for name in found if name.startswith(("context_refiner", "caption"))]
    assert len(refiner) > 10 and all(np.abs(found[name]).max() > 0 for name in refiner)
    for name, array in expected.items():
        assert relative_error(found[name], array) < 2e-5, name


def test_equal_contexts_and_weights_give_no_gradient():
    _, student, _, contexts, noise = world()
    same = dopsd.Contexts(contexts.student, contexts.student)
    losses, gradient = gradient_program()(student, student, EMPTY, same, noise)
    _, usual = gradient_program()(student, student, EMPTY, contexts, noise)
    assert losses.total < 1e-10
    assert optax.tree.norm(gradient) < 1e-5 * optax.tree.norm(usual)


def config(*changes, arg="random_full"):
    c = runpy.run_path(str(ROOT / "configs/zimage.py"))["get_config"](arg)
    c.grid, c.teacher.decay = GRID, 0.9
    for name, value in changes:
        c.update_from_flattened_dict({name: value})
    return c


def test_a_run_with_teacher_and_optimizer_in_host_memory(tmp_path):
    """Its numbers are those of plain gradients, optimizer and mean; saved, it comes back there."""
    # A large eps: else Adam's step is full where a gradient is rounding only.
    options = config(("offload", "teacher,optimizer"), ("weight_decay", 0.1), ("adam_eps", 1e-3))
    _, student, _, contexts, _ = world()
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1])
    plan, *_ = build.abstract_plan(options, family, SIZE, "xla", mesh)
    now = plan.initial_state(jax.tree.map(jnp.copy, student))

    tx, teacher = optimizers.optimizer(options), student
    update, opt_state = jax.jit(tx.update), tx.init(student)
    for i in range(3):
        key = jax.random.fold_in(state.step_key(options.seed, i), 0)
        noise = jax.random.normal(jax.random.split(key)[0], LATENT)
        _, gradient = gradient_program()(student, teacher, EMPTY, contexts, noise)
        updates, opt_state = update(gradient, opt_state, student)
        student = optax.apply_updates(student, updates)
        teacher = jax.tree.map(lambda t, s: 0.9 * t + 0.1 * s, teacher, student)
        batch = Batch(jax.tree.map(lambda x: x[None], contexts))
        now, metrics = plan.step(now, EMPTY, batch, latent=LATENT)
        assert relative_error(metrics["grad_norm"], optax.tree.norm(gradient)) < 1e-5
    for ours, expected in ((now.student, student), (now.teacher, teacher)):
        ours, expected, start = map(by_path, (ours, expected, world()[1]))
        for name, array in ours.items():
            np.testing.assert_allclose(array, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)
            assert (array != start[name]).any(), name

    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(3, now)
    checkpoints.close()
    _, restored = Checkpoints(tmp_path, 1).restore(plan.abstract_state)
    for state_ in (now, restored):
        arrays = jax.tree.leaves((state_.teacher, state_.opt_state))
        assert all(x.sharding.memory_kind == "pinned_host" for x in arrays if x.ndim)
        arrays = jax.tree.leaves(state_.student)
        assert all(x.sharding.memory_kind != "pinned_host" for x in arrays)
    jax.tree.map(np.testing.assert_array_equal, restored, now)


def test_bfloat16_moments_take_half_the_memory_and_nearly_the_same_steps():
    def moved(dtype):
        tx = optimizers.scale_by_adam(0.9, 0.999, 1e-8, dtype)
        total, opt_state = jnp.zeros(1000), tx.init(jnp.zeros(1000))
        for i in range(8):
            gradient = 1 + jax.random.normal(jax.random.key(i), (1000,))
            update, opt_state = tx.update(gradient, opt_state)
            total += update
        return total, opt_state

    (narrow, small), (wide, large) = moved("bfloat16"), moved("float32")
    assert {x.dtype for x in (small.mu, small.nu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in (large.mu, large.nu)} == {jnp.dtype("float32")}
    assert 0 < jnp.linalg.norm(narrow - wide) < 0.01 * jnp.linalg.norm(wide)


def test_random_rounding_is_right_on_average_and_takes_a_neighbour():
    x = jnp.array([1 + 2**-10, -3.001, 1e-30, 0.0, 1.0, jnp.inf, jnp.nan], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(lambda k: optimizers.round_at_random(k, x))(keys), np.float32)
    for i in range(5):
        assert len(set(drawn[:, i].tolist())) <= 2
        np.testing.assert_allclose(drawn[:, i].mean(), x[i], rtol=4e-4)
        assert np.abs(drawn[:, i] - x[i]).max() <= abs(float(x[i])) * 2**-7
    assert np.isposinf(drawn[:, 5]).all() and np.isnan(drawn[:, 6]).all()


def test_a_bfloat16_second_moment_falls_when_gradients_do():
    """To the nearest it would stay: 0.999 of a bfloat16 number rounds back to that number."""
    gradients = [jnp.full((64,), size) for size in (1.0, 0.01)]
    narrow = optimizers.scale_by_adam(0.9, 0.999, 1e-8, "bfloat16")
    wide = optimizers.scale_by_adam(0.9, 0.999, 1e-8, "float32")

    def after(tx):
        move = lambda g: lambda s, _: (tx.update(g, s)[1], None)
        middle = jax.lax.scan(move(gradients[0]), tx.init(gradients[0]), length=500)[0]
        return jax.lax.scan(move(gradients[1]), middle, length=2000)[0]

    expected, found = jax.jit(lambda: after(wide))(), jax.jit(lambda: after(narrow))()
    assert expected.nu[0] < 0.1
    mean = float(jnp.mean(found.nu.astype(jnp.float32)))
    assert abs(mean / float(expected.nu[0]) - 1) < 0.05
    stuck = jnp.float32(0.4).astype(jnp.bfloat16)
    assert (stuck.astype(jnp.float32) * 0.999).astype(jnp.bfloat16) == stuck


def test_adafactor_keeps_rows_and_columns_and_lowers_the_loss():
    options = config(("optimizer", "adafactor"), ("learning_rate", 0.01), ("weight_decay", 0.1))
    tx = optimizers.optimizer(options)
    target = jax.random.normal(jax.random.key(0), (3, 130, 140))
    parameters = {"kernel": jnp.zeros_like(target), "bias": jnp.ones((5,))}
    opt_state = tx.init(parameters)
    size = sum(x.size for x in jax.tree.leaves(opt_state))
    assert size < 0.05 * target.size
    loss = lambda p: jnp.mean((p["kernel"] - target) ** 2)

    def step(carry, _):
        p, s = carry
        updates, s = tx.update(jax.grad(loss)(p), s, p)
        return (optax.apply_updates(p, updates), s), loss(p)

    (end, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, length=100))((parameters, opt_state))
    assert losses[-1] < 0.3 * losses[0]
    assert (end["bias"] == 1).all()  # no gradient, and not decayed


def test_adafactor_moves_no_tensor_farther_than_the_rate():
    """After small gradients a large one would: the root mean square of an update is at most 1."""
    tx = optimizers.optimizer(config(("optimizer", "adafactor"), ("learning_rate", 0.01)))
    parameters, shape = jnp.zeros((130, 140)), (130, 140)
    move, opt_state = jax.jit(tx.update), tx.init(parameters)
    for i, size in enumerate([1e-3] * 20 + [1.0]):
        gradient = size * jax.random.normal(jax.random.key(i), shape)
        update, opt_state = move(gradient, opt_state, parameters)
    assert float(jnp.sqrt(jnp.mean(update**2))) == pytest.approx(0.01, rel=1e-5)


def test_weight_decay_spares_norms_biases_and_learned_tokens():
    flat = by_path(optimizers.decayed(world()[1]))
    kernels = {name for name in flat if name.removesuffix(".value").endswith("kernel")}
    assert {name for name, yes in flat.items() if yes} == kernels and len(kernels) < len(flat)


@pytest.mark.parametrize("host", [False, True])
def test_parameters_in_training_read_as_tensors_of_the_checkpoint(host):
    """Every tensor, from device or host memory, in the type asked for; fused ones taken apart."""
    student, leaves = world()[1], zimage_config.names(SIZE)
    if host:
        place = jax.tree.leaves(student)[0].sharding.with_memory_kind("pinned_host")
        student = jax.device_put(student, place)
    live = LiveTensors(student, leaves, "bfloat16")
    flat = {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(student)}
    for leaf in leaves:
        pieces = [live.read(s.name) for s in leaf.sources]
        assert [live.infos[s.name].shape for s in leaf.sources] == [p.shape for p in pieces]
        expected = flat[leaf.path] if leaf.index is None else flat[leaf.path][leaf.index]
        np.testing.assert_array_equal(to_flax(leaf, pieces), expected.astype(live.dtype))


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ([("base_dtype", "bfloat16")], ["config.base_dtype: bfloat16 with config.train = full"]),
        ([("lora.init_from", "a.safetensors")], ["config.lora.init_from: config.train is full"]),
        (
            [("offload", "teacher,student"), ("export", "onnx")],
            [
                "config.export: 'onnx' is not one of diffusers, comfyui",
                "config.offload: 'student' is not one of teacher, optimizer",
            ],
        ),
        ([("export", "")], ["config.export: is empty"]),
        (
            [("optimizer", "adafactor"), ("moments_dtype", "bfloat16")],
            ["config.moments_dtype: bfloat16 with config.optimizer = adafactor"],
        ),
        (
            [("teacher.weights", "live"), ("offload", "teacher"), ("export_weights", "teacher")],
            ["config.offload: names the teacher", "config.export_weights: names the teacher"],
        ),
    ],
)
def test_settings_that_do_not_go_together_are_all_named(changes, messages):
    with pytest.raises(UserError) as caught:
        schema.check(config(*changes))
    assert len(caught.value.problems) == len(messages)
    for found, wanted in zip(caught.value.problems, messages, strict=True):
        assert found.startswith(wanted)
    schema.check(config())


@pytest.mark.parametrize("export", ["comfyui", "diffusers"])
def test_another_form_of_the_same_step_takes_nothing_away(tmp_path, monkeypatch, export):
    """The folder may be the run's result, and the config.model of another run."""
    monkeypatch.setattr(trainable, "LiveTensors", lambda *_: None)
    monkeypatch.setattr(trainable, "export_single", lambda model, path, **_: path.touch())
    monkeypatch.setattr(trainable, "export_diffusers", lambda model, path, **_: path.mkdir())
    size = zimage_config.ZImageConfig()
    own = trainable.FullNetwork(config(("export", export)), family, size)
    for step in (3, 7):
        (tmp_path / "model" / f"step_{step}").mkdir(parents=True)
        (tmp_path / "model" / f"step_{step}.safetensors").touch()
    if export == "diffusers":
        shutil.rmtree(tmp_path / "model" / "step_7")
    own.export(tmp_path, tmp_path, 7, None, {})
    left = {path.name for path in (tmp_path / "model").iterdir()}
    assert left == {"step_7", "step_7.safetensors"}


@pytest.mark.parametrize(
    "fields",
    [{"method": "sft", "anchor.share": 0.25}, {"teacher.weights": "live", "teacher.told": "0"}],
)
def test_a_copy_of_the_start_goes_to_host_memory_without_a_teacher(fields):
    options = config(("offload", "teacher"), *fields.items())
    schema.check(options)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1])
    plan, *_ = build.abstract_plan(options, family, SIZE, "xla", mesh)
    like = plan.abstract_state
    assert like.teacher is None
    assert {x.sharding.memory_kind for x in jax.tree.leaves(like.start)} == {sharding.HOST}


def test_configurations_that_a_message_names_train_everything():
    """One of each family."""
    found = [load(name).to_dict() for name in schema.FULL_CONFIGS]
    assert {(c["train"], c["base_dtype"]) for c in found} == {("full", "float32")}
    assert [name.partition(":")[0] for name in schema.FULL_CONFIGS] == list(families.FAMILIES)


def test_what_is_asked_for_and_has_no_effect_is_named():
    asked = {"lora.rank": 4, "steps": 9}
    with pytest.raises(UserError, match=r"config\.lora\.rank: has no effect with config\.train"):
        schema.check(config(), asked)
    schema.check(config(arg="random"), asked)
