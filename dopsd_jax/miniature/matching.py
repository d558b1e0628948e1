"""Distribution matching distillation: clean estimates at every node become like true pictures.

Two score networks judge a noised clean estimate: `real`, the guided many-step model, and `fake`,
which learns what the generator draws at the moment. The generator goes where real lies from fake
(Yin et al., arXiv 2311.18828 and 2405.14867). States are the generator's own, on the deployed grid.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dopsd_jax.miniature import few_steps, optimizer
from dopsd_jax.miniature.families import Batch, Family
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.training import Loss, Stage

GENERATOR, FAKE = "generator.", "fake."
RATES = {GENERATOR: 4e-4, FAKE: 1e-3}
TEXTS, IMAGES = 16, 32
AVERAGE = 0.0  # an average of weights that are still on their way lags far behind
ALONE = 12  # steps in which the fake learns alone, until it knows what the generator draws
FAKE_LEVELS = 2  # noise levels at which the fake learns each estimate
LEAST, SHIFT = 0.02, 2.0  # of the judged noise levels
FLOOR = 0.02  # of a distance that is divided by


def stage(family: Family, few: Parameters, many: Parameters, steps: int) -> Stage:
    """The generator begins as the regressed model `few`, the fake as the many-step model."""
    begin = {GENERATOR + name: value for name, value in few.items()}
    begin |= {FAKE + name: value for name, value in many.items()}
    both, tx = loss(family, many), transform(steps)
    generator = lambda parameters: _part(GENERATOR, parameters)
    return Stage("matching", steps, both, tx, begin, TEXTS, IMAGES, generator, AVERAGE)


def transform(steps: int) -> optax.GradientTransformation:
    """The optimizer of a training of so many steps: Adam without momentum for both networks."""

    def adam(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.0, b2=0.99))

    def up_and_down(count):
        up, down = (count - ALONE) / ALONE, 2 * (1 - count / steps) + 0.05
        return RATES[GENERATOR] * jnp.clip(jnp.minimum(up, down), 0, 1)

    rates = {GENERATOR: adam(up_and_down), FAKE: adam(lambda _: RATES[FAKE])}
    owner = lambda parameters: {
        name: GENERATOR if name.startswith(GENERATOR) else FAKE for name in parameters
    }
    return optax.multi_transform(rates, owner)


def loss(family: Family, many: Parameters) -> Loss:
    """What both networks descend: the fake's flow matching, and for the generator a product whose
    gradient is the difference of the judges. `many`: the many-step model's weights."""
    module, grid = family.abstract(), jnp.asarray(family.grid, jnp.float32)

    def evaluate(parameters: Parameters, batch: Batch, keys: Array):
        keys = jax.vmap(lambda key: jax.random.split(key, 4 + FAKE_LEVELS))(keys)
        drop, draw, pick, judged, *learned = jnp.moveaxis(keys, 1, 0)
        of = lambda weights: few_steps.told(optimizer.merge(module, weights), batch, drop)
        own, fake = _part(GENERATOR, parameters), _part(FAKE, parameters)
        draws = of(own)

        noise = few_steps.normal(draw, batch.latents.shape[1:])
        states = jax.lax.stop_gradient(few_steps.path(draws, noise, family.grid))
        node = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(grid) - 1))(pick)
        x = states[node, jnp.arange(len(node))]
        estimate = x - few_steps.wide(grid[node]) * draws(x, grid[node])
        fixed = jax.lax.stop_gradient(estimate)

        knows = of(fake)
        error = lambda key: jnp.mean((knows(*key[:2]) - key[2]) ** 2)
        of_fake = sum(error(_renoised(fixed, key)) for key in learned) / FAKE_LEVELS

        noised, sigma, _ = _renoised(fixed, judged)
        real = few_steps.guided(optimizer.merge(module, many), batch, drop)
        wanted = noised - few_steps.wide(sigma) * real(noised, sigma)
        thought = noised - few_steps.wide(sigma) * of(jax.lax.stop_gradient(fake))(noised, sigma)
        distance = jnp.mean(jnp.abs(fixed - wanted), axis=(1, 2, 3), keepdims=True) + FLOOR
        away = jax.lax.stop_gradient((thought - wanted) / distance)
        return of_fake + jnp.mean(estimate * away)

    return evaluate


def _renoised(clean: Float[Array, "b h w c"], keys: Array):
    """Noised states, their noise levels, and the velocities there."""
    level, draw = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    u = jax.vmap(lambda key: jax.random.uniform(key, (), minval=LEAST, maxval=1 - LEAST))(level)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = few_steps.normal(draw, clean.shape[1:])
    s = few_steps.wide(sigma)
    return (1 - s) * clean + s * noise, sigma, noise - clean


def _part(prefix: str, parameters: Parameters) -> Parameters:
    return {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}
