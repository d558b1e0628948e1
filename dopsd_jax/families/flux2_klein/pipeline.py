"""FLUX.2-klein's encoders: what makes the student's and the teacher's features.

Both roles: the text, and the pictures that are edited as latents of their own size. The teacher is
shown the row's picture as one more, the last.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.common.json_fields import Fields
from dopsd_jax.common.json_files import read_json
from dopsd_jax.families.base import STUDENT, TEACHER, Features, Request
from dopsd_jax.families.flux2_klein.options import INSTRUCTIONS, REFERENCE_PIXELS
from dopsd_jax.families.flux2_klein.references import (
    REFERENCE,
    prepare_reference,
    reference_size,
)
from dopsd_jax.families.prompts import too_long
from dopsd_jax.families.texts import TextPipeline, hidden_states, user_turn
from dopsd_jax.weights.model_folder import INDEX

LAYERS = (9, 18, 27)  # whose outputs, joined, are a text's features
NOT_THINKING = "<think>\n\n</think>\n\n"  # how the chat template says so


class KleinPipeline(TextPipeline):
    """See `Pipeline`."""

    ENCODERS = (("text_encoder",), ("text_encoder", "vae"))
    OPTIONS = ("instruction", "reference_pixels")

    def notes(self) -> list[str]:
        """See `Pipeline.notes`."""
        path = self.folder / INDEX
        if Fields(read_json(path)[0], str(path)).json.get("is_distilled") is True:
            return []
        return [
            f"warning: {path}: is of a base model, made for many steps with guidance; a distilled "
            "one is expected here, and pictures drawn in few steps will be poor"
        ]

    def options(self, role: int, teacher: Mapping[str, Any]) -> dict[str, Any]:
        """`instruction`: said behind the caption. `reference_pixels`: of the row's picture, at
        most.
        """
        if role == STUDENT:
            return {}
        said = teacher["instruction"] or INSTRUCTIONS.get(teacher["context"], "")
        return {"instruction": said, "reference_pixels": teacher["reference_pixels"]}

    def limits(self, role: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Nothing varies: texts have equally many rows, rows of one shape like references."""
        return {}

    def reference_size(self, height: int, width: int, where: str) -> tuple[int, int]:
        """See `Pipeline.reference_size`."""
        return reference_size(height, width, REFERENCE_PIXELS, self.size_multiple, where)

    def request(
        self,
        role: int,
        prompt: str,
        *,
        sizes: Sequence[tuple[int, int]] = (),
        options: Mapping[str, Any] | None = None,
        limits_of: int | None = None,
        where: str = "",
    ) -> Request:
        """See `Pipeline.request`."""
        options = options or {}
        limit = self.config.text_rows
        shapes = {"text": jax.ShapeDtypeStruct((limit, self.config.text_dim), self.dtype)}
        pixels = _pixels(role, len(sizes), options)
        for k, ((height, width), most) in enumerate(zip(sizes, pixels, strict=True)):
            # A long reference may have a longer side than any picture that is drawn.
            sides = reference_size(height, width, most, self.size_multiple, where)
            latent = (*(side // self.vae_config.factor for side in sides), self.config.channels)
            shapes[f"{REFERENCE}{k}"] = jax.ShapeDtypeStruct(latent, jnp.float32)
        if role == TEACHER:
            usual = INSTRUCTIONS["gt_ref" if len(sizes) > 1 else "edit_ref"]
            said = options.get("instruction", usual)
            prompt = f"{prompt} {said}".strip()
        ids = self.tokenizer(user_turn(prompt) + NOT_THINKING, add_special_tokens=False)[
            "input_ids"
        ]
        if len(ids) > limit:
            raise too_long(prompt, len(ids), limit)
        group = tuple(shape.shape for name, shape in shapes.items() if name != "text")
        return Request(shapes, group, ids)

    def encode(
        self,
        role: int,
        requests: Sequence[Request],
        pictures: Sequence[Sequence[np.ndarray]],
        options: Mapping[str, Any] | None = None,
    ) -> list[Features]:
        """See `Pipeline.encode`. The rows behind a text are kept: the transformer sees them."""
        ids = [request.inputs for request in requests]
        lengths, pad = np.array([len(own) for own in ids]), self.tokenizer.pad_token_id
        rows = np.array(
            [[*own, *[pad] * (self.config.text_rows - len(own))] for own in ids], np.int32
        )
        mesh = self.encoder_mesh
        texts = hidden_states(self.text_encoder, rows, lengths, LAYERS, self.dtype, mesh)
        found = [{"text": text} for text in np.asarray(texts)]
        for k, same in enumerate(zip(*pictures, strict=True)):
            bounds = _pixels(role, len(pictures[0]), options or {})[k], self.size_multiple
            references = np.stack([prepare_reference(picture, *bounds) for picture in same])
            for own, latent in zip(found, np.asarray(self.encode_image(references)), strict=True):
                own[f"{REFERENCE}{k}"] = latent
        return found


def _pixels(role: int, count: int, options: Mapping[str, Any]) -> list[int]:
    """The largest areas of the pictures of a role: the teacher's last one has its own."""
    pixels = [REFERENCE_PIXELS] * count
    if role == TEACHER:
        pixels[-1] = options.get("reference_pixels", REFERENCE_PIXELS)
    return pixels
