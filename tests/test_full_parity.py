"""Full fine-tuning against PyTorch on diffusers' transformer: every parameter, in float32."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference as reference
from conftest import relative_error
from fill import fill
from flax import nnx

from dopsd_jax import dopsd
from dopsd_jax.families.zimage import family
from dopsd_jax.models import zimage, zimage_config
from dopsd_jax.training import optimizers, state, train_step
from dopsd_jax.weights.live import LiveTensors

SEED, STEPS = 7, 3
LATENT = (2, 8, 12, 8)
GRID = (1.0, 0.75, 0.5, 0.0)
CASES = {
    # A decay that is seen: the weights lose half a percent a step.
    "fast EMA, weight decay": dict(decay=0.9, weight_decay=50.0),
    "live teacher, two micro-batches, tight clipping": dict(
        teacher="live", loss="velocity", accumulate=2, clip_norm=1e-3
    ),
}


class Roles:
    """Student and teacher as two whole transformers, with the interface of one with adapters."""

    device = torch.device("cpu")

    def __init__(self, model):
        self.models = {name: copy.deepcopy(model) for name in ("student", "teacher")}
        self.models["student"].requires_grad_(True)

    def set_adapter(self, name: str) -> None:
        self.active = self.models[name]

    def __call__(self, *args, **options):
        return self.active(*args, **options)

    def parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        return dict(self.models[name].named_parameters())


def torch_steps(model, batches, s: reference.Settings):
    """(loss, gradients, norm) of every step, then the parameters of both roles."""
    roles = Roles(model)
    ours, theirs = roles.parameters("student"), roles.parameters("teacher")
    plain = [p for n, p in ours.items() if p.ndim == 1 or "pad_token" in n]
    kernels = [p for n, p in ours.items() if not (p.ndim == 1 or "pad_token" in n)]
    groups = [{"params": kernels}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=s.learning_rate, weight_decay=s.weight_decay)
    steps = []
    for first in range(0, len(batches), s.accumulate):
        adam.zero_grad(set_to_none=True)
        losses = []
        for batch in batches[first : first + s.accumulate]:
            if s.teacher == "live":
                roles.models["teacher"].load_state_dict(roles.models["student"].state_dict())
            nodes, _, _ = reference.rollout_losses(roles, batch, s)
            (torch.nanmean(nodes) / s.accumulate).backward()
            losses.append(float(nodes.mean()))
        gradients = {n: p.grad.numpy().copy() for n, p in ours.items()}
        norm = float(torch.nn.utils.clip_grad_norm_(list(ours.values()), s.clip_norm))
        adam.step()
        with torch.no_grad():
            for name, p in theirs.items():
                p.lerp_(ours[name], 1 - s.decay)
        steps.append((np.mean(losses), gradients, norm))
    return steps, *({n: p.detach().numpy() for n, p in r.items()} for r in (ours, theirs))


@functools.cache
def world():
    """The same transformer on both sides, and six micro-batches of captions."""
    model = reference.build_transformer(seed=0)
    cfg = zimage_config.ZImageConfig.from_dict(dict(model.config), "config.json")
    ours = fill(
        nnx.eval_shape(lambda: zimage.ZImage(cfg, rngs=nnx.Rngs(0))),
        zimage_config.names(cfg),
        {k: v.numpy() for k, v in model.state_dict().items()},
    )
    rng = np.random.default_rng(3)
    caption = lambda n: rng.standard_normal((n, cfg.caption_dim), np.float32)
    captions = [([caption(5), caption(33)], [caption(40), caption(61)]) for _ in range(2 * STEPS)]
    return model, cfg, nnx.split(ours, nnx.Param, ...), captions


def tensors(parameters, cfg):
    """By diffusers' names, through the view that also writes the delivered model."""
    live = LiveTensors(parameters, zimage_config.names(cfg), "float32")
    return {name: live.read(name) for name in live.infos}


@pytest.mark.parametrize("name", CASES)
def test_three_optimizer_steps_of_every_parameter_equal_pytorch(name):
    settings = reference.Settings(sigmas=GRID[:-1], sigma_end=GRID[-1], **CASES[name])
    model, cfg, (graphdef, student, base), captions = world()
    count = settings.accumulate
    draw = lambda step, number: jax.random.split(
        jax.random.fold_in(state.step_key(SEED, step), number)
    )
    noises = [
        [np.asarray(jax.random.normal(draw(i, m)[0], LATENT)) for m in range(count)]
        for i in range(STEPS)
    ]
    batches = [
        reference.Batch(*captions[i * count + m], noises[i][m].transpose(0, 3, 1, 2))
        for i in range(STEPS)
        for m in range(count)
    ]
    expected, final, shadow = torch_steps(model, batches, settings)

    config = dict(
        optimizer="adamw", moments_dtype="float32", learning_rate=settings.learning_rate, steps=9,
        warmup_steps=0, lr_schedule="constant", adam_b1=0.9, adam_b2=0.999, adam_eps=1e-8,
        weight_decay=settings.weight_decay, grad_clip=settings.clip_norm,
    )  # fmt: skip
    role = state.Teacher(settings.teacher, settings.decay)
    tx, net = optimizers.optimizer(config), family.denoiser(graphdef)
    nodes = dopsd.make_nodes(GRID, settings.loss, "all", jax.random.key(0))

    def method(student, teacher, base, contexts, noise, key):
        return dopsd.loss_and_gradient(net, student, teacher, base, contexts, noise, nodes)

    step = train_step.make_step(method, tx, role, optimizers.schedule(config), SEED)
    now = state.create(student, role, tx)
    for i, (loss, gradients, norm) in enumerate(expected):
        group = captions[i * count : (i + 1) * count]
        both = dopsd.Contexts(
            *(
                jax.tree.map(
                    lambda *x: np.stack(x),
                    *(
                        family.collate([{"features": f} for f in g[r]], {"features": 64})
                        for g in group
                    ),
                )
                for r in (0, 1)
            )
        )
        if count == 1 and i == 0:  # the gradient is not a metric: from the method itself
            first = jax.tree.map(lambda x: jnp.asarray(x[0]), both)
            _, ours = jax.jit(method)(now.student, now.teacher, base, first, noises[i][0], None)
            ours = tensors(ours, cfg)
            assert ours.keys() == gradients.keys()
            assert any(n.startswith("context_refiner") for n in ours)
            worst = max(ours, key=lambda n: relative_error(ours[n], gradients[n]))
            assert relative_error(ours[worst], gradients[worst]) < 1e-4, worst
        now, metrics = step(now, base, both, latent=LATENT)
        assert relative_error(metrics["loss"], loss) < 1e-4
        assert relative_error(metrics["grad_norm"], norm) < 1e-4
    start = {n: p.numpy() for n, p in model.named_parameters()}
    pairs = [(now.student, final)] + ([(now.teacher, shadow)] if now.teacher is not None else [])
    for ours, theirs in pairs:
        ours = tensors(ours, cfg)
        worst = max(ours, key=lambda n: relative_error(ours[n], theirs[n]))
        assert relative_error(ours[worst], theirs[worst]) < 1e-4, worst
        # And what was added, by itself; in the 2-norm: where a gradient is rounding only, Adam's
        # step is as long as elsewhere, and its direction means nothing.
        moved = lambda new: np.concatenate([(new[n] - start[n]).ravel() for n in sorted(start)])
        assert np.linalg.norm(moved(ours) - moved(theirs)) < 1e-4 * np.linalg.norm(moved(theirs))
