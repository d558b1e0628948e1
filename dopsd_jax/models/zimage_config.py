"""Sizes of Z-Image's transformer, read from config.json, and the names of its tensors."""

import dataclasses
import math
from collections.abc import Mapping

from dopsd_jax.common.json_fields import MAX_LAYERS, Fields, in_json
from dopsd_jax.models.names import Leaf, linear, vector

MODULATION_DIM = 256  # ADALN_EMBED_DIM; narrower models use their own width
TIME_HIDDEN = 1024
TIME_FREQUENCIES = 256
PAD_MULTIPLE = 32  # SEQ_MULTI_OF: image and caption are each padded to it, with learned tokens
MAX_POSITIONS = 1 << 16  # of an axis of the rotary tables


@dataclasses.dataclass(frozen=True)
class ZImageConfig:
    """Architecture; the fields of transformer/config.json under our names."""

    dim: int = 3840
    layers: int = 30
    refiner_layers: int = 2
    heads: int = 30
    channels: int = 16
    patch: int = 2
    caption_dim: int = 2560
    norm_eps: float = 1e-5
    qk_norm: bool = True
    rope_theta: float = 256.0
    time_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def hidden_dim(self) -> int:
        return int(self.dim / 3 * 8)  # diffusers' own expression: float division, then truncation

    @property
    def token_multiple(self) -> int:
        """What the numbers of image and of caption tokens are multiples of."""
        return PAD_MULTIPLE

    @property
    def groups(self) -> int:
        """Most devices that heads and hidden units can both be spread over; see `layers.Dense`."""
        return math.gcd(self.heads, self.hidden_dim)

    @property
    def modulation_dim(self) -> int:
        return min(self.dim, MODULATION_DIM)

    @property
    def max_caption(self) -> int:
        """Most caption tokens, padding included: image tokens stand at the next position."""
        return (self.axes_lens[0] - 2) // PAD_MULTIPLE * PAD_MULTIPLE

    @classmethod
    def from_dict(cls, config: Mapping, where: str) -> "ZImageConfig":
        """Reads transformer/config.json, named `where`. Raises `UserError` with every fault."""
        fields = Fields(config, where)
        # diffusers ignores n_kv_heads; the class has no grouped heads.
        patches = fields.counts("all_patch_size")
        if fields.counts("all_f_patch_size") != (1,) or len(patches) != 1:
            given = (
                f"{name} {in_json(fields.json.get(name))}"
                for name in ("all_patch_size", "all_f_patch_size")
            )
            fields.problem(f"{' and '.join(given)}: supported are one patch size and frame patch 1")
        if fields.json.get("siglip_feat_dim") is not None:
            fields.problem("siglip_feat_dim is set: Z-Image-Omni checkpoints are not supported")
        dim, heads = fields.count("dim"), fields.count("n_heads")
        axes_dims = fields.counts("axes_dims", 3, least=2)
        if dim and heads and axes_dims and (dim % heads or dim // heads != sum(axes_dims)):
            fields.problem(
                f"dim {dim} / n_heads {heads} is not the sum of axes_dims {list(axes_dims)}"
            )
        if any(a % 2 for a in axes_dims):
            fields.problem("axes_dims must be even")
        self = cls(
            dim=dim,
            layers=fields.count("n_layers", most=MAX_LAYERS),
            refiner_layers=fields.count("n_refiner_layers", most=MAX_LAYERS),
            heads=heads,
            channels=fields.count("in_channels"),
            caption_dim=fields.count("cap_feat_dim"),
            norm_eps=fields.positive("norm_eps"),
            qk_norm=fields.flag("qk_norm"),
            rope_theta=fields.positive("rope_theta"),
            time_scale=fields.positive("t_scale"),
            axes_dims=axes_dims,
            axes_lens=fields.counts("axes_lens", 3, most=MAX_POSITIONS),
            patch=patches[0] if patches else 0,
        )
        fields.finish()
        return self

    def to_dict(self) -> dict:
        """The same as transformer/config.json holds it."""
        return {
            "_class_name": "ZImageTransformer2DModel",
            "all_f_patch_size": [1],
            "all_patch_size": [self.patch],
            "axes_dims": list(self.axes_dims),
            "axes_lens": list(self.axes_lens),
            "cap_feat_dim": self.caption_dim,
            "dim": self.dim,
            "in_channels": self.channels,
            "n_heads": self.heads,
            "n_kv_heads": self.heads,
            "n_layers": self.layers,
            "n_refiner_layers": self.refiner_layers,
            "norm_eps": self.norm_eps,
            "qk_norm": self.qk_norm,
            "rope_theta": self.rope_theta,
            "t_scale": self.time_scale,
        }


def names(cfg: ZImageConfig) -> list[Leaf]:
    """Every tensor of the diffusers checkpoint and where it goes."""
    d, hidden, mod, size = cfg.dim, cfg.hidden_dim, cfg.modulation_dim, f"{cfg.patch}-1"
    pixels = cfg.patch**2 * cfg.channels

    def dense(path, module, dout, din):
        return [
            linear(f"{path}.kernel", None, (module, dout, din)),
            vector(f"{path}.bias", None, f"{module}.bias", dout),
        ]

    def block(where, i, modulated):
        torch, a, f = f"{where}.{i}", f"{where}.attention", f"{where}.feed_forward"
        ta, tf = f"{torch}.attention", f"{torch}.feed_forward"
        qkv = ((f"{ta}.to_{n}", d, d) for n in "qkv")
        yield linear(f"{a}.qkv.kernel", i, *qkv, groups=cfg.groups)
        yield linear(f"{a}.out.kernel", i, (f"{ta}.to_out.0", d, d))
        if cfg.qk_norm:
            yield vector(f"{a}.q_norm.scale", i, f"{ta}.norm_q.weight", cfg.head_dim)
            yield vector(f"{a}.k_norm.scale", i, f"{ta}.norm_k.weight", cfg.head_dim)
        w13 = ((f"{tf}.w{n}", hidden, d) for n in (1, 3))
        yield linear(f"{f}.w13.kernel", i, *w13, groups=cfg.groups)
        yield linear(f"{f}.w2.kernel", i, (f"{tf}.w2", d, hidden))
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            yield vector(f"{where}.{norm}.scale", i, f"{torch}.{norm}.weight", d)
        if modulated:
            yield linear(
                f"{where}.modulation.kernel", i, (f"{torch}.adaLN_modulation.0", 4 * d, mod)
            )
            yield vector(f"{where}.modulation.bias", i, f"{torch}.adaLN_modulation.0.bias", 4 * d)

    leaves = [
        *dense("x_embedder", f"all_x_embedder.{size}", d, pixels),
        vector("caption_norm.scale", None, "cap_embedder.0.weight", cfg.caption_dim),
        *dense("caption_embedder", "cap_embedder.1", d, cfg.caption_dim),
        *dense("time_in", "t_embedder.mlp.0", TIME_HIDDEN, TIME_FREQUENCIES),
        *dense("time_out", "t_embedder.mlp.2", mod, TIME_HIDDEN),
        vector("x_pad_token", None, "x_pad_token", 1, d),
        vector("caption_pad_token", None, "cap_pad_token", 1, d),
        *dense("final_linear", f"all_final_layer.{size}.linear", pixels, d),
        *dense("final_modulation", f"all_final_layer.{size}.adaLN_modulation.1", d, mod),
    ]
    for where, count in (
        ("noise_refiner", cfg.refiner_layers),
        ("context_refiner", cfg.refiner_layers),
        ("layers", cfg.layers),
    ):
        for i in range(count):
            leaves += block(where, i, where != "context_refiner")
    return leaves
