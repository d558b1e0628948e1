"""The miniature's FLUX.2-klein: see `families.Family`."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from dopsd_jax.families.flux2_klein.family import DEPLOYED_STEPS, deployed_grid
from dopsd_jax.families.flux2_klein.pipeline import NOT_THINKING
from dopsd_jax.families.texts import user_turn
from dopsd_jax.miniature import edits, pool, pretrain
from dopsd_jax.miniature.families import Told
from dopsd_jax.miniature.flux2_klein import autoencoder, configs, export, networks, pairs
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.models.flux2_autoencoder import Flux2Autoencoder


def template(prompt: str, image: bool) -> str:
    """The student's text, or the teacher's, which has an instruction behind the caption."""
    return user_turn(f"{prompt} {edits.AS_SHOWN}" if image else prompt) + NOT_THINKING


@dataclasses.dataclass(frozen=True)
class Miniature:
    """FLUX.2-klein of a size."""

    size: configs.Size = dataclasses.field(default_factory=configs.Size)

    name = "flux2_klein"
    latent = (*networks.GRID, configs.transformer(configs.Size()).channels)
    grid = deployed_grid(DEPLOYED_STEPS, None, *networks.GRID)
    kinds = pairs.KINDS
    teacher = {"instruction": edits.AS_SHOWN}  # noqa: RUF012
    editor = True

    def start(self, seed: int) -> networks.Networks:
        return networks.start(self.size, seed)

    def abstract(self) -> networks.Networks:
        size = self.size
        return nnx.eval_shape(lambda: networks.Networks(size, rngs=nnx.Rngs(0)))

    def heads(self) -> Parameters:
        return {pretrain.WHERE: jnp.zeros((self.size.dim, self.places().shape[1]))}

    def unread(self, parameters: Parameters, context: networks.Context, told: Told) -> None:
        return None

    def places(self) -> Float[np.ndarray, "p c"]:
        return networks.places(self.size)

    def autoencoder(self) -> Flux2Autoencoder:
        return autoencoder.build()

    def normalized(self, vae: Flux2Autoencoder, seed: int) -> Flux2Autoencoder:
        return autoencoder.normalized(vae, seed)

    def write_words(self, folder: Path) -> None:
        export.write_words(folder)

    def texts(self, tokenizer) -> pool.Texts:
        return pool.Texts(tokenizer, template, (configs.ROWS,) * 2, tokenizer.pad_token_id)

    def scenes(self, seed: int, number: int, encode: Callable) -> pairs.Pool:
        return pairs.make_pool(seed, number, encode)

    def batches(self, scenes: pairs.Pool, texts: pool.Texts, rng, alone: int, shown: int):
        return pairs.batches(scenes, texts, rng, alone, shown)

    def told(self, texts: pool.Texts, prompts: Sequence[str], images, encode: Callable) -> Told:
        ids = texts(list(prompts), image=images is not None)
        return Told(*ids, references=() if images is None else (np.float32(encode(images)),))

    def asked_to_edit(
        self, texts: pool.Texts, prompts: Sequence[str], images: Sequence, encode: Callable
    ) -> Told:
        references = tuple(np.float32(encode(each)) for each in images)
        return Told(*texts(list(prompts), image=False), references=references)

    def write(self, folder: Path, parameters: Parameters, vae: Flux2Autoencoder) -> None:
        export.write_model(folder, self.size, parameters, vae)

    def read(self, folder: Path) -> tuple[Parameters, Flux2Autoencoder]:
        with tempfile.TemporaryDirectory() as words:
            export.write_words(Path(words))
            return export.read_model(folder, Path(words))
