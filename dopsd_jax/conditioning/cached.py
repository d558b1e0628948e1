"""Features in a cache by content, computed where they are missing."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from dopsd_jax.common.progress import Progress
from dopsd_jax.conditioning.encoding import PRIOR, Encoder, Shapes
from dopsd_jax.data.cache import FeatureCache, feature_key
from dopsd_jax.data.dataset import Dataset
from dopsd_jax.data.prepared import Caption
from dopsd_jax.data.table import WHOLE
from dopsd_jax.data.varied import EMPTY
from dopsd_jax.data.views import view_name
from dopsd_jax.families.base import STUDENT, TEACHER, Family
from dopsd_jax.families.base import Features as Arrays
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods import registry
from dopsd_jax.methods.method import Needs
from dopsd_jax.parallel import multihost

DIGESTS = "digests.json"
ROLE_NAMES = ("student", "teacher")  # in the keys of the cache


def sees_picture(config: ConfigDict, family: Family) -> bool:
    """Whether the teacher is shown the row's picture: only then are its own encoders needed."""
    context = config.teacher.context
    return registry.needs(config).teacher and family.CONTEXTS.get(context, False)


class CachedFeatures:
    """See `features.Store`. `needs`: of the data set."""

    def __init__(
        self, pipe: Pipeline, dataset: Dataset, config: ConfigDict, folder: Path, needs: Needs
    ):
        self.dataset, self.config = dataset, config
        self.cache = FeatureCache(folder)
        self.encoder = Encoder(pipe, dataset, config)
        self.needs = needs
        self.shown = needs.teacher and sees_picture(config, pipe.family)
        memo = Path(folder) / DIGESTS
        seen = ("vae",) * bool(dataset.references)
        self.encoders = [dict.fromkeys((*own, *seen)) for own in pipe.ENCODERS]
        roles = (STUDENT, TEACHER) if self.shown else (STUDENT,)
        names = [name for role in roles for name in self.encoders[role]] + [
            "vae"
        ] * self.needs.target
        digest = lambda name: f"{pipe.part_digest(name, memo)} {config.dtype}"
        self.digests = {name: digest(name) for name in dict.fromkeys(names)}
        self.picture, self.edited = self.encoder.image, self.encoder.edited
        self._missing: dict[str, tuple[Caption, int]] | None = None  # by key; None: not known yet
        self._foreseen: dict[str, Shapes] = {}  # of what is missing, by key

    def wanted(self) -> dict[Caption, list[int]]:
        """The kinds of features that each caption needs; empty ones are the student's alone."""
        kinds = [STUDENT, *[TEACHER] * self.shown, *[PRIOR] * self.needs.prior]
        wanted = {caption: kinds for caption in self.dataset.captions(self.dataset.prompt_keys)}
        key = registry.teacher_key(self.config) if self.needs.teacher else None
        if key is not None and key not in self.dataset.prompt_keys:
            wanted |= {caption: [STUDENT] for caption in self.dataset.captions([key])}
        return wanted | {caption: [STUDENT] for caption in self.dataset.captions([EMPTY])}

    def key(self, caption: Caption, kind: int) -> str:
        """Where the cache has a caption's features."""
        role, row = TEACHER if kind == TEACHER else STUDENT, caption[0]
        seen = [self._shown(row)] if role == TEACHER else []
        if self.dataset.references:
            crop = self.config.data.reference_crop
            own = self.dataset.references[row]
            seen = [*((one.digest, f"{crop} {one.size}") for one in own), *seen]
        return feature_key(
            role=ROLE_NAMES[role],
            prompt=self.encoder.text(caption, kind),
            encoder=" ".join(self.digests[name] for name in self.encoders[role]),
            options=self.encoder.options[role],
            pictures=seen,
        )

    def latent_key(self, row: int) -> str:
        """Where the cache has the latent of a row's picture."""
        digest, pictures = self.digests["vae"], [self._picture(row)]
        return feature_key(role="latent", prompt="", encoder=digest, options={}, pictures=pictures)

    def _shown(self, row: int) -> tuple[str, str]:
        """What the row's teacher is shown; see `Encoder.shown`."""
        others = self.dataset.others
        if not others:
            return self._picture(row)
        return others[row].digest, view_name(self.dataset.buckets[row], WHOLE)

    def _picture(self, row: int) -> tuple[str, str]:
        name = view_name(self.dataset.buckets[row], self.dataset.rows[row].view)
        return self.dataset.infos[row].digest, name

    def mask_key(self, row: int) -> str:
        """Where the cache has the mask of a row."""
        picture, view = self._picture(row)
        return feature_key(
            role="mask",
            prompt="",
            encoder="",
            options={"cell": self.encoder.pipe.vae_config.factor},
            pictures=[(picture, view), (self.dataset.masks[row], "")],
        )

    def survey(self) -> None:
        """Finds what the cache lacks, and which shapes that will have: no network is needed.

        Raises `UserError` with all over-long captions. What is cached has passed this check before.
        """
        wanted, found = self.wanted(), {}
        for caption, kinds in wanted.items():
            for kind in kinds:  # captions may be equal: the first is encoded
                found.setdefault(self.key(caption, kind), (caption, kind))
        self._missing = {key: found[key] for key in self.cache.missing(found)}
        asked = {caption: wanted[caption] for caption, _ in self._missing.values()}
        shapes = self.encoder.shapes(asked)
        self._foreseen = {key: shapes[own] for key, own in self._missing.items()}

    def compute(self) -> None:
        """Computes what the cache lacks. Raises `UserError` before; see `survey`."""
        if self._missing is None:
            self.survey()
        keys = {own: key for key, own in self._missing.items()}
        todo: dict[Caption, list[int]] = {}
        for caption, kind in keys:
            todo.setdefault(caption, []).append(kind)
        quiet = not multihost.is_first()
        progress = Progress("encoding captions and images", len(keys), quiet=quiet)
        for caption, kind, features in progress.over(self.encoder.encode(todo)):
            self.cache.put(keys[caption, kind], features)
        self._missing, self._foreseen = None, {}
        if self.needs.target:
            rows = {self.latent_key(row): row for row in range(len(self.dataset.rows))}
            lacking = self.cache.missing(rows)
            progress = Progress("encoding pictures to latents", len(lacking), quiet=quiet)
            for key in progress.over(lacking):
                self.cache.put(key, {"latent": self.encoder.latent(rows[key])})
        rows = {self.mask_key(row): row for row in self.dataset.masked()}
        lacking = [rows[key] for key in self.cache.missing(rows)]
        for row, mask in self.encoder.masks(lacking):
            self.cache.put(self.mask_key(row), {"mask": mask})

    def shapes(self, kind: int, keys: Sequence[str]) -> Iterable[Mapping[str, tuple[int, ...]]]:
        """See `Store`; from `survey` on also of what is still missing."""
        for key in {self.key(caption, kind) for caption in self.dataset.captions(keys)}:
            if key in self._foreseen:
                yield {name: like.shape for name, like in self._foreseen[key].items()}
            else:
                yield self.cache.shapes(key)

    def outline(self, caption: Caption, kind: int) -> Arrays:
        """Arrays like the features of a caption: zeros where `survey` found none."""
        like = self._foreseen.get(self.key(caption, kind))
        if like is None:
            return self.load(caption, (kind,))[0]
        return {name: np.zeros(own.shape, own.dtype) for name, own in like.items()}

    def load(self, caption: Caption, kinds: Sequence[int]) -> tuple[Arrays, ...]:
        """See `Store`."""
        return tuple(self.cache.load(self.key(caption, kind)) for kind in kinds)

    def latent(self, row: int) -> Float[np.ndarray, "h w c"]:
        """See `Store`."""
        return self.cache.load(self.latent_key(row))["latent"]

    def mask(self, row: int) -> UInt8[np.ndarray, "h w"]:
        """See `Store`."""
        return self.cache.load(self.mask_key(row))["mask"]
