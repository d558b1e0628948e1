"""D-OPSD in PyTorch, on diffusers' transformers and peft: the JAX step's reference.

Written from the paper's algorithm, sharing nothing with `dopsd_jax`. Latents are [b, c, h, w] here,
as in diffusers; Z-Image is told t = 1 - sigma and answers with x0 - noise, and FLUX.2's answer is
turned round so that it does too. All float32.
"""

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel, ZImagePipeline, ZImageTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

torch.set_num_threads(1)  # small products; on a shared machine a second thread waits
diffusers_logging.disable_progress_bar()

TARGETS = (
    "attention.to_q",
    "attention.to_k",
    "attention.to_v",
    "attention.to_out.0",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)
TINY = {
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "in_channels": 8,
    "cap_feat_dim": 24,
    "axes_dims": [4, 6, 6],
    "axes_lens": [256, 64, 64],
}

Adapters = dict[str, tuple[np.ndarray, np.ndarray]]  # module path -> (A [r, in], B [out, r])


@dataclasses.dataclass(frozen=True)
class Batch:
    """One micro-batch: captions [n_i, cap_feat_dim] of any lengths, start noise [b, c, h, w]."""

    student: Sequence[np.ndarray]
    teacher: Sequence[np.ndarray]
    noise: np.ndarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is varied; the defaults are the released recipe.

    `loss`: `x0`, `velocity`, or one weight a node, which multiplies the velocity loss. The loss
    is the mean over the nodes named by `loss_steps` (indices; None means all K).
    `teacher`: `ema`, `frozen` or `live` (the student's own weights at that moment).
    """

    sigmas: Sequence[float] = (1.0, 0.9, 0.75, 0.5)
    sigma_end: float = 0.0
    loss: str | Sequence[float] = "x0"
    loss_steps: Sequence[int] | None = None
    teacher: str = "ema"
    decay: float = 0.9999
    learning_rate: float = 1e-4
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step. Losses are means over its micro-batches.

    `node_losses` [K] are what the loss is the mean of (NaN where the teacher is not asked),
    `velocity_losses` [K] are MSE(u_s, u_t) with no weight; `gradients` are before clipping, (dA,
    dB); `states` are the latents [K + 1, b, c, h, w] of the last micro-batch's rollout.
    """

    loss: float
    node_losses: np.ndarray
    velocity_losses: np.ndarray
    gradients: Adapters
    grad_norm: float
    student: Adapters
    teacher: Adapters
    states: np.ndarray


def build_transformer(seed: int, **overrides) -> ZImageTransformer2DModel:
    """A frozen random transformer, `TINY` unless overridden, no part of which is idle."""
    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(**(TINY | overrides)).float().eval()
    for name, p in model.named_parameters():
        with torch.no_grad():
            if "pad_token" in name:
                p.normal_()
            elif p.ndim == 1 and name.endswith("weight"):  # norms
                p.copy_(1 + 0.1 * torch.randn_like(p))
            elif p.ndim == 1:
                p.normal_(std=0.5 if "adaLN" in name else 0.1)
            else:
                p.normal_(std=p.shape[1] ** -0.5)
    return model.requires_grad_(False)


def targets(model: ZImageTransformer2DModel) -> dict[str, tuple[int, int]]:
    """Adapted modules by diffusers path, with (in, out): all Linears of every block."""
    flux2 = isinstance(model, Flux2Transformer2DModel)
    wanted = lambda name: "transformer_blocks." in name if flux2 else name.endswith(TARGETS)
    return {
        name: (m.in_features, m.out_features)
        for name, m in model.named_modules()
        if hasattr(m, "in_features") and wanted(name)
    }


def random_adapters(
    model: ZImageTransformer2DModel, rank: int, seed: int, b_std: float = 0.05
) -> Adapters:
    """Adapters for every target: A of unit gain; B small, not zero, so that both have gradients."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    return {
        path: (draw(rank, din) / np.sqrt(np.float32(din)), np.float32(b_std) * draw(dout, rank))
        for path, (din, dout) in targets(model).items()
    }


def load_adapters(
    model: ZImageTransformer2DModel, adapters: Adapters, name: str, alpha: float | None = None
) -> None:
    """Attaches `adapters` as the peft adapter `name` and makes it the active one.

    Scale alpha / rank; alpha is the rank where not given.
    """
    ranks = {a.shape[0] for a, _ in adapters.values()}
    (rank,) = ranks
    config = LoraConfig(
        r=rank, lora_alpha=alpha or rank, target_modules=[*adapters], lora_dropout=0.0
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are meant
        model.add_adapter(config, adapter_name=name)
    layers = _layers(model)
    assert layers.keys() == adapters.keys(), "adapters do not fit the targets"
    with torch.no_grad():
        for path, (a, b) in adapters.items():
            layers[path].lora_A[name].weight.copy_(torch.from_numpy(a))
            layers[path].lora_B[name].weight.copy_(torch.from_numpy(b))


def run_reference(
    model: ZImageTransformer2DModel,
    student: Adapters,
    teacher: Adapters,
    batches: Sequence[Batch],
    settings: Settings = Settings(),
    alpha: float | None = None,
) -> list[Step]:
    """Trains for len(batches) / accumulate optimizer steps. `model` itself is left as it was."""
    s = settings
    assert len(batches) % s.accumulate == 0 and s.teacher in ("ema", "frozen", "live")
    model = copy.deepcopy(model)
    load_adapters(model, teacher, "teacher", alpha)
    load_adapters(model, student, "student", alpha)
    optimizer = make_optimizer(model, s)
    steps = []
    for first in range(0, len(batches), s.accumulate):
        node, velocity, states = backward(model, batches[first : first + s.accumulate], s)
        gradients = _export(model, "student", lambda p: p.grad)
        norm = update(model, optimizer, s)
        steps.append(
            Step(
                loss=float(torch.nanmean(node)),
                node_losses=node.numpy(),
                velocity_losses=velocity.numpy(),
                gradients=gradients,
                grad_norm=norm,
                student=_export(model, "student"),
                teacher=_export(model, "teacher"),
                states=states.numpy(),
            )
        )
    return steps


def make_optimizer(model: ZImageTransformer2DModel, s: Settings) -> torch.optim.Optimizer:
    """AdamW over the student's adapters."""
    return torch.optim.AdamW(
        adapter_parameters(model, "student"),
        lr=s.learning_rate,
        betas=(0.9, 0.999),
        eps=s.adam_eps,
        weight_decay=s.weight_decay,
    )


def backward(
    model: ZImageTransformer2DModel, batches: Sequence[Batch], s: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leaves the mean loss's gradient in `.grad`; node and velocity losses, states of the last."""
    for p in adapter_parameters(model, "student"):
        p.grad = None
    nodes, velocities = [], []
    for batch in batches:
        node, velocity, states = rollout_losses(model, batch, s)
        model.set_adapter("student")  # leaves of the inactive adapter take no gradient
        (torch.nanmean(node) / len(batches)).backward()
        nodes.append(node.detach())
        velocities.append(velocity)
    return torch.stack(nodes).mean(0), torch.stack(velocities).mean(0), states


def update(model: ZImageTransformer2DModel, optimizer: torch.optim.Optimizer, s: Settings) -> float:
    """Clips, steps, moves the teacher. Returns the gradient's norm before clipping."""
    ours, theirs = (adapter_parameters(model, name) for name in ("student", "teacher"))
    norm = torch.nn.utils.clip_grad_norm_(ours, s.clip_norm)
    optimizer.step()
    decay = {"ema": s.decay, "frozen": 1.0, "live": 0.0}[s.teacher]
    with torch.no_grad():
        for mean, p in zip(theirs, ours, strict=True):
            mean.copy_(decay * mean + (1 - decay) * p)
    return float(norm)


def rollout_losses(
    model: ZImageTransformer2DModel, batch: Batch, s: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The student's rollout: node losses [K] with gradient, velocity losses [K], states visited."""
    x = torch.tensor(batch.noise, device=model.device)
    states, nodes, velocities = [x], [], []
    chosen = range(len(s.sigmas)) if s.loss_steps is None else s.loss_steps
    ends = (*s.sigmas[1:], s.sigma_end)
    for k, (sigma, end) in enumerate(zip(s.sigmas, ends, strict=True)):
        x = x.detach()
        raw = predict(model, "student", x, sigma, batch.student)
        if k in chosen:
            with torch.no_grad():
                teacher = "student" if s.teacher == "live" else "teacher"
                target = predict(model, teacher, x, sigma, batch.teacher)
            nodes.append(node_loss(s, k, sigma, x, raw, target))
            velocities.append(torch.mean((raw - target) ** 2).detach())
        else:
            nodes.append(x.new_tensor(torch.nan))
            velocities.append(x.new_tensor(torch.nan))
        x = (x - (end - sigma) * raw).detach()  # velocity = -raw
        states.append(x)
    return torch.stack(nodes), torch.stack(velocities), torch.stack(states)


def node_loss(s: Settings, k: int, sigma: float, x, raw, target) -> torch.Tensor:
    """Of node k: of the student's and the teacher's predictions at a state."""
    if s.loss == "x0":
        return torch.mean(((x + sigma * raw) - (x + sigma * target)) ** 2)
    weight = 1.0 if s.loss == "velocity" else s.loss[k]
    return weight * torch.mean((raw - target) ** 2)


def predict(
    model: ZImageTransformer2DModel,
    adapter: str,
    x: torch.Tensor,
    sigma: float,
    captions: Sequence[np.ndarray],
) -> torch.Tensor:
    """x0 - noise [b, c, h, w] as the network predicts it with one of the adapters.

    `captions`: features; of FLUX.2 pairs of features and a list of references [h, w, c].
    """
    model.set_adapter(adapter)
    if isinstance(model, Flux2Transformer2DModel):
        return -_predict_flux2(model, x, sigma, captions)
    t = x.new_full((len(x),), sigma)
    features = [torch.as_tensor(c, device=x.device) for c in captions]
    out = model([image[:, None] for image in x], 1 - t, features, return_dict=False)[0]
    return torch.stack(out)[:, :, 0]


def _predict_flux2(model, x, sigma: float, captions) -> torch.Tensor:
    ids = lambda frame, h, w, l: torch.cartesian_prod(
        *(torch.tensor(axis) for axis in ([frame], [*range(h)], [*range(w)], [*range(l)]))
    )
    texts, references = zip(*captions, strict=True)
    b, c, h, w = x.shape
    tokens, places = [x.flatten(2).transpose(1, 2)], [ids(0, h, w, 1)]
    for k, same in enumerate(zip(*references, strict=True), 1):
        shown = torch.stack([torch.as_tensor(one, device=x.device) for one in same])
        tokens.append(shown.reshape(b, -1, c))
        places.append(ids(10 * k, *shown.shape[1:3], 1))
    text = torch.stack([torch.as_tensor(one, device=x.device) for one in texts])
    out = model(
        hidden_states=torch.cat(tokens, dim=1),
        encoder_hidden_states=text,
        timestep=x.new_full((b,), sigma),
        img_ids=torch.cat(places)[None].expand(b, -1, -1).to(x.device),
        txt_ids=ids(0, 1, 1, text.shape[1])[None].expand(b, -1, -1).to(x.device),
        return_dict=False,
    )[0]
    return out[:, : h * w].transpose(1, 2).reshape(x.shape)


def adapter_parameters(model: ZImageTransformer2DModel, name: str) -> list[torch.nn.Parameter]:
    """A and B of every layer, in a fixed order."""
    layers = _layers(model).values()
    return [p for m in layers for p in (m.lora_A[name].weight, m.lora_B[name].weight)]


def sample_with_diffusers(
    folder: str | Path,
    prompts: Sequence[str],
    latents: np.ndarray,
    *,
    lora: str | Path | None = None,
    steps: int = 8,
) -> np.ndarray:
    """Images uint8 [b, H, W, 3] of diffusers' own pipeline, float32, no guidance.

    latents: start noise, channels-last [b, h, w, c] as everywhere in `dopsd_jax`. `lora` is a file.
    """
    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        path = Path(lora)
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
    factor = pipe.vae_scale_factor
    images = pipe(
        list(prompts),  # the pipeline overwrites the entries of its list
        height=latents.shape[1] * factor,
        width=latents.shape[2] * factor,
        num_inference_steps=steps,
        guidance_scale=0.0,
        latents=torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 3, 1, 2))),
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


def _layers(model) -> Mapping[str, LoraLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def _export(model, name: str, of=lambda p: p.detach()) -> Adapters:
    return {
        path: tuple(of(p[name].weight).numpy().copy() for p in (m.lora_A, m.lora_B))
        for path, m in _layers(model).items()
    }
