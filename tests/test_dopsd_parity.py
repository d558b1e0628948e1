"""The D-OPSD step against PyTorch (diffusers, peft): three optimizer steps in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference as reference
from conftest import relative_error
from fill import fill
from flax import nnx

from dopsd_jax import dopsd
from dopsd_jax.adapters import attach
from dopsd_jax.families.zimage import family
from dopsd_jax.models import zimage, zimage_config
from dopsd_jax.training import optimizers, state, train_step
from dopsd_jax.weights.lora_files import LoraModule

RANK, ALPHA, SEED = 4, 8.0, 7
LATENT = (2, 8, 12, 8)
GRID = (1.0, 0.9, 0.75, 0.5, 0.0)
CASES = {
    "recipe: x0 loss, slow EMA": {},
    "velocity loss, fast EMA": dict(loss="velocity", decay=0.5),
    "weights, frozen teacher, weight decay": dict(
        loss=(8.0, 4.0, 2.0, 1.0), teacher="frozen", weight_decay=0.1
    ),
    "live teacher, two micro-batches, tight clipping": dict(
        teacher="live", accumulate=2, clip_norm=1e-3
    ),
    "two of four steps with a loss": dict(loss_steps=(0, 2)),
}


@functools.cache
def world():
    """The same transformer and adapters on both sides, and six micro-batches of captions."""
    model = reference.build_transformer(seed=0)
    cfg = zimage_config.ZImageConfig.from_dict(dict(model.config), "config.json")
    leaves = zimage_config.names(cfg)
    ours = fill(
        nnx.eval_shape(lambda: zimage.ZImage(cfg, rngs=nnx.Rngs(0))),
        leaves,
        {k: v.numpy() for k, v in model.state_dict().items()},
    )
    chosen = attach.select(attach.slots(leaves), "blocks", family.LORA_PRESETS)
    assert chosen.keys() == reference.targets(model).keys()
    attach.attach(ours, chosen, RANK, ALPHA, jax.random.key(0))
    graphdef, adapter, base = nnx.split(ours, nnx.LoRAParam, ...)
    students, teachers = (reference.random_adapters(model, RANK, seed) for seed in (1, 2))

    def take(arrays):
        modules = {p: LoraModule(a=a, b=b, scale=ALPHA / RANK) for p, (a, b) in arrays.items()}
        return attach.load(adapter, chosen, modules, ALPHA / RANK, "test")

    rng = np.random.default_rng(3)
    caption = lambda n: rng.standard_normal((n, cfg.caption_dim), np.float32)
    captions = [([caption(5), caption(33)], [caption(40), caption(61)]) for _ in range(6)]
    return model, graphdef, base, chosen, (students, teachers), take, captions


def arrays(adapter, chosen):
    return {p: (m.a, m.b) for p, m in attach.export(adapter, chosen, ALPHA / RANK).items()}


def worst(ours, theirs):
    """Largest relative error over all A and B."""
    assert ours.keys() == theirs.keys()
    return max(relative_error(ours[p][i], theirs[p][i]) for p in theirs for i in (0, 1))


@pytest.mark.parametrize("name", CASES)
def test_three_optimizer_steps_equal_pytorch(name):
    # A large eps: else Adam's step is full where a gradient is rounding only. A large rate: else
    # float32 holds too few digits of what is added to a weight.
    settings = reference.Settings(adam_eps=1e-4, learning_rate=1e-3, **CASES[name])
    model, graphdef, base, chosen, (student, teacher), take, captions = world()
    count, nodes = settings.accumulate, len(GRID) - 1
    with_loss = list(settings.loss_steps or range(nodes))

    micro_key = lambda step, n: jax.random.fold_in(state.step_key(SEED, step), n)
    noises = [
        np.asarray(jax.random.normal(jax.random.split(micro_key(s, n))[0], LATENT))
        for s in range(3)
        for n in range(count)
    ]
    batches = [
        reference.Batch(s, t, noise.transpose(0, 3, 1, 2))
        for (s, t), noise in zip(captions, noises, strict=False)
    ]
    expected = reference.run_reference(model, student, teacher, batches, settings, alpha=ALPHA)

    config = dict(
        learning_rate=settings.learning_rate, warmup_steps=0, steps=3, lr_schedule="constant",
        adam_b1=0.9, adam_b2=0.999, adam_eps=settings.adam_eps, weight_decay=settings.weight_decay,
        grad_clip=settings.clip_norm, optimizer="adamw", moments_dtype="float32",
    )  # fmt: skip
    role = state.Teacher(settings.teacher, settings.decay)
    tx = optimizers.optimizer(config)
    net = family.denoiser(graphdef)
    loss_steps = settings.loss_steps or "all"

    def method(student, teacher, base, contexts, noise, key):
        nodes = dopsd.make_nodes(GRID, settings.loss, loss_steps, key)
        every = loss_steps == "all"
        return dopsd.loss_and_gradient(net, student, teacher, base, contexts, noise, nodes, every)

    step = train_step.make_step(method, tx, role, optimizers.schedule(config), SEED)
    ours = state.create(take(student), role, tx)
    if settings.teacher != "live":
        ours = ours._replace(teacher=take(teacher))
    for i in range(3):
        group = captions[i * count : (i + 1) * count]
        both = dopsd.Contexts(
            *(
                jax.tree.map(
                    lambda *x: np.stack(x),
                    *(
                        family.collate([{"features": f} for f in g[role]], {"features": 64})
                        for g in group
                    ),
                )
                for role in (0, 1)
            )
        )
        # The gradient is not a metric: take it from the method itself, on the first micro-batch.
        if count == 1:
            key = jax.random.split(micro_key(i, 0))[1]
            target = ours.student if ours.teacher is None else ours.teacher
            first = jax.tree.map(lambda x: jnp.asarray(x[0]), both)
            _, gradient = jax.jit(method)(ours.student, target, base, first, noises[i], key)
            assert worst(arrays(gradient, chosen), expected[i].gradients) < 1e-4
        ours, metrics = step(ours, base, both, latent=LATENT)
        per_step = np.asarray(metrics["loss_per_step"])
        assert np.isnan(per_step).tolist() == [k not in with_loss for k in range(nodes)]
        assert relative_error(per_step[with_loss], expected[i].node_losses[with_loss]) < 1e-4
        assert relative_error(metrics["loss"], expected[i].loss) < 1e-4
        assert relative_error(metrics["grad_norm"], expected[i].grad_norm) < 1e-4
    if ours.teacher is not None:
        assert worst(arrays(ours.teacher, chosen), expected[-1].teacher) < 1e-4
    trained = arrays(ours.student, chosen)
    assert worst(trained, expected[-1].student) < 1e-4
    # And what was added to the adapters, by itself.
    move = lambda new: np.concatenate(
        [(x - y).ravel() for p in sorted(new) for x, y in zip(new[p], student[p], strict=True)]
    )
    ours, theirs = move(trained), move(expected[-1].student)
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)
