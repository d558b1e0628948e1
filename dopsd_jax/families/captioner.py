"""Captions of pictures by Qwen3-VL: the vision-language model of Z-Image's teacher, whole.

The teacher needs the vision tower alone; here the model's own language model answers.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.json_files import read_json
from dopsd_jax.families.zimage.networks import VLM
from dopsd_jax.families.zimage.templates import teacher_text
from dopsd_jax.models import decoding, qwen3_vl, vlm_images
from dopsd_jax.weights.load import load_stored
from dopsd_jax.weights.stored import open_stored
from dopsd_jax.weights.tensors import check_finite
from dopsd_jax.weights.tokenizers import read_tokenizer

STOPS = ("<|im_end|>", "<|endoftext|>")  # as in the published generation_config.json
HEAD = "lm_head.weight"
# The cache is made for a multiple of so many tokens: sizes of pictures share one decoding loop.
ROOM_MULTIPLE = 256


@dataclass(frozen=True)
class Settings:
    """How captions are written.

    Attributes:
      instruction: what the model is told to do with the picture.
      max_tokens: the longest answer.
      temperature: of drawing the tokens; 0: the most likely ones.
      top_p: see `decoding.Sampling`.
      seed: of drawing.
      max_pixels: the largest area that the model is shown.
    """

    instruction: str
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_pixels: int = 768**2


class Captioner:
    """A Qwen3-VL folder that answers one instruction about pictures. Raises `UserError`.

    folder: in Hugging Face layout, or converted. dtype: type of activations and of the cache.
    """

    def __init__(self, folder: Path, settings: Settings, dtype: str = "float32"):
        self.settings, self.dtype = settings, jnp.dtype(dtype)
        path = folder / "preprocessor_config.json"
        images = vlm_images.ImageSettings.from_dict(read_json(path)[0], str(path))
        low, high = min(images.min_pixels, settings.max_pixels), settings.max_pixels
        self.images = replace(images, min_pixels=low, max_pixels=high)
        self.stored = open_stored(folder, VLM)
        self.config: qwen3_vl.Qwen3VLConfig = self.stored.config
        if not self.config.text.tied and HEAD not in self.stored.tensors.infos:
            raise UserError(
                f"{folder}: tensor {HEAD!r} is missing: without it the model encodes texts but "
                "writes none; download the whole model"
            )
        self.tokenizer = read_tokenizer(folder, self.config.text.vocab_size, inside="")
        self._check(path)
        self.stops = [self.tokenizer.convert_tokens_to_ids(token) for token in STOPS]
        if None in self.stops:
            raise UserError(
                f"{folder}: the tokenizer lacks {' or '.join(STOPS)}; download it again"
            )
        self.prompt((self.images.multiple,) * 2)  # an instruction that cannot be given is told now

    def _check(self, path: Path) -> None:
        """The settings of pictures against those of the network. Raises `UserError`."""
        raise_if(
            f"{path}: {name} is {getattr(self.images, name)}, the network's is {own}; use the file "
            "of this very model"
            for name in ("patch_size", "temporal_patch_size", "merge_size")
            if getattr(self.images, name) != (own := getattr(self.config.vision, name))
        )

    @functools.cached_property
    def model(self) -> qwen3_vl.Qwen3VL:
        return load_stored(self.stored, VLM.build)

    @functools.cached_property
    def head(self) -> Float[Array, "v d"]:
        """From hidden states to logits."""
        if self.config.text.tied:
            return self.model.language.embedding[...]
        tensors = self.stored.tensors
        return jnp.asarray(check_finite(tensors.read(HEAD), tensors.where, HEAD))

    def grid(self, height: int, width: int, where: str) -> tuple[int, int]:
        """Patch rows and columns of a picture; those of a batch are equal. Raises `UserError`."""
        return vlm_images.grid_of(self.images, height, width, where)

    def prompt(self, size: tuple[int, int]) -> list[int]:
        """The tokens of the instruction with a picture of this height and width."""
        count = self.config.vision.image_tokens(self.grid(*size, "picture"))
        text = teacher_text(self.settings.instruction, count, where="--instruction")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answers(self, pictures: Sequence[UInt8[np.ndarray, "_H _W 3"]]) -> list[str | None]:
        """The answer to each picture, all of one grid; None: it did not end in `max_tokens`."""
        return [self.text(row) for row in self.tokens(pictures).tolist()]

    def tokens(
        self, pictures: Sequence[UInt8[np.ndarray, "_H _W 3"]]
    ) -> Int[np.ndarray, "b {self.settings.max_tokens}"]:
        """The tokens of the answers; behind the first stop token they have no meaning.

        They follow from picture, settings and weights alone, whatever else is in the batch (but for
        the rounding of the device).
        """
        both = [vlm_images.preprocess(picture, self.images) for picture in pictures]
        (grid,) = {grid for _, grid in both}
        ids = self.prompt(pictures[0].shape[:2])
        room = len(ids) + self.settings.max_tokens
        room = -(-room // ROOM_MULTIPLE) * ROOM_MULTIPLE
        hidden, cache = _read(
            self.model,
            np.broadcast_to(np.int32(ids), (len(pictures), len(ids))),
            np.stack([patches for patches, _ in both]),
            grid=grid,
            room=room,
            dtype=self.dtype,
        )
        # The tokens of a picture take fewer positions than they are; see `mrope_positions`.
        merged = [side // self.config.vision.merge_size for side in grid]
        position = len(ids) - merged[0] * merged[1] + max(merged)
        sampling = None
        if self.settings.temperature:
            numbers = self.settings.temperature, self.settings.top_p
            sampling = decoding.Sampling(*map(jnp.float32, numbers))
        found = decoding.generate(
            self.model.language,
            self.head,
            hidden,
            cache,
            jnp.int32(len(ids)),
            jnp.int32(position),
            jnp.stack([self._key(picture) for picture in pictures]),
            jnp.int32(self.stops),
            sampling,
            most=self.settings.max_tokens,
        )
        return np.asarray(found)

    def _key(self, picture: np.ndarray) -> Key[Array, ""]:
        """Random numbers of a picture's own, so that the order of pictures does not matter."""
        digest = hashlib.sha256(np.ascontiguousarray(picture)).digest()
        key = jax.random.key(self.settings.seed)
        return jax.random.fold_in(key, int.from_bytes(digest[:4], "little"))

    def text(self, tokens: Sequence[int]) -> str | None:
        """What the tokens say up to the first stop token; None without one."""
        end = next((i for i, token in enumerate(tokens) if token in self.stops), None)
        if end is None:
            return None
        return self.tokenizer.decode(list(tokens[:end]), skip_special_tokens=True)


@functools.partial(jax.jit, static_argnames=("grid", "room", "dtype"))
def _read(
    model: qwen3_vl.Qwen3VL,
    ids: Int[Array, "b n"],
    patches: Float[Array, "b p c"],
    *,
    grid: tuple[int, int],
    room: int,
    dtype: Any,
) -> tuple[Float[Array, "b d"], decoding.Cache]:
    """`decoding.prefill` of pictures with an instruction."""
    lengths = jnp.full(ids.shape[:1], ids.shape[1], jnp.int32)
    inputs = qwen3_vl.embed(
        model.vision, model.language, model.cfg, ids, lengths, patches, grid, dtype=dtype
    )
    return decoding.prefill(model.language, *inputs, room)
