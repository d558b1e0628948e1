"""Z-Image's work, counted from its architecture.

One multiply and add are two FLOP; only matrix products count.
"""

from collections.abc import Mapping

from dopsd_jax.adapters.attach import Slot
from dopsd_jax.families.work import Products, Work, adapter_work, add
from dopsd_jax.models.zimage_config import (
    PAD_MULTIPLE,
    TIME_FREQUENCIES,
    TIME_HIDDEN,
    ZImageConfig,
)


def image_tokens(cfg: ZImageConfig, height: int, width: int) -> int:
    """Tokens of a latent [height, width], with the network's own padding."""
    tokens = (height // cfg.patch) * (width // cfg.patch)
    return -(-tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def context_work(
    cfg: ZImageConfig, rows: int, chosen: Mapping[str, Slot], products: Products, full: bool = False
) -> Work:
    """`ZImage.refine` on `rows` caption rows: it depends on neither time nor state."""
    embedding = 2 * rows * cfg.caption_dim * cfg.dim
    return add(
        Work(trained=embedding) if full else Work(once=embedding),  # a trained norm is before it
        _blocks(cfg, "context_refiner", cfg.refiner_layers, rows, chosen, products, full),
    )


def velocity_work(
    cfg: ZImageConfig,
    height: int,
    width: int,
    rows: int,
    chosen: Mapping[str, Slot],
    products: Products,
    full: bool = False,
) -> Work:
    """One `ZImage.__call__` on a latent [height, width], its caption of `rows` rows refined."""
    tokens, real = image_tokens(cfg, height, width), height * width // cfg.patch**2
    pixels, mod = cfg.patch**2 * cfg.channels, cfg.modulation_dim
    layers = cfg.refiner_layers + cfg.layers
    inputs = 2 * (real * pixels * cfg.dim + TIME_FREQUENCIES * TIME_HIDDEN)
    time = 2 * (TIME_HIDDEN * mod + mod * cfg.dim * (4 * layers + 1))
    final = 2 * (tokens + rows) * cfg.dim * pixels
    ends = Work(linear=inputs, trained=time + final)
    return add(
        ends if full else Work(once=inputs + time, linear=final),
        _blocks(cfg, "noise_refiner", cfg.refiner_layers, tokens, chosen, products, full),
        _blocks(cfg, "layers", cfg.layers, tokens + rows, chosen, products, full),
    )


def _blocks(
    cfg, where: str, layers: int, tokens: int, chosen, products: Products, full: bool
) -> Work:
    weights = 4 * cfg.dim**2 + 3 * cfg.dim * cfg.hidden_dim
    linear, attention = 2 * tokens * layers * weights, 4 * tokens**2 * cfg.dim * layers
    if full:
        return Work(attention=attention, trained=linear)
    slots = [slot for slot in chosen.values() if slot.dense.startswith(f"{where}.")]
    if not slots and where != "layers":
        # A refiner that is not adapted stands before all others.
        return Work(once=linear + attention)
    adapters = tokens * adapter_work(slots, products)
    return Work(linear=linear, attention=attention, trained=adapters)
