"""A model folder put together: what all families have in common."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from dopsd_jax import families
from dopsd_jax.adapters import attach
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.json_files import read_json
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.families import sampling
from dopsd_jax.families.base import STUDENT, TEACHER, Family, Features, Request, Size, Tree
from dopsd_jax.families.lora import Adapters, attach_files, attach_found, read_files
from dopsd_jax.families.prompts import prompt_features
from dopsd_jax.models import attention as kernels
from dopsd_jax.models import kinds, quantised
from dopsd_jax.models.autoencoder import Autoencoder, to_uint8
from dopsd_jax.models.tiling import Tiling
from dopsd_jax.parallel import sharding
from dopsd_jax.weights.load import load_component
from dopsd_jax.weights.stored import open_stored, read_config, source_digest
from dopsd_jax.weights.tokenizers import tokenizer_digest

TILED_ABOVE = 1536**2  # pixels; larger images are encoded and decoded in tiles


def pipeline(folder: str | Path, asked: str = families.AUTO, **options: Any) -> "Pipeline":
    """The pipeline of a model folder's family; `options`: see `Pipeline`. Raises `UserError`."""
    family = families.of_folder(Path(folder), asked)
    return family.Pipeline(family, folder, **options)


class Pipeline:
    """One model folder, each part loaded when it is first used.

    A family says how its encoders make features: `ENCODERS`, `OPTIONS`, `options`, `limits`,
    `request` and `encode`.

    Args:
      folder: model in Hugging Face layout, or converted.
      beside: folders of networks that are not in `folder`, by component.
      dtype: type of activations.
      base_dtype: type of the transformer's weights, or a scheme of `models.quantised`; None: as
        stored.
      attention: see `Family.build`.
      remat: see `Family.build`.
      loras: adapters to attach to the transformer; their changes add up.
      sharding_for: path and shape of a transformer parameter -> its sharding.
      mesh: that of these shardings: its devices share the pictures of a batch.
      trained: type of the transformer's variables that are kept apart from the rest; see `split`.
    """

    # By role: the networks that its features come from. Each is an attribute of its own name.
    ENCODERS: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]]
    OPTIONS: ClassVar[tuple[str, ...]]  # of the teacher's features, by name

    def __init__(
        self,
        family: Family,
        folder: str | Path,
        *,
        beside: Mapping[str, Path] | None = None,
        dtype: str = "float32",
        base_dtype: str | None = None,
        attention: str = "xla",
        remat: str = "none",
        loras: Sequence[LoraOption] = (),
        sharding_for: Callable | None = None,
        mesh: Mesh | None = None,
        trained: type[nnx.Variable] = nnx.LoRAParam,
    ):
        self.family, self.folder, self.beside = family, Path(folder), dict(beside or {})
        self.dtype, self.base_dtype = jnp.dtype(kinds.activations(dtype)), base_dtype
        self.rest_dtype = quantised.stored_type(base_dtype)
        self.attention, self.remat = attention, remat
        self.loras, self.trained = tuple(loras), trained
        self.sharding_for, self.mesh = sharding_for, mesh
        self.encoder_mesh: Mesh | None = None

    def spread_encoders(self, devices: Sequence[jax.Device]) -> None:
        """Loads the encoders to each of `devices`, which then take equal shares of every batch.

        To be called before they are loaded. Batches must be multiples of the number of devices.
        """
        self.encoder_mesh = sharding.make_mesh({"data": -1}, devices)

    def use_attention(self, name: str) -> None:
        """Attention as config.attention names it, for the devices here.

        To be called before the transformer is loaded. Raises `UserError` for what does not run.
        """
        platform, size = jax.default_backend(), self.config.head_dim
        self.attention = kernels.resolve(name, platform, self.dtype, size)

    def encoder_place(self) -> Callable | None:
        """The `sharding_for` of an encoder: whole on every device that encodes."""
        mesh = self.encoder_mesh
        return mesh and (lambda path, shape: NamedSharding(mesh, PartitionSpec()))

    # Parts.

    def part_folder(self, name: str) -> Path:
        """The folder of a network."""
        return self.beside.get(name) or self.folder / name

    def part_config(self, name: str) -> Any:
        """The configuration of a network. Raises `UserError`."""
        return read_config(self.part_folder(name) / "config.json", self.family.NETWORKS[name])[0]

    @functools.cached_property
    def config(self) -> Size:
        return self.part_config("transformer")

    @functools.cached_property
    def scheduler(self) -> Any:
        """What the family's grids depend on. Raises `UserError`."""
        path = self.folder / "scheduler" / "scheduler_config.json"
        return self.family.read_scheduler(read_json(path, finite=False)[0], str(path))

    @functools.cached_property
    def vae(self) -> Autoencoder:
        return load_component(self.part_folder("vae"), self.family.NETWORKS["vae"])

    @functools.cached_property
    def transformer(self) -> nnx.Module:
        build = functools.partial(
            self.family.build, dtype=self.dtype, attention=self.attention, remat=self.remat
        )
        model = load_component(
            self.part_folder("transformer"),
            self.family.NETWORKS["transformer"],
            dtype=self.rest_dtype,
            scheme=self.base_dtype if self.base_dtype in quantised.SCHEMES else None,
            sharding_for=self.sharding_for,
            build=lambda size, rngs: build(size, rngs=rngs),
        )
        attach_found(model, self.family, self.config, self.adapters)
        del self.adapters  # the transformer has them
        return model

    @functools.cached_property
    def adapters(self) -> Adapters | None:
        """What the LoRA files hold, until the transformer is loaded. Raises `UserError`."""
        return read_files(self.family, self.config, self.loras)

    @functools.cached_property
    def split(self) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        """The transformer as (graphdef, trained, base): all adapters, by default, and the rest."""
        return nnx.split(self.transformer, self.trained, ...)

    def plan_loras(self, loras: Sequence[LoraOption]) -> None:
        """The adapters that the transformer will be loaded with; the files are read now.

        Raises `UserError` for files with faults.
        """
        self.adapters = read_files(self.family, self.config, loras)
        self.loras = tuple(loras)

    def use_loras(self, loras: Sequence[LoraOption]) -> None:
        """Puts the adapters of these files in the place of those that are attached.

        The base stays loaded. Raises `UserError`, and then nothing has changed.
        """
        attach_files(self.transformer, self.family, self.config, loras)
        self.__dict__.pop("split", None)
        self.loras = tuple(loras)

    def hand_over(self) -> nnx.State:
        """The trained part of the transformer, which the pipeline then has no longer."""
        graphdef, trained, base = self.split
        self.__dict__.pop("transformer", None)
        self.__dict__["split"] = graphdef, None, base
        return trained

    def release_encoders(self) -> None:
        """Frees the encoders; the autoencoder stays."""
        for part in {*self.ENCODERS[STUDENT], *self.ENCODERS[TEACHER]} - {"vae"}:
            self.__dict__.pop(part, None)

    def release_transformer(self) -> None:
        """Frees the transformer."""
        for part in ("transformer", "split"):
            self.__dict__.pop(part, None)

    def encoder_digest(self, memo: Path) -> str:
        """What the contexts of both roles depend on: weights and settings of the encoders."""
        names = dict.fromkeys((*self.ENCODERS[STUDENT], *self.ENCODERS[TEACHER]))
        parts = [self.part_digest(name, memo) for name in names]
        return hashlib.sha256(json.dumps([*parts, str(self.dtype)]).encode()).hexdigest()

    def part_digest(self, name: str, memo: Path) -> str:
        """Of the weights and settings of a network, with what stands beside it."""
        folder = self.part_folder(name)
        stored = open_stored(folder, self.family.NETWORKS[name])
        parts = [source_digest(stored, memo), stored.config_text]
        if name == "text_encoder":
            parts.append(tokenizer_digest(self.folder))
        if (folder / "preprocessor_config.json").exists():
            parts.append(read_json(folder / "preprocessor_config.json")[1])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def notes(self) -> list[str]:
        """What a user should know of the model before it is used in few steps; mostly nothing."""
        return []

    # Contexts.

    def options(self, role: int, teacher: Mapping[str, Any]) -> dict[str, Any]:
        """What of config.teacher the features of a role depend on, as plain JSON."""
        raise NotImplementedError

    def limits(self, role: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The features whose first axis varies, by name, with their largest shapes.

        All others have the same shape for all pictures of one size.
        """
        raise NotImplementedError

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
        """A prompt as it will be encoded. Raises `UserError` for one that the model cannot take.

        Args:
          sizes: heights and widths of the pictures that the role is shown: references, then, for
            the teacher, the row's picture.
          options: of `options`; None: the family's defaults.
          limits_of: the role whose limits count; None: `role`.
          where: what messages call the pictures.
        """
        raise NotImplementedError

    def encode(
        self,
        role: int,
        requests: Sequence[Request],
        pictures: Sequence[Sequence[UInt8[np.ndarray, "_H _W 3"]]],
        options: Mapping[str, Any] | None = None,
    ) -> list[Features]:
        """The features of requests of one group; `pictures`: those that each one is shown.

        The number of requests is a multiple of the devices of `spread_encoders`.
        """
        raise NotImplementedError

    def features(
        self,
        role: int,
        prompt: str,
        pictures: Sequence[UInt8[np.ndarray, "_H _W 3"]] = (),
        options: Mapping[str, Any] | None = None,
        where: str = "",
    ) -> Features:
        """The features of one prompt and what it is shown; see `request`."""
        sizes = [np.shape(picture)[:2] for picture in pictures]
        request = self.request(role, prompt, sizes=sizes, options=options, where=where)
        return self.encode(role, [request], [pictures], options)[0]

    def reference_size(self, height: int, width: int, where: str) -> tuple[int, int]:
        """Height and width that a picture to edit is given in. Raises `UserError` naming `where`.

        `where`: what messages call the picture.
        """
        raise UserError(
            f"{where}: models of the family {self.family.NAME} edit no pictures; give none"
        )

    def encode_prompt(
        self,
        prompts: str | Sequence[str],
        references: Iterable[UInt8[np.ndarray, "_H _W 3"]] = (),
    ) -> Tree:
        """The student's context; `references`: pictures to edit, the same for all prompts.

        Raises `UserError` for references that the model cannot take.
        """
        return self.family.collate(prompt_features(self, _listed(prompts), references))

    def encode_prompt_with_image(
        self,
        prompts: str | Sequence[str],
        images: Iterable[UInt8[np.ndarray, "_H _W 3"]],
        references: Iterable[UInt8[np.ndarray, "_H _W 3"]] = (),
        **options: Any,
    ) -> Tree:
        """The teacher's context. `images`: one a prompt. `references`: as in `encode_prompt`.

        options: those of the family (`OPTIONS`), by their names in config.teacher: of Z-Image
        min_pixels, max_pixels, doubled_template; of FLUX.2-klein instruction, reference_pixels.
        Raises `TypeError` for others.
        """
        if strange := sorted(options.keys() - set(self.OPTIONS)):
            known = ", ".join(self.OPTIONS)
            raise TypeError(f"{', '.join(strange)}: no option of this family, which has {known}")
        references = list(references)
        for number, picture in enumerate(references, 1):
            self.reference_size(*np.shape(picture)[:2], f"reference {number}")
        pairs = zip(_listed(prompts), images, strict=True)
        return self.family.collate(
            [self.features(TEACHER, p, [*references, np.asarray(i)], options) for p, i in pairs]
        )

    # Images.

    def velocity(self, x: Float[Array, "b h w c"], sigma, context: Tree) -> Float[Array, "b h w c"]:
        """dx/dsigma at a state, in float32. sigma: from 0 to 1, pure noise; one number, or [b]."""
        sigma = jnp.asarray(sigma, jnp.float32)
        return sampling.velocity(self.family, *self.split, jnp.asarray(x), sigma, context)

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
        limit = [cells * factor for cells in self.family.largest_latent(self.config)]
        raise_if(
            f"image {name} {side}: must be a multiple of {multiple}, from {multiple} to {most}"
            for name, side, most in (("height", height, limit[0]), ("width", width, limit[1]))
            if side % multiple or not 0 < side <= most
        )
        return height // factor, width // factor, self.config.channels

    @functools.cached_property
    def vae_config(self) -> Any:
        return self.part_config("vae")

    def deployed_grid(self, latent: Sequence[int], steps: int | None = None) -> tuple[float, ...]:
        """The released sampler's nodes for a latent [h, w, ...]; `steps`: None: the deployed."""
        steps = steps or self.family.DEPLOYED_STEPS
        return self.family.deployed_grid(steps, self.scheduler, *latent[:2])

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        latents: Float[Array, "b h w c"] | None = None,
        images: Iterable[UInt8[np.ndarray, "_H _W 3"]] | None = None,
        context: Tree | None = None,
        strength: float = 1.0,
    ) -> UInt8[np.ndarray, "b H W 3"]:
        """Images of the prompts, or of one, by the few-step sampler, without guidance.

        `height`, `width`: pixels; None: `own_size`. `steps`: forwards; None: the deployed number.
        `latents`: start noise, float32; None: drawn from `seed`, image i of any batch from
        (seed, i). `images`: to edit, the `references` of `encode_prompt`. `context`: of an earlier
        `encode_prompt`.
        `strength`: see `sample`.
        """
        prompts = _listed(prompts)
        shape = self.latent_shape(height or self.own_size, width or self.own_size)
        if latents is None:
            latents = sampling.start_noise(seed, len(prompts), shape)
        elif jnp.shape(latents) != (len(prompts), *shape):
            raise ValueError(f"latents {jnp.shape(latents)}, needed {(len(prompts), *shape)}")
        grid = self.deployed_grid(shape, steps)
        if context is None:
            context = self.encode_prompt(prompts, () if images is None else images)
        drawn = self.sample(self.split[1], latents, context, grid, strength)
        return self.decode(sampling.finite(drawn, strength))

    def sample(
        self,
        trained: nnx.State,
        noise: Float[Array, "b h w c"],
        context: Tree,
        grid: tuple[float, ...],
        strength: float = 1.0,
    ) -> Float[Array, "b h w c"]:
        """Clean latents: a rollout with the given trained part of the transformer.

        The devices of `mesh` share samples whose number is a multiple of its `sample_devices`.
        `strength`: what all its adapters are multiplied with; every one is the same program.
        """
        graphdef, _, base = self.split
        base = base if strength == 1.0 else attach.scaled(base, strength)
        network = {"family": self.family, "graphdef": graphdef}
        samples = jnp.asarray(noise, jnp.float32), context
        with sharding.spread_samples(self.mesh, samples) as own:
            return sampling.sample(trained, base, *own, grid=grid, **network)


def _listed(prompts: str | Sequence[str]) -> Sequence[str]:
    """Several prompts; a text alone is one, not its letters."""
    return [prompts] if isinstance(prompts, str) else prompts
