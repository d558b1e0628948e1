"""The autoencoder as in FLUX.1's ae.safetensors: the names of the original LDM code.

The tensors are diffusers', except for the attention's linear weights, which LDM holds as 1x1
convolutions. LDM counts the decoder's levels from the output side.
"""

import re
from collections.abc import Sequence

from dopsd_jax.models.names import Leaf, Source
from dopsd_jax.weights.layouts import Entry, Layout
from dopsd_jax.weights.validation import sources

ORIGINAL = "ldm"

# diffusers -> LDM, on the whole name; {level} is the decoder's level turned round.
BOTH, MID = r"(encoder|decoder)", r"(encoder|decoder)\.mid_block"
RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"{MID}\.resnets\.0\.(.*)", r"\1.mid.block_1.\2"),
        (rf"{MID}\.resnets\.1\.(.*)", r"\1.mid.block_2.\2"),
        (rf"{MID}\.attentions\.0\.group_norm\.(.*)", r"\1.mid.attn_1.norm.\2"),
        (rf"{MID}\.attentions\.0\.to_([qkv])\.(.*)", r"\1.mid.attn_1.\2.\3"),
        (rf"{MID}\.attentions\.0\.to_out\.0\.(.*)", r"\1.mid.attn_1.proj_out.\2"),
        (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(.*)", r"encoder.down.\1.block.\2.\3"),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.*)", r"encoder.down.\1.downsample.\2"),
        (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(.*)", r"decoder.up.{level}.block.\2.\3"),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.*)", r"decoder.up.{level}.upsample.\2"),
        (rf"{BOTH}\.conv_norm_out\.(.*)", r"\1.norm_out.\2"),
        (rf"{BOTH}\.conv_(in|out)\.(.*)", r"\1.conv_\2.\3"),
        (r"(post_)?quant_conv\.(.*)", r"\g<0>"),
    )
)


def original_name(name: str, levels: int) -> str:
    """LDM's name of a tensor of an autoencoder with so many levels."""
    for pattern, replacement in RULES:
        match = pattern.fullmatch(name)
        if match:
            if "{level}" in replacement:
                replacement = replacement.replace("{level}", str(levels - 1 - int(match[1])))
            return match.expand(replacement).replace(".conv_shortcut.", ".nin_shortcut.")
    raise ValueError(f"{name}: no rule for this name")


def original(leaves: Sequence[Leaf], levels: int) -> Layout:
    """LDM's layout of an autoencoder whose diffusers names are `leaves`."""
    entries = []
    for name, shape in sources(leaves).items():
        theirs = original_name(name, levels)
        unit_axes = (1, 1) if ".attn_1." in theirs and len(shape) == 2 else ()
        entries.append(Entry(theirs, (Source(name, shape),), shape + unit_axes))
    return Layout(ORIGINAL, tuple(entries))
