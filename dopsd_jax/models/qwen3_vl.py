"""Qwen3-VL: vision tower and language model, read out as hidden states.

The language model is an argument, so another `Qwen3` of the same sizes can replace Qwen3-VL's own:
D-OPSD makes the teacher's context with the diffusion model's text encoder.
Dimension names: b batch, n tokens, p patches, m image tokens, d width, r half a head.
Facts: transformers 5.23 (`Qwen3VLModel`) and the published checkpoint.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dopsd_jax.common.json_fields import Fields
from dopsd_jax.models import qwen3, qwen3_vl_vision
from dopsd_jax.models.names import Leaf, Source
from dopsd_jax.models.qwen3 import Qwen3, Qwen3Config, inverse_frequencies, read_language_fields
from dopsd_jax.models.qwen3_vl_vision import Qwen3VLVision, Qwen3VLVisionConfig, read_vision_fields

AXES = 3  # temporal, row, column


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """Settings of the whole model, as in its config.json.

    Attributes:
      mrope_sections: how many frequencies turn with the temporal, row and column position.
    """

    text: Qwen3Config
    vision: Qwen3VLVisionConfig
    mrope_sections: tuple[int, int, int]
    image_token_id: int

    @classmethod
    def from_dict(cls, json_dict: Any, where: str) -> "Qwen3VLConfig":
        """Reads config.json; `where` names the file in errors.

        Raises `UserError` with every missing or unsupported field.
        """
        fields = Fields(json_dict, where)
        fields.only("model_type", "qwen3_vl", required=True)
        image_token_id = fields.count("image_token_id")
        inner = fields.part("text_config")
        inner.only("model_type", "qwen3_vl_text", required=True)
        # transformers ties by the outer flag; its class default is false.
        tied = fields.json.get("tie_word_embeddings", False)
        text, rope = read_language_fields(inner, tied)
        sections = _read_mrope(inner, rope, text.head_dim)
        vision = read_vision_fields(fields.part("vision_config"))
        sizes = (vision.out_hidden_size, text.hidden_size)
        if all(sizes) and sizes[0] != sizes[1]:
            fields.problem(
                f"vision_config.out_hidden_size is {vision.out_hidden_size}, but "
                f"text_config.hidden_size is {text.hidden_size}; they must be equal"
            )
        if text.num_layers and len(vision.deepstack) > text.num_layers:
            fields.problem(
                f"vision_config.deepstack_visual_indexes has {len(vision.deepstack)} entries, but "
                f"the language model has {text.num_layers} layers"
            )
        if text.vocab_size and image_token_id >= text.vocab_size:
            fields.problem(
                f"field image_token_id is {image_token_id}; "
                f"it must be below vocab_size, {text.vocab_size}"
            )
        fields.finish()
        return cls(text, vision, sections, image_token_id)

    def accept_language(self, language: Qwen3Config, where: str) -> None:
        """Raises `UserError` unless a model of these sizes, from `where`, fits the vision tower."""
        fields = Fields({}, where)
        for name in ("hidden_size", "head_dim"):
            ours, theirs = getattr(self.text, name), getattr(language, name)
            if ours != theirs:
                fields.problem(
                    f"{name} is {theirs}, but the vision-language model needs {ours}; "
                    "use a text encoder of the same width"
                )
        if language.num_layers < len(self.vision.deepstack):
            fields.problem(
                f"{language.num_layers} layers are fewer than the vision-language model's "
                f"{len(self.vision.deepstack)} deepstack levels"
            )
        if language.vocab_size <= self.image_token_id:
            fields.problem(
                f"vocab_size {language.vocab_size} does not reach the image token, "
                f"{self.image_token_id}"
            )
        fields.finish()


def _read_mrope(fields: Fields, rope: Any, head_dim: int) -> tuple[int, int, int]:
    inner = Fields(rope, f"{fields.where}: rope settings")
    inner.problems = fields.problems
    inner.only("rope_type", "default")
    inner.only("type", "default")
    inner.only("mrope_interleaved", True, required=True)
    sections = inner.counts("mrope_section", AXES)
    if not sections or not head_dim:
        return sections
    counts = np.bincount(_mrope_axes(head_dim // 2, sections), minlength=AXES)
    if tuple(counts) != sections:
        inner.problem(
            f"field mrope_section is {list(sections)}, but head_dim {head_dim} interleaves as "
            f"{list(map(int, counts))}; the sections must agree with head_dim"
        )
    return sections


def names(cfg: Qwen3VLConfig) -> list[Leaf]:
    """Every parameter of `Qwen3VL` and the tensors it is made of."""
    language = qwen3.names(cfg.text, "model.language_model.")
    vision = qwen3_vl_vision.names(cfg.vision, "model.visual.")
    under = lambda room, leaves: [dataclasses.replace(x, path=f"{room}.{x.path}") for x in leaves]
    return under("vision", vision) + under("language", language)


def unused(cfg: Qwen3VLConfig) -> list[Source]:
    """Tensors that a checkpoint may hold and features do not need: the head."""
    return qwen3.unused(cfg.text)


def mrope_positions(
    image: Bool[Array, "b n"], lengths: Int[Array, " b"], grid: tuple[int, int]
) -> Int[Array, "3 b n"]:
    """Temporal, row and column position of each token.

    `image` marks the image tokens, one run a sample; `grid` is the merged grid (rows, columns). An
    image at position s has (s, s + row, s + column); the next text token has s + max(grid).
    """
    rows, columns = grid
    index = jnp.broadcast_to(jnp.arange(image.shape[1]), image.shape)
    start = jnp.argmax(image, axis=1)[:, None]
    inside = index - start
    after = index - rows * columns + max(rows, columns)
    text = jnp.where(inside < 0, index, after)
    patch = jnp.stack([jnp.zeros_like(inside), inside // columns, inside % columns])
    positions = jnp.where(image, start + patch, text)
    return jnp.where(index < lengths[:, None], positions, 0)  # padding stands at 0


def mrope(
    positions: Int[Array, "3 b n"], head_dim: int, theta: float, sections: tuple[int, int, int]
) -> tuple[Float[Array, "b n r"], Float[Array, "b n r"]]:
    """Cosines and sines of the interleaved three-axis rotary embedding, in float32.

    Frequency i belongs to axis i mod 3 while that axis has frequencies left, else to time.
    """
    axes = _mrope_axes(head_dim // 2, sections)
    angles = jnp.moveaxis(positions, 0, -1)[..., axes] * inverse_frequencies(head_dim, theta)
    return jnp.cos(angles), jnp.sin(angles)


def _mrope_axes(frequencies: int, sections: tuple[int, int, int]) -> np.ndarray:
    i = np.arange(frequencies)
    return np.where(i < AXES * np.asarray(sections)[i % AXES], i % AXES, 0)


class Embedded(NamedTuple):
    """What enters the language model: embeddings, rotary tables, what is added to first layers."""

    x: Float[Array, "b n d"]
    cos: Float[Array, "b n r"]
    sin: Float[Array, "b n r"]
    deepstack: list[Float[Array, "b n d"]]


def embed(
    vision: Qwen3VLVision,
    language: Qwen3,
    cfg: Qwen3VLConfig,
    ids: Int[Array, "b n"],
    lengths: Int[Array, " b"],
    patches: Float[Array, "b p c"],
    grid: tuple[int, int],
    *,
    dtype: Any = jnp.float32,
) -> Embedded:
    """Texts with one image each, as the language model is given them; arguments: see `encode`."""
    features, deepstack = vision(patches, grid, dtype=dtype)
    image = ids == cfg.image_token_id
    # The k-th image token takes the k-th feature.
    order = jnp.maximum(jnp.cumsum(image, axis=1) - 1, 0)
    spread = lambda f: jnp.take_along_axis(f, order[..., None], axis=1, mode="clip")
    x = jnp.where(image[..., None], spread(features), language.embed(ids, dtype))
    merge = cfg.vision.merge_size
    positions = mrope_positions(image, lengths, (grid[0] // merge, grid[1] // merge))
    cos, sin = mrope(positions, cfg.text.head_dim, cfg.text.rope_theta, cfg.mrope_sections)
    return Embedded(x, cos, sin, [jnp.where(image[..., None], spread(f), 0) for f in deepstack])


def encode(
    vision: Qwen3VLVision,
    language: Qwen3,
    cfg: Qwen3VLConfig,
    ids: Int[Array, "b n"],
    lengths: Int[Array, " b"],
    patches: Float[Array, "b p c"],
    grid: tuple[int, int],
    *,
    hidden: tuple[int, ...],
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, "b n d"], ...]:
    """Hidden states (numbered as in `Qwen3`) of texts with one image each.

    `ids` are padded on the right and hold exactly `cfg.vision.image_tokens(grid)` image tokens in
    one run per sample; `grid` is (patch rows, patch columns). Rotary settings are those of `cfg`
    whichever language model is given; see `Qwen3VLConfig.accept_language`.
    """
    x, cos, sin, deepstack = embed(vision, language, cfg, ids, lengths, patches, grid, dtype=dtype)
    return language.hidden_states(x, lengths, cos, sin, hidden=hidden, deepstack=deepstack)


class Qwen3VL(nnx.Module):
    """Vision tower and Qwen3-VL's own language model."""

    def __init__(
        self,
        cfg: Qwen3VLConfig,
        *,
        attention: str = "xla",
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.cfg = cfg
        self.vision = Qwen3VLVision(cfg.vision, attention=attention, remat=remat, rngs=rngs)
        self.language = Qwen3(cfg.text, attention=attention, remat=remat, rngs=rngs)

    def __call__(
        self, ids, lengths, patches, grid, *, hidden: tuple[int, ...], dtype: Any = jnp.float32
    ) -> tuple[Float[Array, "b n d"], ...]:
        """See `encode`."""
        return encode(
            self.vision,
            self.language,
            self.cfg,
            ids,
            lengths,
            patches,
            grid,
            hidden=hidden,
            dtype=dtype,
        )
