"""The miniature's Z-Image: see `families.Family`."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from dopsd_jax.common.flow import shifted_grid
from dopsd_jax.families.zimage.family import DEPLOYED_STEPS
from dopsd_jax.families.zimage.templates import student_text, teacher_text
from dopsd_jax.miniature import pool, pretrain
from dopsd_jax.miniature.families import Batch, Told
from dopsd_jax.miniature.few_steps import SHIFT
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.reading import unread
from dopsd_jax.miniature.render import SIDE
from dopsd_jax.miniature.zimage import autoencoder, configs, export, networks
from dopsd_jax.models.autoencoder import Autoencoder

STUDENT_ROWS, TEACHER_ROWS = 32, 96
IMAGE_TOKENS = (SIDE // configs.IMAGE_PATCH) ** 2
DROPPED = (0.0, 0.0, 0.0, 0.5, 0.75)  # shares of an image's tokens that are left out, each as often
SHOWN = "shown.kernel"  # reads from the features what each part of a shown image is, and where


def template(prompt: str, image: bool) -> str:
    """The student's text, or the teacher's."""
    return teacher_text(prompt, IMAGE_TOKENS) if image else student_text(prompt)


@dataclasses.dataclass(frozen=True)
class Miniature:
    """Z-Image of a size."""

    size: configs.Size = dataclasses.field(default_factory=configs.Size)

    name = "zimage"
    latent = (SIDE // configs.FACTOR,) * 2 + (configs.LATENT_CHANNELS,)
    grid = shifted_grid(DEPLOYED_STEPS, SHIFT)
    kinds = {"with text": 0.5, "with an image": 0.5}  # noqa: RUF012
    teacher = {"min_pixels": SIDE**2, "max_pixels": SIDE**2}  # noqa: RUF012
    editor = False

    def start(self, seed: int) -> networks.Networks:
        return networks.start(self.size, seed)

    def abstract(self) -> networks.Networks:
        size = self.size
        return nnx.eval_shape(lambda: networks.Networks(size, rngs=nnx.Rngs(0)))

    def heads(self) -> Parameters:
        patch = configs.PATCH**2 * configs.LATENT_CHANNELS
        place = self.places().shape[1]
        return {
            SHOWN: jnp.zeros((self.size.text_dim, patch + place)),
            pretrain.WHERE: jnp.zeros((self.size.dim, place)),
        }

    def unread(self, parameters: Parameters, context: networks.Context, told: Told):
        if told.images is None:
            return None
        places = self.places()
        shown = networks.latent_patches(told.references[0].astype(jnp.float32))
        shown = jnp.concatenate([shown, jnp.broadcast_to(places, (len(shown), *places.shape))], -1)
        return unread(parameters[SHOWN], networks.at_image(context.features, told.ids), shown)

    def places(self) -> Float[np.ndarray, "p c"]:
        return networks.places(self.size)

    def autoencoder(self) -> Autoencoder:
        return autoencoder.build()

    def normalized(self, vae: Autoencoder, seed: int) -> Autoencoder:
        return autoencoder.normalized(vae, seed)

    def write_words(self, folder: Path) -> None:
        export.write_words(folder)

    def texts(self, tokenizer) -> pool.Texts:
        return pool.Texts(tokenizer, template, (STUDENT_ROWS, TEACHER_ROWS))

    def scenes(self, seed: int, number: int, encode: Callable) -> pool.Pool:
        return pool.make_pool(seed, number, encode)

    def batches(self, scenes: pool.Pool, texts: pool.Texts, rng, alone: int, shown: int):
        text = pool.text_batch(scenes, texts, rng, alone)
        return text, image_batch(scenes, texts, rng, shown)

    def told(self, texts: pool.Texts, prompts: Sequence[str], images, encode: Callable) -> Told:
        return Told(*texts(list(prompts), image=images is not None), images)

    def write(self, folder: Path, parameters: Parameters, vae: Autoencoder) -> None:
        export.write_model(folder, self.size, parameters, vae)

    def read(self, folder: Path) -> tuple[Parameters, Autoencoder]:
        return export.read_model(folder)


def image_batch(
    scenes: pool.Pool, texts: pool.Texts, rng: np.random.Generator, count: int
) -> Batch:
    """Targets with a caption and an image."""
    index, shown, prompts = pool.shown_again(scenes, texts, rng, count)
    latents, dropped = scenes.latents[index], rng.choice(np.float32(DROPPED), count)
    noise = pool.paired_noise(rng, latents, prompts)
    told = Told(
        *texts(prompts, image=True), scenes.images[shown], dropped, (scenes.latents[shown],)
    )
    return Batch(latents, noise, told, Told(*texts(prompts, image=False)))
