"""What a family is: the names that its module `family` has. docs/add-a-family.md shows how."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx

from dopsd_jax.adapters.attach import Slot
from dopsd_jax.common.config_fields import Field
from dopsd_jax.dopsd import Denoiser
from dopsd_jax.families.work import Products, Work
from dopsd_jax.weights.networks import Network

Tree = Any
# What the encoders make of one caption (and its picture): named arrays, without padding.
Features = Mapping[str, np.ndarray]
PaddedLengths = Mapping[str, int]  # the padded length of every feature that has one
STUDENT, TEACHER = range(2)  # the two roles


class Request(NamedTuple):
    """One caption, with its picture or without, as it will be encoded.

    shapes: of the features that come out, by name. group: requests of one group can be encoded
    together. inputs: what the family's encoders are given.
    """

    shapes: dict[str, jax.ShapeDtypeStruct]
    group: Hashable
    inputs: Any


class Size(Protocol):
    """What every transformer's configuration says (besides what `sharding.check` asks).

    patch: latent cells a side that make one token. channels: of the latent. head_dim: of attention.
    """

    patch: int
    channels: int
    head_dim: int

    def to_dict(self) -> dict:
        """The transformer's config.json; a LoRA file of ours carries it."""


class Options(Protocol):
    """A module with these names, which imports no JAX: what a family adds to the configuration.

    CONTEXTS: the values of config.teacher.context besides `prompt` (another caption), and for each
      whether the teacher is shown the row's picture.
    EDITING: those of them that are for rows with references, pictures that are edited; empty where
      the family edits none. Students see the references of their rows in every context, as features
      of their own: the others of a caption are the same without them.
    FIELDS: the family's own. Of a field in the group `teacher`, the last part of its name is what
      `Pipeline.options` calls it, where features depend on it.
    """

    CONTEXTS: Mapping[str, bool]
    EDITING: Sequence[str]
    FIELDS: Sequence[Field]

    def faults(self, given: Mapping[str, Any]) -> list[str]:
        """What does not go together; `given`: all fields by dotted name, each right by itself."""


class Family(Protocol):
    """A module with these names; all of a family that others may use.

    Attributes:
      NAME: as `FAMILIES` lists it.
      NETWORKS: the networks of a model folder by component; `transformer` is the trained one.
      PUBLISHED: configurations of the published transformers, by the end of their hub ids.
      TEXT_ENCODERS: configurations of the text encoders beside them, by the same names.
      SCHEDULER: that of the published models.
      LATENT_FACTOR: pixels a side of one cell of the latent, of the published models.
      DEPLOYED_STEPS: forwards of the released few-step sampler.
      ROWS: by role, the rows of long captions; estimates are made for them.
      CONTEXTS, EDITING: see `Options`.
      LORA_PRESETS: names for sets of adapted layers: patterns of PyTorch paths.
      Pipeline: the class that puts a model folder together.
    """

    NAME: str
    NETWORKS: Mapping[str, Network]
    PUBLISHED: Mapping[str, Size]
    TEXT_ENCODERS: Mapping[str, Any]
    SCHEDULER: Any
    LATENT_FACTOR: int
    DEPLOYED_STEPS: int
    ROWS: tuple[int, int]
    CONTEXTS: Mapping[str, bool]
    EDITING: Sequence[str]
    LORA_PRESETS: Mapping[str, Sequence[str]]
    Pipeline: type

    # ---- The sampler.

    def read_scheduler(self, content: Any, where: str) -> Any:
        """What the grids need of scheduler_config.json: plain JSON. Raises `UserError`."""

    def grid(
        self, name: str | Sequence[float], scheduler: Any, height: int, width: int
    ) -> tuple[float, ...]:
        """The sigma nodes that config.grid names, with the final 0, for a latent [height, width].

        The number of nodes is the same for all sizes. Raises `UserError` naming config.grid.
        """

    def deployed_grid(
        self, steps: int, scheduler: Any, height: int, width: int
    ) -> tuple[float, ...]:
        """The nodes of the released sampler with so many forwards."""

    def shift(self, scheduler: Any, height: int, width: int) -> float:
        """s of sigma' = s sigma / (1 + (s - 1) sigma), which moves noise levels to this size's."""

    # ---- The network.

    def build(
        self, size: Size, *, dtype: Any, attention: str, remat: str, rngs: nnx.Rngs
    ) -> nnx.Module:
        """The transformer, to be filled with weights."""

    def denoiser(self, graphdef: nnx.GraphDef) -> Denoiser:
        """The transformer in the project's convention: sigma in, dx/dsigma out."""

    def largest_latent(self, size: Size) -> tuple[int, int]:
        """The largest latent [height, width] that the transformer takes."""

    # ---- Contexts.

    def collate(self, features: Sequence[Features], rows: PaddedLengths | None = None) -> Tree:
        """The features of a batch as the context that the denoiser takes.

        `rows`: the padded lengths; None: as few as the batch needs.
        """

    def abstract_features(
        self,
        size: Size,
        role: int,
        rows: int,
        dtype: Any,
        height: int,
        width: int,
        references: int = 0,
    ) -> Tree:
        """Shapes and types of one sample's context of `rows` positions, for a latent of this size.

        `references`: how many pictures of the same size are edited. Raises `UserError` for what the
        transformer cannot take.
        """

    def positions(self, context: Tree) -> int:
        """Positions of a padded context that the transformer's work depends on."""

    # ---- Work, in FLOP for one image; `chosen`, `products`: adapters; `full`: all is trained.

    def image_tokens(self, size: Size, height: int, width: int) -> int:
        """Tokens of a latent, with the network's own padding."""

    def context_work(
        self, size: Size, rows: int, chosen: Mapping[str, Slot], products: Products,
        full: bool = False,
    ) -> Work:  # fmt: skip
        """What `Denoiser.precompute` computes for a context of `rows` positions."""

    def velocity_work(
        self,
        size: Size,
        height: int,
        width: int,
        rows: int,
        chosen: Mapping[str, Slot],
        products: Products,
        full: bool = False,
    ) -> Work:
        """What `Denoiser.velocity` computes."""

    # ---- The small model with random weights.

    def write_random_model(self, folder: Any) -> Any:
        """Writes it as the published folder is laid out: config.model = random."""

    def random_size(self) -> Size:
        """Its transformer's configuration."""
