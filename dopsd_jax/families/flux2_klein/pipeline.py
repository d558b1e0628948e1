"""FLUX.2-klein's encoders: what makes the student's and the teacher's features."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from dopsd_jax.common.json_fields import Fields
from dopsd_jax.common.json_files import read_json
from dopsd_jax.families.base import STUDENT, TEACHER, Features, Request, Tree
from dopsd_jax.families.flux2_klein.options import INSTRUCTION
from dopsd_jax.families.flux2_klein.references import prepare_reference, reference_size
from dopsd_jax.families.pipeline import too_long
from dopsd_jax.families.texts import TextPipeline, hidden_states, user_turn
from dopsd_jax.models.flux2_config import TEXT_ROWS
from dopsd_jax.weights.model_folder import INDEX

LAYERS = (9, 18, 27)  # whose outputs, joined, are a text's features
REFERENCE_PIXELS = 1024 * 1024
NOT_THINKING = "<think>\n\n</think>\n\n"  # how the chat template says so


class KleinPipeline(TextPipeline):
    """See `Pipeline`."""

    ENCODERS = (("text_encoder",), ("text_encoder", "vae"))

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
        """`instruction`: said behind the caption. `reference_pixels`: of the picture, at most."""
        if role == STUDENT:
            return {}
        return {name: teacher[name] for name in ("instruction", "reference_pixels")}

    def encode_prompt(
        self, prompts: Sequence[str], references: Sequence[UInt8[np.ndarray, "_H _W 3"]] = ()
    ) -> Tree:
        """See `Pipeline.encode_prompt`; every reference keeps its own size."""
        shown = {}
        for k, picture in enumerate(references):
            picture = prepare_reference(picture, REFERENCE_PIXELS, f"reference {k + 1}")
            shown[f"reference{k}"] = np.asarray(self.encode_image(picture[None])[0])
        return self.family.collate([self.features(STUDENT, p) | shown for p in prompts])

    def limits(self, role: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Nothing varies: every text has 512 rows, and every picture of one size one reference."""
        return {}

    def request(
        self,
        role: int,
        prompt: str,
        *,
        size: tuple[int, int] | None = None,
        options: Mapping[str, Any] | None = None,
        limits_of: int | None = None,
        where: str = "",
    ) -> Request:
        """See `Pipeline.request`."""
        options, reference = options or {}, None
        shapes = {"text": jax.ShapeDtypeStruct((TEXT_ROWS, self.config.text_dim), self.dtype)}
        if role == TEACHER:
            pixels = options.get("reference_pixels", REFERENCE_PIXELS)
            reference = self.latent_shape(*reference_size(*size, pixels, where))
            shapes["reference0"] = jax.ShapeDtypeStruct(reference, jnp.float32)
            prompt = f"{prompt} {options.get('instruction', INSTRUCTION)}".strip()
        ids = self.tokenizer(user_turn(prompt) + NOT_THINKING, add_special_tokens=False)[
            "input_ids"
        ]
        if len(ids) > TEXT_ROWS:
            raise too_long(prompt, len(ids), TEXT_ROWS)
        return Request(shapes, reference, ids)

    def encode(
        self,
        role: int,
        requests: Sequence[Request],
        pictures: Sequence[np.ndarray],
        options: Mapping[str, Any] | None = None,
    ) -> list[Features]:
        """See `Pipeline.encode`. The rows behind a text are kept: the transformer sees them."""
        ids = [request.inputs for request in requests]
        lengths, pad = np.array([len(own) for own in ids]), self.tokenizer.pad_token_id
        rows = np.array([[*own, *[pad] * (TEXT_ROWS - len(own))] for own in ids], np.int32)
        mesh = self.encoder_mesh
        texts = hidden_states(self.text_encoder, rows, lengths, LAYERS, self.dtype, mesh)
        found = [{"text": text} for text in np.asarray(texts)]
        if role == STUDENT:
            return found
        pixels = (options or {}).get("reference_pixels", REFERENCE_PIXELS)
        references = np.stack([prepare_reference(picture, pixels) for picture in pictures])
        latents = np.asarray(self.encode_image(references))
        return [own | {"reference0": one} for own, one in zip(found, latents, strict=True)]
