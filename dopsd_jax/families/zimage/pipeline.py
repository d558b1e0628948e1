"""Z-Image-Turbo's encoders: what makes the student's and the teacher's features.

The student's text goes through the text encoder; the teacher's text, with the picture before it,
through the vision tower of Qwen3-VL and then through the same text encoder (arXiv 2605.05204,
section 4).
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dopsd_jax.common.json_files import read_json
from dopsd_jax.families.base import STUDENT, TEACHER, Features, Request
from dopsd_jax.families.prompts import too_long
from dopsd_jax.families.texts import TextPipeline
from dopsd_jax.families.zimage import encoders, templates
from dopsd_jax.families.zimage.options import MAX_PIXELS, MIN_PIXELS
from dopsd_jax.models import qwen3_vl, vlm_images
from dopsd_jax.weights.load import load_component

TOKENS = {STUDENT: 512, TEACHER: 1024}  # the pipeline's max_sequence_length; upstream's cut


class ZImagePipeline(TextPipeline):
    """See `Pipeline`."""

    ENCODERS = (("text_encoder",), ("text_encoder", "vlm"))
    OPTIONS = ("min_pixels", "max_pixels", "doubled_template")

    @functools.cached_property
    def vlm_config(self) -> qwen3_vl.Qwen3VLConfig:
        cfg, language = self.part_config("vlm"), self.part_config("text_encoder")
        cfg.accept_language(language, str(self.part_folder("text_encoder") / "config.json"))
        return cfg

    @functools.cached_property
    def vlm(self) -> qwen3_vl.Qwen3VLVision:
        """The vision tower alone: the text encoder takes the place of the language model."""
        return load_component(
            self.part_folder("vlm"),
            self.family.NETWORKS["vlm"],
            sharding_for=self.encoder_place(),
            build=lambda cfg, rngs: qwen3_vl.Qwen3VLVision(cfg.vision, attention="xla", rngs=rngs),
            room="vision",
        )

    def image_settings(self, options: Mapping[str, Any]) -> vlm_images.ImageSettings:
        """How the vision tower's images are made; areas from 512^2 to 768^2 by default."""
        low = options.get("min_pixels") or MIN_PIXELS
        high = options.get("max_pixels") or MAX_PIXELS
        return _settings(self.part_folder("vlm") / "preprocessor_config.json", low, high)

    def options(self, role: int, teacher: Mapping[str, Any]) -> dict[str, Any]:
        """`min_pixels`, `max_pixels` bound the area that the vision tower sees; `doubled_template`
        puts the prompt into its template twice, as upstream's code does.
        """
        if role == STUDENT:
            return {}
        return {name: teacher[name] for name in self.OPTIONS}

    def limits(self, role: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`features`: hidden state -2 of the text encoder at each of the text's own tokens. The
        teacher has `picture` too, the first row of its picture's tokens and their number.
        """
        rows = min(TOKENS[role], self.config.max_caption)
        return {"features": jax.ShapeDtypeStruct((rows, self.config.caption_dim), self.dtype)}

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
        grid, count, options = None, 0, options or {}
        if role == STUDENT:
            text = templates.student_text(prompt)
        else:
            ((height, width),) = sizes
            grid = vlm_images.grid_of(self.image_settings(options), height, width, where)
            count = self.vlm_config.vision.image_tokens(grid)
            text = templates.teacher_text(
                prompt, count, doubled=options.get("doubled_template", False)
            )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        limit = self.limits(role if limits_of is None else limits_of)["features"]
        if len(ids) > limit.shape[0]:
            raise too_long(prompt, len(ids), limit.shape[0], count)
        shapes = {"features": limit.update(shape=(len(ids), limit.shape[1]))}
        if role == TEACHER:
            shapes["picture"] = jax.ShapeDtypeStruct((2,), np.int32)
        return Request(shapes, (encoders.padded_tokens(len(ids)), grid), ids)

    def encode(
        self,
        role: int,
        requests: Sequence[Request],
        pictures: Sequence[Sequence[np.ndarray]],
        options: Mapping[str, Any] | None = None,
    ) -> list[Features]:
        """See `Pipeline.encode`."""
        ids, where = [request.inputs for request in requests], (self.dtype, self.encoder_mesh)
        if role == STUDENT:
            found = encoders.texts(self.text_encoder, ids, *where)
            return [{"features": features} for features in found]
        settings, (_, grid) = self.image_settings(options or {}), requests[0].group
        patches = [vlm_images.preprocess(picture, settings)[0] for (picture,) in pictures]
        both = self.vlm, self.text_encoder
        found = encoders.image_texts(*both, self.vlm_config, ids, patches, grid, *where)
        mark, count = self.vlm_config.image_token_id, self.vlm_config.vision.image_tokens(grid)
        return [
            {"features": features, "picture": np.array([own.index(mark), count], np.int32)}
            for own, features in zip(ids, found, strict=True)
        ]


@functools.lru_cache
def _settings(path: Path, low: int, high: int) -> vlm_images.ImageSettings:
    content, _ = read_json(path)
    return vlm_images.ImageSettings.from_dict(content, str(path), min_pixels=low, max_pixels=high)
