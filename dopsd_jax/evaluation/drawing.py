"""Pictures of cases: many at once, by the deployed sampler, from the same noise for every model."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.conditioning.cached import ROLE_NAMES
from dopsd_jax.conditioning.padding import longest, padded_rows, shapes_of
from dopsd_jax.data.cache import feature_key
from dopsd_jax.evaluation.scorer import Case, Picture, digest
from dopsd_jax.evaluation.seeds import picture_seed
from dopsd_jax.families.base import STUDENT, TEACHER, PaddedLengths, Request
from dopsd_jax.families.drawing import decoded, filled
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.families.sampling import finite, start_noise
from dopsd_jax.methods.options import OTHER_CAPTION
from dopsd_jax.parallel import multihost
from dopsd_jax.parallel.sharding import sample_devices


class Shot(NamedTuple):
    """Picture `number`, from 0, of a case."""

    case: Case
    number: int

    @property
    def seed(self) -> int:
        return picture_seed(self.case.seed, self.number)


class Asked(NamedTuple):
    """What a model gets for a case; role: whose context it is encoded as."""

    role: int
    prompt: str
    pictures: Sequence[Picture]


class Kept(Protocol):
    """Where features are kept: `data.cache.FeatureCache`, or `Memory`."""

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None: ...

    def load(self, key: str) -> dict[str, np.ndarray]: ...

    def missing(self, keys: Sequence[str]) -> list[str]: ...

    def shapes(self, key: str) -> dict[str, tuple[int, ...]] | None: ...


class Memory(dict):
    """Features that nobody asks for tomorrow."""

    put, load = dict.__setitem__, dict.__getitem__

    def missing(self, keys: Sequence[str]) -> list[str]:
        return [key for key in dict.fromkeys(keys) if key not in self]

    def shapes(self, key: str) -> dict[str, tuple[int, ...]]:
        return shapes_of(self[key])


class Painter:
    """Draws cases, as the student (from the prompt) or as the teacher (shown the target as well).

    Args:
      teacher: config.teacher: what the teacher sees of the picture.
      batch: pictures drawn together, at least one on each device that `pipe.mesh` spreads
        samples over. Every shape is compiled once.
      kept, encoder: where features are kept, and the digest of the encoders they are of.
    """

    def __init__(
        self,
        pipe: Pipeline,
        teacher: Mapping[str, Any],
        batch: int,
        kept: Kept | None = None,
        encoder: str = "",
    ):
        self.pipe = pipe
        self.options = [pipe.options(role, teacher) for role in (STUDENT, TEACHER)]
        self.told = teacher.get("context") == OTHER_CAPTION
        devices = sample_devices(pipe.mesh)
        self.batch = -(-batch // devices) * devices
        self.kept, self.encoder = Memory() if kept is None else kept, encoder
        self.rows: list[PaddedLengths] = [{}, {}]

    def asked(self, case: Case, role: int) -> Asked | None:
        """What the student or the teacher gets for a case; None: there is nothing to teach."""
        if role == STUDENT:
            return Asked(STUDENT, case.prompt, case.references)
        if self.told:
            return Asked(STUDENT, case.told, case.references) if case.told else None
        shown = case.target if case.shown is None else case.shown
        return None if shown is None else Asked(TEACHER, case.prompt, [*case.references, shown])

    def key(self, case: Case, role: int) -> str:
        """Where the features of a case are kept."""
        asked = self.asked(case, role)
        return feature_key(
            role=ROLE_NAMES[asked.role],
            prompt=asked.prompt,
            encoder=self.encoder,
            options=self.options[asked.role],
            pictures=[(digest(picture), "as it is") for picture in asked.pictures],
        )

    def _request(self, asked: Asked, role: int) -> Request:
        """Raises `UserError` for what the model cannot take."""
        return self.pipe.request(
            asked.role,
            asked.prompt,
            sizes=[picture.shape[:2] for picture in asked.pictures],
            options=self.options[asked.role],
            limits_of=role,
            where=f"the picture shown with {asked.prompt[:60]!r}",
        )

    def grid(self, case: Case) -> tuple[float, ...]:
        """The noise levels at which a case is drawn."""
        return self.pipe.deployed_grid(self.pipe.latent_shape(case.height, case.width))

    def check(self, cases: Sequence[Case]) -> None:
        """Raises `UserError` with every prompt and every size that the model cannot take."""
        faults = []
        for case in cases:
            try:
                self.pipe.latent_shape(case.height, case.width)
                for role in (STUDENT, TEACHER):
                    if asked := self.asked(case, role):
                        self._request(asked, role)
            except UserError as error:
                faults += error.problems
        raise_if(dict.fromkeys(faults))

    def encode(self, cases: Sequence[Case], role: int) -> Iterator[int]:
        """Computes the features that are not kept yet; yields how many are still to do."""
        keys = {self.key(case, role): case for case in cases}
        missing = self.kept.missing(list(keys))
        for done, key in enumerate(missing):
            yield len(missing) - done
            asked = self.asked(keys[key], role)
            own = [self._request(asked, role)], [asked.pictures], self.options[asked.role]
            (made,) = self.pipe.encode(asked.role, *own)
            self.kept.put(key, made)
        # One length for all, so that contexts have one shape.
        rows = padded_rows(map(self.kept.shapes, keys), self.pipe, role)
        self.rows[role] = longest(self.rows[role], rows)

    def draw(
        self, trained: nnx.State, shots: Sequence[Shot], role: int
    ) -> Iterator[tuple[Shot, Picture]]:
        """The pictures, batch by batch; `encode` has been run for their cases."""
        by_size: dict[tuple, list[Shot]] = {}
        for shot in shots:
            references = tuple(
                self.pipe.reference_size(*r.shape[:2], "") for r in shot.case.references
            )
            by_size.setdefault((shot.case.height, shot.case.width, references), []).append(shot)
        for (height, width, _), own in by_size.items():
            shape = self.pipe.latent_shape(height, width)
            for some, count in filled(own, self.batch):
                latents = self._latents(trained, some, role, shape)[:count]
                drawn = decoded(self.pipe, latents, self.batch)
                yield from zip(some[:count], drawn, strict=True)

    def _latents(self, trained, shots: Sequence[Shot], role: int, shape) -> np.ndarray:
        features = [self.kept.load(self.key(s.case, role)) for s in shots]
        context = self.pipe.family.collate(features, self.rows[role])
        grid = self.pipe.deployed_grid(shape)
        noise = _noise(np.array([shot.seed for shot in shots], np.uint32), shape)
        return finite(multihost.to_host(self.pipe.sample(trained, noise, context, grid)))


@functools.partial(jax.jit, static_argnames="shape")
def _noise(seeds, shape):
    return jax.vmap(lambda seed: start_noise(seed, 1, shape)[0])(seeds)


def without_adapters(trained: nnx.State) -> nnx.State:
    """Adapters without effect: the base model in the graph of an adapted one."""
    return jax.tree.map(jnp.zeros_like, trained)
