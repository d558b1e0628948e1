"""The two networks that are trained together, and the contexts and velocities they give.

Dimension names: b batch, n tokens of a text, r of a reference, p patches, h w c of a latent.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dopsd_jax.families.flux2_klein.pipeline import LAYERS
from dopsd_jax.miniature.families import Told
from dopsd_jax.miniature.flux2_klein import configs
from dopsd_jax.miniature.flux2_klein.configs import Size
from dopsd_jax.miniature.render import SIDE
from dopsd_jax.models import flux2, kinds, qwen3
from dopsd_jax.models.layers import sinusoids

GRID = (SIDE // configs.FACTOR,) * 2
REMAT = kinds.UNROLLED
HIDDEN = tuple(range(1, len(LAYERS) + 1))  # of the layers that are there
GATE = 0.5  # start of the transformer's gates
RIDGE = 1e-3


class Context(NamedTuple):
    """Tokens of the text and of references, rows and columns of these; see `Flux2.__call__`."""

    text: Float[Array, "b n d"]
    references: tuple[Float[Array, "b _r d"], ...]
    sizes: list[tuple[int, int]]
    kept: Int[Array, "b k"] | None


class Networks(nnx.Module):
    """Transformer and text encoder."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        language = configs.language(size, len(LAYERS) + 1)
        self.transformer = flux2.Flux2(configs.transformer(size), remat=REMAT, rngs=rngs)
        self.text = qwen3.Qwen3(language, remat=REMAT, rngs=rngs)

    def context(self, told: Told, keys: Key[Array, " b"] | None = None) -> Context:
        """See `families.Networks`; what is left out is told already."""
        states = self.text(told.ids, told.lengths, hidden=HIDDEN)
        sizes = [latent.shape[1:3] for latent in told.references]
        features = jnp.concatenate(states, axis=-1)
        embedded = self.transformer.embed(features, told.references, told.kept)
        return Context(*embedded, sizes, told.kept)

    def velocity(self, x: Float[Array, "b h w c"], sigma: Float[Array, " b"], context: Context):
        """dx/dsigma, which is the transformer's own sign."""
        return self.transformer(x, sigma, *context)

    def velocity_and_states(self, x, sigma, context: Context):
        """The same, and the image tokens [b, p, c] after each block of the transformer."""
        net, states = self.transformer, []
        begin, count = net.enter(x, sigma, *context), x.shape[1] * x.shape[2]
        layer = lambda stack, i: jax.tree.map(lambda a: a[i], stack)
        tokens = begin.tokens
        for i in range(net.cfg.double_layers):
            tokens = begin.double(layer(net.double, i), tokens)
            states.append(tokens[0][:, :count])
        tokens = begin.joined(tokens)
        for i in range(net.cfg.single_layers):
            tokens = begin.single(layer(net.single, i), tokens)
            image = begin.row.order.split(tokens, axis=1)[1]
            states.append(image[:, :count])
        return net.leave(image, begin.c, x.shape), states


def start(size: Size, seed: int) -> Networks:
    """Networks with random weights, initialized so that they learn fast.

    The velocity is zero, and the gates are half open at every time: modulations have no bias, so
    the gates read what is nearly constant in the embedded time.
    """
    networks = Networks(size, rngs=nnx.Rngs(seed))
    net = networks.transformer
    sigma = jnp.linspace(0.0, 1.0, 128)
    waves = sinusoids(1000.0 * sigma, net.cfg.time_frequencies)
    time = np.asarray(jax.nn.silu(net.time_out(jax.nn.silu(net.time_in(waves)))), np.float64)
    square = time.T @ time / len(time)
    constant = np.linalg.solve(square + RIDGE * np.eye(len(square)), time.mean(0))
    gates = jnp.asarray(GATE * constant[:, None], jnp.float32)
    for modulation in (net.image_modulation, net.text_modulation, net.single_modulation):
        parts = jnp.split(
            0.2 * modulation.kernel[...], modulation.kernel[...].shape[1] // size.dim, 1
        )
        parts = [part + gates if i % 3 == 2 else part for i, part in enumerate(parts)]
        modulation.kernel[...] = jnp.concatenate(parts, axis=1)
    net.final_linear.kernel[...] = jnp.zeros_like(net.final_linear.kernel[...])
    networks.text.embedding[...] = 50.0 * networks.text.embedding[...]
    return networks


def places(size: Size) -> Float[np.ndarray, "p c"]:
    """What the rotation of the transformer turns a query at each image token's place by."""
    row, column = np.divmod(np.arange(GRID[0] * GRID[1]), GRID[1])
    theta, columns = configs.transformer(size).rope_theta, []
    for axis, position in ((size.axes[1], row), (size.axes[2], column)):
        for frequency in theta ** (-np.arange(0, axis, 2) / axis):
            columns += [np.cos(frequency * position), np.sin(frequency * position)]
    return np.stack(columns, 1).astype(np.float32)
