"""Learning rate and optimizer of a configuration."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float

from dopsd_jax.common.errors import UserError

Tree = Any

NOT_DECAYED = re.compile(r"(bias|scale|pad_token)$")  # vectors: offsets, norms, learned tokens


def schedule(config: Mapping) -> optax.Schedule:
    """Learning rate by step: `constant`, `linear` or `cosine` (down to 0), after a warm-up."""
    peak, warmup, steps = config["learning_rate"], config["warmup_steps"], config["steps"]
    decays = {
        "constant": lambda rest: optax.constant_schedule(peak),
        "linear": lambda rest: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda rest: optax.cosine_decay_schedule(peak, rest),
    }
    if config["lr_schedule"] not in decays:
        raise UserError(
            f"config.lr_schedule: {config['lr_schedule']!r} is not one of {', '.join(decays)}"
        )
    decay = decays[config["lr_schedule"]](max(steps - warmup, 1))
    if not warmup:
        return decay
    # The first step already moves: from peak / warmup, not from 0.
    ramp = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else decay
    return optax.join_schedules([ramp, decay], [warmup])


def optimizer(config: Mapping) -> optax.GradientTransformation:
    """Clipping by the global norm (`grad_clip` 0: none), then config.optimizer.

    `adamw`: both moments in `moments_dtype`. `adafactor`: the second moment by rows and columns, no
    first one, updates clipped to rms 1 (arXiv 1804.04235; a stack of layers counts as one tensor);
    its steps are not scaled by the parameters' size, so `learning_rate` means what it does for
    AdamW. Weight decay is decoupled and not applied to `NOT_DECAYED`.
    """
    scales = {
        "adamw": lambda: scale_by_adam(
            config["adam_b1"], config["adam_b2"], config["adam_eps"], config["moments_dtype"]
        ),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
        ),
    }
    clip = config["grad_clip"]
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        scales[config["optimizer"]](),
        optax.add_decayed_weights(config["weight_decay"], mask=decayed),
        optax.scale_by_learning_rate(schedule(config)),
    )


def scheduled(opt_state: optax.OptState, step: jax.Array) -> jax.Array:
    """The steps that the schedule has counted: refused ones are not. `step` without a schedule."""
    is_count = lambda state: isinstance(state, optax.ScaleByScheduleState)
    states = jax.tree.leaves(opt_state, is_leaf=is_count)
    return next((state.count for state in states if is_count(state)), step)


def decayed(parameters: Tree) -> Tree:
    """True for every parameter that weight decay applies to: all kernels, and adapters."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NOT_DECAYED.search(name(path).removesuffix(".value")) is None, parameters
    )


def scale_by_adam(b1: float, b2: float, eps: float, dtype: Any) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with both moments kept in `dtype`, float32 or bfloat16.

    Moments are computed in float32 and rounded to bfloat16 stochastically: rounded to nearest, a
    second moment would never decrease (0.999 of a bfloat16 number rounds back to it).
    """
    inner, dtype = optax.scale_by_adam(b1, b2, eps), jnp.dtype(dtype)
    if dtype == jnp.float32:
        return inner

    def init(parameters):
        state = inner.init(parameters)
        return state._replace(
            mu=optax.tree.cast(state.mu, dtype), nu=optax.tree.cast(state.nu, dtype)
        )

    def update(gradient, state, parameters=None):
        wide = state._replace(
            mu=optax.tree.cast(state.mu, jnp.float32), nu=optax.tree.cast(state.nu, jnp.float32)
        )
        updates, wide = inner.update(gradient, wide, parameters)
        moments, treedef = jax.tree.flatten((wide.mu, wide.nu))
        # Of the step alone: nothing is saved, and a resumed run draws the same.
        key = jax.random.fold_in(jax.random.key(0), wide.count)
        rounded = [round_at_random(jax.random.fold_in(key, i), m) for i, m in enumerate(moments)]
        mu, nu = jax.tree.unflatten(treedef, rounded)
        return updates, wide._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def round_at_random(key: jax.Array, x: Float[Array, "..."]) -> BFloat16[Array, "..."]:
    """float32 to one of the two bfloat16 neighbours, the nearer one more likely: right on average.

    What is not finite stays so.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half; a carry out of the lower half goes to the next number.
    drawn = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = jax.lax.bitcast_convert_type(drawn & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), upper, x).astype(jnp.bfloat16)
