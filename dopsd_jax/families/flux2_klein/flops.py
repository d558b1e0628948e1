"""FLUX.2-klein's work, counted from its architecture; see `families.zimage.flops` for the rules."""

from collections.abc import Mapping

from dopsd_jax.adapters.attach import Slot
from dopsd_jax.families.work import Products, Work, adapter_work, add
from dopsd_jax.models.flux2_config import Flux2Config


def image_tokens(cfg: Flux2Config, height: int, width: int) -> int:
    """Tokens of a latent [height, width]: one a cell."""
    return height * width


def context_work(
    cfg: Flux2Config, rows: int, chosen: Mapping[str, Slot], products: Products, full: bool = False
) -> Work:
    """`Flux2.embed` of a text, and of references with the other `rows`."""
    work = 2 * cfg.dim * (cfg.text_rows * cfg.text_dim + (rows - cfg.text_rows) * cfg.channels)
    return Work(linear=work) if full else Work(once=work)


def velocity_work(
    cfg: Flux2Config,
    height: int,
    width: int,
    rows: int,
    chosen: Mapping[str, Slot],
    products: Products,
    full: bool = False,
) -> Work:
    """One `Flux2.__call__` on a latent [height, width], its context of `rows` rows embedded."""
    cells, d = height * width, cfg.dim
    inputs = 2 * (cells * cfg.channels * d + cfg.time_frequencies * d)
    time = 2 * (d**2 + d * (6 + 6 + 3 + 2) * d)
    final = 2 * cells * d * cfg.channels
    ends = Work(linear=inputs, trained=time + final)
    return add(
        ends if full else Work(once=inputs + time, linear=final),
        _blocks(cfg, cells + rows, chosen, products, full),
    )


def _blocks(cfg: Flux2Config, tokens: int, chosen, products: Products, full: bool) -> Work:
    layers = cfg.double_layers + cfg.single_layers  # a token meets as many weights in both kinds
    weights = 4 * cfg.dim**2 + 3 * cfg.dim * cfg.hidden_dim
    linear, attention = 2 * tokens * layers * weights, 4 * tokens**2 * cfg.dim * layers
    if full:
        return Work(attention=attention, trained=linear)
    slots = {"text": [], "image": [], "both": []}
    for slot in chosen.values():
        kind = slot.dense.split(".")[1] if slot.dense.startswith("double.") else "both"
        slots[kind].append(slot)
    seen = {"text": cfg.text_rows, "image": tokens - cfg.text_rows, "both": tokens}
    adapters = sum(seen[kind] * adapter_work(own, products) for kind, own in slots.items())
    return Work(linear=linear, attention=attention, trained=adapters)
