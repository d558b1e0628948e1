"""Few and cheap measurements during training, and a grid of pictures."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from dopsd_jax.miniature import (
    captions,
    families,
    few_steps,
    judge,
    optimizer,
    pool,
    render,
    world,
)
from dopsd_jax.miniature.artist import Artist


class Sampler:
    """Pictures from averaged weights; compiled once for each number of pictures.

    Args:
      guidance: 1 is none; away from the empty prompt, with images from the prompt alone.
    """

    def __init__(
        self, family: families.Family, texts: pool.Texts, encode: Callable, decode: Callable
    ):
        self.family, self.texts, self.encode, self.decode = family, texts, encode, decode
        run = functools.partial(_sample, family.abstract())
        self.run = jax.jit(run, static_argnames="grid")

    def __call__(
        self,
        parameters: optimizer.Parameters,
        prompts: list[str],
        images: np.ndarray | None,
        *,
        grid: tuple[float, ...],
        guidance: float = 1.0,
        seed: int = 0,
    ) -> np.ndarray:
        shape = (len(prompts), *self.family.latent)
        noise = jax.random.normal(jax.random.key(seed), shape)
        return self.decode(self.latents(parameters, prompts, images, noise, grid, guidance))

    def latents(
        self,
        parameters: optimizer.Parameters,
        prompts: Sequence[str],
        images: np.ndarray | None,
        noise: Float[Array, "b h w c"],
        grid: tuple[float, ...],
        guidance: float,
    ) -> Float[Array, "b h w c"]:
        """The same from given noise, not decoded."""
        told = self.family.told(self.texts, prompts, images, self.encode)
        away = [""] * len(prompts) if images is None else prompts
        return self._run(parameters, noise, told, away, guidance, grid)

    def edited(
        self,
        parameters: optimizer.Parameters,
        prompts: Sequence[str],
        images: Sequence[np.ndarray],
        noise: Float[Array, "b h w c"],
        grid: tuple[float, ...],
        guidance: float,
    ) -> Float[Array, "b h w c"]:
        """Edited pictures; see `families.Family.asked_to_edit`."""
        told = self.family.asked_to_edit(self.texts, prompts, images, self.encode)
        return self._run(parameters, noise, told, [""] * len(prompts), guidance, grid)

    def _run(self, parameters, noise, told, away, guidance, grid):
        away = None if guidance == 1 else self.family.told(self.texts, away, None, self.encode)
        return self.run(parameters, noise, told, away, guidance, grid=grid)

    def artist(
        self, parameters: optimizer.Parameters, grid: tuple[float, ...], guidance: float = 1.0
    ) -> Artist:
        """The weights with these noise levels, for `gates.Trial`."""
        end = (grid, guidance)
        draw = functools.partial(self.latents, parameters)
        return Artist(
            self.family.latent,
            lambda prompts, images, noise: draw(prompts, images, noise, *end),
            lambda prompts, noise: np.asarray(draw(prompts, None, noise, (1.0, 0.0), guidance)),
            lambda images: np.float32(self.encode(images)),
            self.decode,
            (lambda *asked: self.edited(parameters, *asked, *end)) if self.family.editor else None,
        )


def _sample(module, parameters, noise, told, away, guidance, *, grid):
    net = optimizer.merge(module, parameters)
    contexts = [net.context(one) for one in (told, away) if one is not None]

    def velocity(x, sigma):
        each = [net.velocity(x, sigma, context) for context in contexts]
        return each[0] if len(each) == 1 else each[1] + guidance * (each[0] - each[1])

    return few_steps.rollout(velocity, noise, grid)


def concept_scenes(rng: np.random.Generator, count: int) -> list[world.Scene]:
    """Unseen concepts under an unseen word, each in two arrangements (2k, 2k + 1)."""
    scenes = []
    for i in range(count):
        concept, word = world.random_concept(rng), captions.NEW_WORDS[i % len(captions.NEW_WORDS)]
        for _ in range(2):
            scenes.append(world.random_scene(rng, (world.random_thing(rng, concept, word),)))
    return scenes


class Probe:
    """Measures weights on a fixed set of captions and concepts.

    `text`: named shape and colour; `copy`: IoU with the image in context; `move`: the same in
    another arrangement than the image's; `blind`: IoU from the text alone. IoU is relative to that
    of the autoencoder's own reconstruction.
    """

    def __init__(self, sampler: Sampler, folder: Path, count: int = 16):
        rng = np.random.default_rng(12345)
        self.sampler, self.folder, self.count = sampler, folder, count
        self.named = [world.random_scene(rng, (world.random_thing(rng),)) for _ in range(2 * count)]
        self.prompts = [sampler.texts.caption(s, rng) for s in self.named]
        scenes = concept_scenes(rng, count)
        self.concepts = [sampler.texts.caption(s, rng, whole=True) for s in scenes]
        self.truth = world.compose(scenes, rng)
        self.images = render.render(self.truth)
        self.reach = judge.iou(sampler.decode(sampler.encode(self.images)), self.truth)

    def __call__(
        self,
        parameters: optimizer.Parameters,
        name: str,
        grid: tuple[float, ...],
        guidance: float = 1.0,
    ) -> dict[str, float]:
        """The scores; a grid of the pictures goes to `folder`/`name`.png."""
        sample = functools.partial(self.sampler, parameters, grid=grid, guidance=guidance)
        text = sample(self.prompts, None)
        seen = judge.see(text)
        things = [s.things[0] for s in self.named]
        even, odd = slice(0, None, 2), slice(1, None, 2)
        copied = sample(self.concepts[even], self.images[even])
        moved = sample(self.concepts[even], self.images[odd])
        blind = sample(self.concepts[even], None)
        truth = self.truth[even]
        relative = lambda images: float((judge.iou(images, truth) / self.reach[even]).mean())
        self._picture(name, text, copied, moved, blind)
        return {
            "shape": _share(seen, things, "shape"),
            "colour": _share(seen, things, "colour"),
            "place": _share(seen, things, "place"),
            "copy": relative(copied),
            "move": relative(moved),
            "blind": relative(blind),
            "crisp_text": float(judge.crispness(text).mean()),
            "crisp_copy": float(
                judge.crispness(copied).mean() / judge.crispness(self.images[even]).mean()
            ),
        }

    def _picture(self, name, text, copied, moved, blind) -> None:
        count = self.count
        rows = [text[:count], text[count:], self.images[::2], copied]
        rows += [self.images[1::2], moved, blind]
        sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)
        Image.fromarray(sheet).save(self.folder / f"{name}.png")


def _share(seen: list[judge.Seen], things: list[world.Thing], name: str) -> float:
    pairs = zip(seen, things, strict=True)
    return float(np.mean([getattr(s, name) == getattr(t, name) for s, t in pairs]))
