"""Sizes of the KL autoencoder, read from a checkpoint's config.json."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dopsd_jax.common.json_fields import MAX_LAYERS, Fields, in_json

DOWN_BLOCK, UP_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"

# Fields later than the class: files without them mean these values (diffusers' signature).
ABSENT_MEANS = {
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
IGNORED = ("force_upcast",)  # the type that a pipeline runs it in: nothing about the network


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """What the network is; the fields are named as in the file."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int = 1024  # pixels a side, of the pictures that the model was made for

    @property
    def factor(self) -> int:
        """Image side over latent side."""
        return self.stride

    @property
    def stride(self) -> int:
        """Image side over the side of z, what the decoder takes."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "AutoencoderConfig":
        """Reads a config.json; `where` names it in errors.

        Raises `UserError` with every missing, malformed or unsupported field.
        """
        fields = Fields(config, where)
        fields.only("_class_name", "AutoencoderKL")
        own = {"scaling_factor": fields.positive("scaling_factor"), "shift_factor": _shift(fields)}
        return cls.read(fields, own, ())

    @classmethod
    def read(cls, fields: Fields, own: Mapping[str, Any], known: Sequence[str]):
        """What all autoencoders of this kind have, beside a class's `own` fields.

        `known`: further names that may be in the file.
        """
        fields.only("act_fn", "silu", "swish", required=True)
        widths = fields.counts("block_out_channels")
        if fields.json.get("block_out_channels") == []:
            fields.problem("field block_out_channels is empty; it must have a width for each level")
        for name, block in (("down_block_types", DOWN_BLOCK), ("up_block_types", UP_BLOCK)):
            _check_blocks(fields, name, block, len(widths))
        groups = fields.count("norm_num_groups")
        for width in widths:
            if groups and width % groups:
                fields.problem(f"field norm_num_groups is {groups}, which does not divide {width}")
        cfg = cls(
            block_out_channels=widths,
            norm_num_groups=groups,
            in_channels=fields.count("in_channels"),
            out_channels=fields.count("out_channels"),
            layers_per_block=fields.count("layers_per_block", most=MAX_LAYERS),
            latent_channels=fields.count("latent_channels"),
            sample_size=fields.count("sample_size", default=cls.sample_size),
            **{name: _flag(fields, name) for name in ABSENT_MEANS},
            **own,
        )
        _check_unknown(fields, known)
        fields.finish()
        return cfg


def _check_blocks(fields: Fields, name: str, block: str, levels: int) -> None:
    kinds = fields.require(name, "a list of block types")
    if kinds is None:
        return
    if not isinstance(kinds, list | tuple):
        return fields.problem(f"field {name} is {in_json(kinds)}; it must be a list of block types")
    others = sorted({str(kind) for kind in kinds if kind != block})
    if others:
        fields.problem(f"field {name} has {', '.join(others)}; only {block} is supported")
    if levels and len(kinds) != levels:
        fields.problem(f"field {name} has {len(kinds)} levels, block_out_channels has {levels}")


def _shift(fields: Fields) -> float:
    """The shift of the latents; null, or none in older files, means no shift."""
    value = fields.json.get("shift_factor")
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        fields.problem(f"field shift_factor is {in_json(value)}; it must be a number or null")
        return 0.0
    return float(value)


def _flag(fields: Fields, name: str) -> bool:
    value = fields.json.get(name, ABSENT_MEANS[name])
    if not isinstance(value, bool):
        fields.problem(f"field {name} is {in_json(value)}; it must be true or false")
    return bool(value)


def _check_unknown(fields: Fields, own: Sequence[str]) -> None:
    """A field this reader does not know may change what the network computes, unless it is null."""
    known = {field.name for field in dataclasses.fields(AutoencoderConfig)}
    known |= {"down_block_types", "up_block_types", "act_fn", *IGNORED, *own}
    for name, value in fields.json.items():
        if name not in known and not name.startswith("_") and value is not None:
            fields.problem(f"field {name} is {in_json(value)}; it is not supported, only null is")
