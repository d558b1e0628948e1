"""Names of weight types, attention kernels and the like, for configurations: imports no JAX."""

import importlib.util

from dopsd_jax.common.errors import UserError

WHOLE = ("bfloat16", "float32")
ACTIVATIONS = (*WHOLE, "float16")
QUANTISED = ("int8", "fp8", "nf4")  # schemes of `models.quantised`
AUTO = "auto"  # of attention and remat: chosen at the start
UNROLLED = "unrolled"  # remat: nothing is computed again, and no loop over the layers
ATTENTION = ("xla", "cudnn", "splash")  # kernels of `models.attention`
# Of programs that only draw: their option --base_dtype.
DRAWN_BASES = (AUTO, *WHOLE, *QUANTISED)
DRAWN_HELP = (
    "type of the transformer's weights; auto: bfloat16 with activations in bfloat16, else as "
    "stored; int8, fp8, nf4 take less memory (extra quant)"
)


def activations(dtype: str) -> str:
    """The name of a type of activations. Raises `UserError` for another name."""
    if dtype not in ACTIVATIONS:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(ACTIVATIONS)}")
    return dtype


def drawn_base(asked: str, dtype: str) -> str | None:
    """The base that one of `DRAWN_BASES` means with activations of `dtype`; None: as stored.

    Published weights may be float32, twice what activations in bfloat16 can use.
    """
    if asked != AUTO:
        return asked
    return "bfloat16" if dtype == "bfloat16" else None


def quantised_faults() -> list[str]:
    """Why nothing can be quantised here, as lines for a `UserError`."""
    if importlib.util.find_spec("qwix") is not None:
        return []
    return [
        f"config.base_dtype: {', '.join(QUANTISED)} need the library qwix, which this Python does "
        "not have; pip install 'dopsd_jax[quant]' (or qwix), or set it to bfloat16"
    ]
