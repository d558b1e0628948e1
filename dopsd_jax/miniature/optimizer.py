"""Parameters by name, and the optimizer of the miniature's training: Muon for matrices."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

Parameters = dict[str, Array]
ENDS = ("x_embedder", "final_linear", "time_in", "patch_embedding", "merger.fc2")
ENDS += ("encoder.conv_in", "conv_out")


def flat(module: nnx.Module) -> tuple[nnx.GraphDef, Parameters]:
    """A module as structure and named arrays."""
    graphdef, state = nnx.split(module)
    return graphdef, {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(state)}


def merge(module: nnx.Module, parameters: Parameters) -> nnx.Module:
    """The module with these arrays; `module` may be abstract."""
    graphdef, state = nnx.split(module)
    filled = {
        path: var.replace(parameters[".".join(map(str, path))])
        for path, var in nnx.to_flat_state(state)
    }
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def matrices(parameters: Parameters) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """Which parameters Muon takes: the inner kernels, layer by layer where they are stacked.

    A convolution is the matrix that maps a window to an output.
    """

    def dimensions(name: str, rank: int):
        if not name.endswith("kernel") or any(end in name for end in ENDS):
            return None
        window = (0, 1, 2) if rank == 4 else rank - 2
        return optax.contrib.MuonDimensionNumbers(window, rank - 1)

    return {
        name: dimensions(name, len(getattr(value, "shape", ())))
        for name, value in parameters.items()
    }


def schedule(peak: float, steps: int, warmup: int, cooldown: float) -> optax.Schedule:
    """Up, constant, and down to a twentieth over the last share `cooldown` of the steps."""
    down = round(cooldown * steps)
    parts = [
        optax.linear_schedule(peak / warmup, peak, warmup),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, peak / 20, max(down, 1)),
    ]
    return optax.join_schedules(parts, [warmup, steps - down])


def muon(
    rate: float,
    adam_rate: float,
    steps: int,
    warmup: int = 100,
    cooldown: float = 0.3,
    decay: float = 0.0,
):
    """Muon of peak rate `rate` for matrices and Adam of `adam_rate` for the rest.

    `decay`, times the rate, is taken off the matrices. Without it they grow, and the early parts of
    a residual stream become small beside those of later layers.
    """
    make = lambda peak: schedule(peak, steps, warmup, cooldown)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            make(rate),
            adam_learning_rate=make(adam_rate),
            adam_b2=0.99,
            weight_decay=decay,
            muon_weight_dimension_numbers=matrices,
        ),
    )


def averaged(average: Parameters, parameters: Parameters, decay) -> Parameters:
    """The moving average, one step on."""
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, parameters)


def decay_at(step, limit: float):
    """Decay of the moving average: short at first, `limit` in the end."""
    return jnp.minimum(limit, (1.0 + step) / (10.0 + step))
