"""Z-Image-Turbo put together: encoders, transformer and autoencoder of one model folder."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from dopsd_jax import dopsd
from dopsd_jax.adapters import attach
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.flow import shifted_grid
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.common.json_files import read_json
from dopsd_jax.families.zimage import encoders as encoders
from dopsd_jax.families.zimage import family
from dopsd_jax.families.zimage import templates as templates
from dopsd_jax.models import quantised, qwen3, qwen3_vl, vlm_images, zimage
from dopsd_jax.models.autoencoder import Autoencoder, to_uint8
from dopsd_jax.models.tiling import Tiling
from dopsd_jax.parallel import multihost, sharding
from dopsd_jax.weights import lora_files, networks
from dopsd_jax.weights.load import load_component
from dopsd_jax.weights.lora_dialects import Layers, layers_of
from dopsd_jax.weights.stored import open_stored, read_config, source_digest
from dopsd_jax.weights.tokenizers import read_tokenizer, tokenizer_digest

STUDENT_TOKENS = 512  # the pipeline's max_sequence_length
TEACHER_TOKENS = 1024  # upstream's cut; longer ones are refused here
TEACHER_MIN_PIXELS, TEACHER_MAX_PIXELS = 512**2, 768**2  # d-opsd.md 5.2 A
TILED_ABOVE = 1536  # pixels a side; larger images are decoded in tiles


class Pipeline:
    """One model folder, each part loaded when it is first used.

    Args:
      folder: model in Hugging Face layout, or converted.
      vlm: folder of Qwen3-VL; None: `folder`/vlm.
      dtype: type of activations.
      base_dtype: type of the transformer's weights, or a scheme of `models.quantised`; None: as
        stored.
      attention, remat: see `models.zimage.ZImage`.
      lora_file: adapters to attach to the transformer.
      sharding_for: path and shape of a transformer parameter -> its sharding.
      trained: type of the transformer's variables that are kept apart from the rest; see `split`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vlm: str | Path | None = None,
        dtype: str = "float32",
        base_dtype: str | None = None,
        attention: str = "xla",
        remat: str = "none",
        lora_file: str | Path | None = None,
        sharding_for=None,
        trained: type[nnx.Variable] = nnx.LoRAParam,
    ):
        self.folder = Path(folder)
        self.vlm_folder = Path(vlm) if vlm else self.folder / "vlm"
        self.dtype, self.base_dtype = jnp.dtype(dtype), base_dtype
        self.rest_dtype = quantised.stored_type(base_dtype)
        self.attention, self.remat = attention, remat
        self.lora_file, self.sharding_for, self.trained = lora_file, sharding_for, trained
        self.encoder_mesh: Mesh | None = None

    def spread_encoders(self, devices: Sequence[jax.Device]) -> None:
        """Loads the encoders to each of `devices`, which then take equal shares of every batch.

        To be called before they are loaded. Batches must be multiples of the number of devices.
        """
        self.encoder_mesh = sharding.make_mesh({"data": -1}, devices)

    def _encoder_place(self) -> Callable | None:
        mesh = self.encoder_mesh
        return mesh and (lambda path, shape: NamedSharding(mesh, PartitionSpec()))

    # Parts.

    @functools.cached_property
    def config(self) -> zimage.ZImageConfig:
        path = self.folder / "transformer" / "config.json"
        return read_config(path, networks.ZIMAGE["transformer"])[0]

    @property
    def student_limit(self) -> int:
        """Most tokens of a prompt with its template."""
        return min(STUDENT_TOKENS, self.config.max_caption)

    @property
    def teacher_limit(self) -> int:
        """Most tokens of a prompt with its template and its image."""
        return min(TEACHER_TOKENS, self.config.max_caption)

    @functools.cached_property
    def shift(self) -> float:
        """The scheduler's static shift. Raises `UserError` for a scheduler of another kind."""
        path = self.folder / "scheduler" / "scheduler_config.json"
        fields = Fields(read_json(path, finite=False)[0], str(path))
        fields.only("_class_name", "FlowMatchEulerDiscreteScheduler", required=True)
        fields.only("use_dynamic_shifting", False, None)
        shift = fields.positive("shift")
        fields.finish()
        return shift

    @functools.cached_property
    def tokenizer(self) -> Any:
        path = self.folder / "text_encoder" / "config.json"
        encoder, _ = read_config(path, networks.ZIMAGE["text_encoder"])
        return read_tokenizer(self.folder, encoder.vocab_size)

    @functools.cached_property
    def text_encoder(self) -> qwen3.Qwen3:
        return load_component(
            self.folder / "text_encoder",
            networks.ZIMAGE["text_encoder"],
            sharding_for=self._encoder_place(),
            build=lambda cfg, rngs: qwen3.Qwen3(cfg, attention=self.attention, rngs=rngs),
        )

    @functools.cached_property
    def vlm_config(self) -> qwen3_vl.Qwen3VLConfig:
        cfg, _ = read_config(self.vlm_folder / "config.json", networks.VLM)
        language, _ = read_config(
            self.folder / "text_encoder" / "config.json", networks.ZIMAGE["text_encoder"]
        )
        cfg.accept_language(language, str(self.folder / "text_encoder" / "config.json"))
        return cfg

    @functools.cached_property
    def vision(self) -> qwen3_vl.Qwen3VLVision:
        return load_component(
            self.vlm_folder,
            networks.VLM,
            sharding_for=self._encoder_place(),
            build=lambda cfg, rngs: qwen3_vl.Qwen3VLVision(cfg.vision, attention="xla", rngs=rngs),
            room="vision",
        )

    def image_settings(self, min_pixels: int | None, max_pixels: int | None):
        """How the vision tower's images are made; areas from 512^2 to 768^2 by default."""
        path = self.vlm_folder / "preprocessor_config.json"
        low, high = min_pixels or TEACHER_MIN_PIXELS, max_pixels or TEACHER_MAX_PIXELS
        content, _ = read_json(path)
        return vlm_images.ImageSettings.from_dict(
            content, str(path), min_pixels=low, max_pixels=high
        )

    @functools.cached_property
    def vae(self) -> Autoencoder:
        return load_component(self.folder / "vae", networks.ZIMAGE["vae"])

    @functools.cached_property
    def transformer(self) -> zimage.ZImage:
        model = load_component(
            self.folder / "transformer",
            networks.ZIMAGE["transformer"],
            dtype=self.rest_dtype,
            scheme=self.base_dtype if self.base_dtype in quantised.SCHEMES else None,
            sharding_for=self.sharding_for,
            build=lambda cfg, rngs: zimage.ZImage(
                cfg, dtype=self.dtype, attention=self.attention, remat=self.remat, rngs=rngs
            ),
        )
        if self.lora_file is not None:
            attach_file(model, self.config, self.lora_file)
        return model

    @functools.cached_property
    def split(self) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        """The transformer as (graphdef, trained, base): all adapters, by default, and the rest."""
        return nnx.split(self.transformer, self.trained, ...)

    def hand_over(self) -> nnx.State:
        """The trained part of the transformer, which the pipeline then has no longer."""
        graphdef, trained, base = self.split
        self.__dict__.pop("transformer", None)
        self.__dict__["split"] = graphdef, None, base
        return trained

    def release_encoders(self) -> None:
        """Frees the text encoder and the vision tower."""
        for part in ("text_encoder", "vision"):
            self.__dict__.pop(part, None)

    def release_transformer(self) -> None:
        """Frees the transformer."""
        for part in ("transformer", "split"):
            self.__dict__.pop(part, None)

    def encoder_digest(self, memo: Path) -> str:
        """What the contexts depend on: weights and settings of text encoder and vision tower."""
        parts = [self.part_digest(name, memo) for name in ("text_encoder", "vlm")]
        return hashlib.sha256(json.dumps([*parts, str(self.dtype)]).encode()).hexdigest()

    def part_digest(self, name: str, memo: Path) -> str:
        """Of the weights and settings of `text_encoder`, `vlm` or `vae`."""
        folder, network = self._encoders()[name]
        stored = open_stored(folder, network)
        parts = [source_digest(stored, folder, memo), stored.config_text]
        if name == "text_encoder":
            parts.append(tokenizer_digest(self.folder))
        if name == "vlm":
            parts.append(read_json(folder / "preprocessor_config.json")[1])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def has_encoder(self, name: str) -> bool:
        """Whether the folder of an encoder is there."""
        return self._encoders()[name][0].is_dir()

    def _encoders(self) -> dict[str, tuple[Path, networks.Network]]:
        return {
            "text_encoder": (self.folder / "text_encoder", networks.ZIMAGE["text_encoder"]),
            "vlm": (self.vlm_folder, networks.VLM),
            "vae": (self.folder / "vae", networks.ZIMAGE["vae"]),
        }

    # Contexts.

    def encode_prompt(self, prompts: Sequence[str]) -> family.Context:
        """The student's context: the prompts through the text encoder."""
        return family.pad_features([self.student_features(p) for p in prompts])

    def encode_prompt_with_image(
        self,
        prompts: Sequence[str],
        images: Sequence[UInt8[np.ndarray, "H W 3"]],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        doubled: bool = False,
    ) -> family.Context:
        """The teacher's context: prompt and image through Qwen3-VL on the model's own encoder.

        `min_pixels`, `max_pixels` bound the area the vision tower sees (d-opsd.md 5.2 A); `doubled`
        templates the prompt twice, as the released code does.
        """
        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels, "doubled": doubled}
        return family.pad_features(
            [self.teacher_features(p, i, **bounds) for p, i in zip(prompts, images, strict=True)]
        )

    def student_features(self, prompt: str) -> Float[np.ndarray, "n c"]:
        """Hidden state -2 at the prompt's own tokens. Raises `UserError` if there are too many."""
        return self.encode_texts([self.student_tokens(prompt)])[0]

    def encode_texts(self, ids: Sequence[Sequence[int]]) -> list[Float[np.ndarray, "n c"]]:
        """Hidden state -2 of texts whose `padded_tokens` are the same."""
        return encoders.texts(self.text_encoder, ids, self.dtype, self.encoder_mesh)

    def encode_image_texts(
        self,
        ids: Sequence[Sequence[int]],
        patches: Sequence[Float[np.ndarray, "p c"]],
        grid: tuple[int, int],
    ) -> list[Float[np.ndarray, "n c"]]:
        """The same for texts with an image each; all images have the same `grid`."""
        both = self.vision, self.text_encoder
        return encoders.image_texts(
            *both, self.vlm_config, ids, patches, grid, self.dtype, self.encoder_mesh
        )

    def teacher_features(
        self,
        prompt: str,
        image: UInt8[np.ndarray, "H W 3"],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        doubled: bool = False,
    ) -> Float[np.ndarray, "n c"]:
        """The same with the image before the prompt, through the vision tower."""
        settings = self.image_settings(min_pixels, max_pixels)
        patches, grid = vlm_images.preprocess(np.asarray(image), settings)
        ids = self.teacher_tokens(prompt, grid, doubled)
        return self.encode_image_texts([ids], [patches], grid)[0]

    def student_tokens(self, prompt: str, limit: int | None = None) -> list[int]:
        """Token ids of the student's text. Raises `UserError` if they are too many.

        `limit`: how many are; None: more than `student_limit`.
        """
        text = templates.student_text(prompt)
        return self._tokens(text, prompt, limit or self.student_limit)

    def teacher_tokens(self, prompt: str, grid: tuple[int, int], doubled: bool) -> list[int]:
        """Token ids of the teacher's text for an image of `grid` patches."""
        count = self.vlm_config.vision.image_tokens(grid)
        return self._tokens(
            templates.teacher_text(prompt, count, doubled=doubled), prompt, self.teacher_limit
        )

    def _tokens(self, text: str, prompt: str, limit: int) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > limit:
            start = prompt if len(prompt) < 60 else f"{prompt[:57]}..."
            raise UserError(
                f"the prompt {start!r} makes {len(ids)} tokens with its template, the model takes "
                f"{limit}; shorten it"
            )
        return ids

    # Images.

    def velocity(
        self, x: Float[Array, "b h w c"], sigma, context: family.Context
    ) -> Float[Array, "b h w c"]:
        """dx/dsigma at a state, in float32."""
        return _velocity(*self.split, jnp.asarray(x), jnp.asarray(sigma, jnp.float32), context)

    def encode_image(self, images: UInt8[np.ndarray, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Clean latents of images (the posterior's mode)."""
        return self.vae.encode_images(
            images, tiling=Tiling(above=TILED_ABOVE), dtype=self.dtype
        ).astype(jnp.float32)

    def decode(self, latents: Float[Array, "b h w c"]) -> UInt8[np.ndarray, "b H W 3"]:
        """Images of clean latents."""
        latents = jnp.asarray(latents, self.dtype)
        return np.asarray(
            to_uint8(self.vae.decode_images(latents, tiling=Tiling(above=TILED_ABOVE)))
        )

    @property
    def size_multiple(self) -> int:
        """What both sides of an image must be multiples of."""
        return self.vae_config.factor * self.config.patch

    @property
    def own_size(self) -> int:
        """Pixels a side of the pictures that the model was made for."""
        return self.vae_config.sample_size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[h, w, c] of an image's latent. Raises `UserError` for a side the model cannot make."""
        factor, multiple = self.vae_config.factor, self.size_multiple
        limit = self.config.axes_lens[1] * multiple, self.config.axes_lens[2] * multiple
        raise_if(
            f"image {name} {side}: must be a multiple of {multiple}, from {multiple} to {most}"
            for name, side, most in (("height", height, limit[0]), ("width", width, limit[1]))
            if side % multiple or not 0 < side <= most
        )
        return height // factor, width // factor, self.config.channels

    @functools.cached_property
    def vae_config(self):
        return read_config(self.folder / "vae" / "config.json", networks.ZIMAGE["vae"])[0]

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        latents: Float[Array, "b h w c"] | None = None,
    ) -> UInt8[np.ndarray, "b H W 3"]:
        """Images of the prompts by the few-step sampler, without guidance.

        `height`, `width`: pixels; None: `own_size`. `steps`: forwards; None: the deployed 8.
        `latents`: start noise, float32; None: drawn from `seed`, image i of any batch from
        (seed, i).
        """
        shape = self.latent_shape(height or self.own_size, width or self.own_size)
        if latents is None:
            latents = start_noise(seed, len(prompts), shape)
        elif jnp.shape(latents) != (len(prompts), *shape):
            raise ValueError(f"latents {jnp.shape(latents)}, needed {(len(prompts), *shape)}")
        grid = shifted_grid(steps or family.DEPLOYED_STEPS, self.shift)
        context = self.encode_prompt(prompts)
        return self.decode(self.sample(self.split[1], latents, context, grid))

    def sample(self, trained: nnx.State, noise, context: family.Context, grid: tuple[float, ...]):
        """Clean latents: a rollout with the given trained part of the transformer."""
        graphdef, _, base = self.split
        noise = jnp.asarray(noise, jnp.float32)
        return _sample(trained, base, noise, context, graphdef=graphdef, grid=grid)


def start_noise(seed: int, count: int, shape: tuple[int, ...]) -> Float[Array, "b h w c"]:
    """Unit Gaussian start noise; image i depends on (seed, i) only."""
    key = jax.random.key(seed)
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
    return jax.vmap(draw)(jnp.arange(count))


def attach_file(model: zimage.ZImage, config: zimage.ZImageConfig, path: str | Path) -> None:
    """Gives the transformer the adapters of a LoRA file, of any dialect we read."""
    slots = attach.slots(zimage.names(config))
    file = lora_files.read_lora(path, lora_layers(config))
    chosen = {name: slots[name] for name in file.modules}
    rank = max(module.a.shape[0] for module in file.modules.values())
    attach.attach(model, chosen, rank, rank, jax.random.key(0))
    adapter = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, attach.load(adapter, chosen, file.modules, 1.0, str(path)))


def lora_layers(config: zimage.ZImageConfig) -> Layers:
    """The transformer's linear layers by every name that LoRA files call them."""
    return layers_of(networks.ZIMAGE["transformer"], config)


@functools.partial(jax.jit, static_argnums=0)
def _velocity(graphdef, adapter, base, x, sigma, context):
    net = family.denoiser(graphdef)
    return net.velocity(adapter, base, x, sigma, context, net.hoist(adapter, base, context))


@multihost.begin_together
@functools.partial(jax.jit, static_argnames=("graphdef", "grid"))
def _sample(adapter, base, noise, context, *, graphdef, grid):
    return dopsd.rollout(family.denoiser(graphdef), adapter, base, context, noise, grid)
