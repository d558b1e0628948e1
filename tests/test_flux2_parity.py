"""FLUX.2-klein's D-OPSD step against PyTorch (diffusers, peft): three steps in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference as reference
from conftest import relative_error
from flax import nnx
from test_flux2 import build, port

from dopsd_jax import dopsd
from dopsd_jax.adapters import attach
from dopsd_jax.families.flux2_klein import family
from dopsd_jax.models.flux2_config import names
from dopsd_jax.training import optimizers, state, train_step
from dopsd_jax.training.checkpoint import Checkpoints
from dopsd_jax.weights.lora_files import LoraModule

RANK, ALPHA, SEED, STEPS, TEXT = 4, 8.0, 7, 3, 7
GRID = (1.0, 0.95, 0.85, 0.7, 0.0)


@pytest.mark.parametrize("edited", [0, 1], ids=["edit_ref", "gt_ref"])
def test_three_optimizer_steps_with_references_equal_pytorch(edited, tmp_path):
    """The teacher is told another text, and shown one reference more than the student.

    All have sizes of their own. With gt_ref the student is shown the picture that is edited. A run
    that was interrupted after the first step comes to the same, bit for bit.
    """
    # A large eps: else Adam's step is full where a gradient is rounding only. A large rate: else
    # float32 holds too few digits of what is added to a weight.
    settings = reference.Settings(
        sigmas=GRID[:-1], adam_eps=1e-4, learning_rate=1e-3, decay=0.5, weight_decay=0.1
    )
    model, cfg = build()
    model.requires_grad_(False)
    ours = port(model, cfg)
    chosen = attach.select(attach.slots(names(cfg)), "blocks", family.LORA_PRESETS)
    assert chosen.keys() == reference.targets(model).keys()
    attach.attach(ours, chosen, RANK, ALPHA, jax.random.key(0))
    graphdef, adapter, base = nnx.split(ours, nnx.LoRAParam, ...)
    student, teacher = (reference.random_adapters(model, RANK, seed) for seed in (1, 2))

    def take(arrays):
        modules = {p: LoraModule(a=a, b=b, scale=ALPHA / RANK) for p, (a, b) in arrays.items()}
        return attach.load(adapter, chosen, modules, ALPHA / RANK, "test")

    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    told = []
    for _ in range(STEPS):
        own = [[draw(5, 2, cfg.channels)] * edited for _ in range(2)]
        target = [draw(3, 5, cfg.channels) for _ in range(2)]
        text = lambda: draw(TEXT, cfg.text_dim)
        both = (
            [(text(), shown) for shown in own],
            [(text(), [*shown, last]) for shown, last in zip(own, target, strict=True)],
        )
        told.append(both)
    latent = (2, 6, 4, cfg.channels)
    micro_key = lambda step: jax.random.fold_in(state.step_key(SEED, step), 0)
    noises = [
        np.asarray(jax.random.normal(jax.random.split(micro_key(step))[0], latent))
        for step in range(STEPS)
    ]
    batches = [
        reference.Batch(*both, noise.transpose(0, 3, 1, 2))
        for both, noise in zip(told, noises, strict=True)
    ]
    expected = reference.run_reference(model, student, teacher, batches, settings, alpha=ALPHA)

    config = dict(
        learning_rate=settings.learning_rate, warmup_steps=0, steps=STEPS, lr_schedule="constant",
        adam_b1=0.9, adam_b2=0.999, adam_eps=settings.adam_eps, weight_decay=settings.weight_decay,
        grad_clip=settings.clip_norm, optimizer="adamw", moments_dtype="float32",
    )  # fmt: skip
    role, net = state.Teacher(settings.teacher, settings.decay), family.denoiser(graphdef)

    def method(student, teacher, base, contexts, noise, key):
        nodes = dopsd.make_nodes(GRID, settings.loss, "all", key)
        return dopsd.loss_and_gradient(net, student, teacher, base, contexts, noise, nodes)

    tx = optimizers.optimizer(config)
    step = train_step.make_step(method, tx, role, optimizers.schedule(config), SEED)
    train = state.create(take(student), role, tx)._replace(teacher=take(teacher))
    named = lambda rows: [
        {"text": text} | {f"reference{k}": latent for k, latent in enumerate(shown)}
        for text, shown in rows
    ]
    arrays = lambda adapter: {
        p: (m.a, m.b) for p, m in attach.export(adapter, chosen, ALPHA / RANK).items()
    }
    worst = lambda ours, theirs: max(
        relative_error(ours[p][i], theirs[p][i]) for p in theirs for i in (0, 1)
    )
    contexts = [dopsd.Contexts(*(family.collate(named(rows)) for rows in both)) for both in told]
    batch = lambda i: jax.tree.map(lambda x: jnp.asarray(x)[None], contexts[i])
    for i in range(STEPS):
        if i == 0:  # the gradient is not a metric: take it from the method itself
            args = train.student, train.teacher, base, contexts[0], noises[0]
            _, gradient = jax.jit(method)(*args, jax.random.split(micro_key(0))[1])
            assert worst(arrays(gradient), expected[0].gradients) < 1e-4
        train, metrics = step(train, base, batch(i), latent=latent)
        if i == 0:
            with Checkpoints(tmp_path, keep=1) as checkpoints:
                checkpoints.save(1, train)
        assert relative_error(metrics["loss_per_step"], expected[i].node_losses) < 1e-4
        assert relative_error(metrics["grad_norm"], expected[i].grad_norm) < 1e-4
        assert worst(arrays(train.student), expected[i].student) < 1e-4
        assert worst(arrays(train.teacher), expected[i].teacher) < 1e-4
    first, again = Checkpoints(tmp_path, keep=1).restore(train)
    again = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), again)  # as compiled for
    for i in range(first, STEPS):
        again, _ = step(again, base, batch(i), latent=latent)
    jax.tree.map(np.testing.assert_array_equal, again, train)
