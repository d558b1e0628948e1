"""Sizes of FLUX.2's transformer, read from config.json, and the names of its tensors."""

import dataclasses
import math
from collections.abc import Mapping

from dopsd_jax.common.json_fields import MAX_LAYERS, Fields
from dopsd_jax.models.names import Leaf, linear, vector

TEXT_ROWS = 512  # tokens of every text: the padding is kept and seen
ROWS_FIELD = "max_sequence_length"  # of a model made for texts of fewer; diffusers' own argument


@dataclasses.dataclass(frozen=True)
class Flux2Config:
    """Architecture; the fields of transformer/config.json under our names."""

    heads: int = 24
    head_dim: int = 128
    double_layers: int = 5
    single_layers: int = 20
    channels: int = 128
    text_dim: int = 7680
    mlp_ratio: float = 3.0
    axes_dims: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    eps: float = 1e-6
    time_frequencies: int = 256
    text_rows: int = TEXT_ROWS

    patch = 1  # the autoencoder folds 2 x 2 cells into channels

    @property
    def token_multiple(self) -> int:
        """Of the text's tokens; the image's are padded where they do not divide."""
        return self.text_rows

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)

    @property
    def groups(self) -> int:
        """Most devices that heads and hidden units can both be spread over; see `layers.Dense`."""
        return math.gcd(self.heads, self.hidden_dim)

    @classmethod
    def from_dict(cls, config: Mapping, where: str) -> "Flux2Config":
        """Reads transformer/config.json, named `where`. Raises `UserError` with every fault."""
        fields = Fields(config, where)
        fields.only("_class_name", "Flux2Transformer2DModel")
        fields.only("guidance_embeds", False, required=True)
        fields.only("patch_size", 1, None)
        channels = fields.count("in_channels")
        fields.only("out_channels", None, channels)
        head_dim, axes_dims = fields.count("attention_head_dim"), fields.counts("axes_dims_rope", 4)
        if head_dim and axes_dims and (sum(axes_dims) != head_dim or any(a % 2 for a in axes_dims)):
            fields.problem(
                f"axes_dims_rope {list(axes_dims)} must be even and add up to attention_head_dim, "
                f"{head_dim}"
            )
        self = cls(
            heads=fields.count("num_attention_heads"),
            head_dim=head_dim,
            double_layers=fields.count("num_layers", most=MAX_LAYERS),
            single_layers=fields.count("num_single_layers", most=MAX_LAYERS),
            channels=channels,
            text_dim=fields.count("joint_attention_dim"),
            mlp_ratio=fields.positive("mlp_ratio"),
            axes_dims=axes_dims,
            rope_theta=fields.positive("rope_theta"),
            eps=fields.positive("eps"),
            time_frequencies=fields.count("timestep_guidance_channels"),
            text_rows=fields.count(ROWS_FIELD, default=TEXT_ROWS, most=TEXT_ROWS),
        )
        fields.finish()
        return self

    def to_dict(self) -> dict:
        """The same as transformer/config.json holds it."""
        fewer = {} if self.text_rows == TEXT_ROWS else {ROWS_FIELD: self.text_rows}
        return fewer | {
            "_class_name": "Flux2Transformer2DModel",
            "attention_head_dim": self.head_dim,
            "axes_dims_rope": list(self.axes_dims),
            "eps": self.eps,
            "guidance_embeds": False,
            "in_channels": self.channels,
            "joint_attention_dim": self.text_dim,
            "mlp_ratio": self.mlp_ratio,
            "num_attention_heads": self.heads,
            "num_layers": self.double_layers,
            "num_single_layers": self.single_layers,
            "out_channels": None,
            "patch_size": 1,
            "rope_theta": self.rope_theta,
            "timestep_guidance_channels": self.time_frequencies,
        }


def names(cfg: Flux2Config) -> list[Leaf]:
    """Every tensor of the diffusers checkpoint and where it goes."""
    d, hidden = cfg.dim, cfg.hidden_dim

    def stream(i, path, attn, parts, norms, out, feed_forward):
        theirs = f"transformer_blocks.{i}"
        qkv = ((f"{theirs}.attn.{part}", d, d) for part in parts)
        yield linear(f"{path}.qkv.kernel", i, *qkv, groups=cfg.groups)
        yield linear(f"{path}.out.kernel", i, (f"{theirs}.attn.{out}", d, d))
        for ours, norm in zip(("q_norm", "k_norm"), norms, strict=True):
            yield vector(f"{path}.{ours}.scale", i, f"{theirs}.attn.{norm}.weight", cfg.head_dim)
        ff = f"{theirs}.{feed_forward}"
        w_in, halves = (f"{ff}.linear_in", 2 * hidden, d), (hidden, hidden)
        yield linear(f"{path}.w_in.kernel", i, w_in, groups=cfg.groups, outputs=halves)
        yield linear(f"{path}.w_out.kernel", i, (f"{ff}.linear_out", d, hidden))

    def single(i):
        theirs = f"single_transformer_blocks.{i}.attn"
        w_in, w_out = f"{theirs}.to_qkv_mlp_proj", f"{theirs}.to_out"
        outputs, inputs = (d, d, d, hidden, hidden), (d, hidden)
        into, out = (w_in, sum(outputs), d), (w_out, d, sum(inputs))
        yield linear("single.w_in.kernel", i, into, groups=cfg.groups, outputs=outputs)
        yield linear("single.w_out.kernel", i, out, groups=cfg.groups, inputs=inputs)
        yield vector("single.q_norm.scale", i, f"{theirs}.norm_q.weight", cfg.head_dim)
        yield vector("single.k_norm.scale", i, f"{theirs}.norm_k.weight", cfg.head_dim)

    time = "time_guidance_embed.timestep_embedder"
    ends = (
        ("x_embedder", "x_embedder", d, cfg.channels),
        ("text_embedder", "context_embedder", d, cfg.text_dim),
        ("time_in", f"{time}.linear_1", d, cfg.time_frequencies),
        ("time_out", f"{time}.linear_2", d, d),
        ("image_modulation", "double_stream_modulation_img.linear", 6 * d, d),
        ("text_modulation", "double_stream_modulation_txt.linear", 6 * d, d),
        ("single_modulation", "single_stream_modulation.linear", 3 * d, d),
        ("final_modulation", "norm_out.linear", 2 * d, d),
        ("final_linear", "proj_out", cfg.channels, d),
    )
    leaves = [linear(f"{path}.kernel", None, (name, out, din)) for path, name, out, din in ends]
    for i in range(cfg.double_layers):
        leaves += stream(
            i, "double.image", "attn", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0",
            "ff",
        )  # fmt: skip
        leaves += stream(
            i, "double.text", "attn", ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"), "to_add_out", "ff_context",
        )  # fmt: skip
    for i in range(cfg.single_layers):
        leaves += single(i)
    return leaves
