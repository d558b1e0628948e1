"""Texts through Qwen3, the text encoder of several families: on one device or on many."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dopsd_jax.common.errors import UserError
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.models import qwen3
from dopsd_jax.models.names import Leaf
from dopsd_jax.parallel.sharding import BATCH_AXES
from dopsd_jax.weights.layouts import Layout, canonical, renamed
from dopsd_jax.weights.load import load_component
from dopsd_jax.weights.networks import TRANSFORMERS_BASE, Network
from dopsd_jax.weights.tokenizers import read_tokenizer


def _layouts(config: qwen3.Qwen3Config, leaves: Sequence[Leaf]) -> list[Layout]:
    # Qwen3Model saves without the `model.` that Qwen3ForCausalLM puts in front.
    return [renamed("bare", canonical(leaves), {"model.": ""})]


TEXT_ENCODER = Network(
    "text_encoder",
    TRANSFORMERS_BASE,
    qwen3.Qwen3Config.from_dict,
    lambda config, rngs: qwen3.Qwen3(config, rngs=rngs),
    qwen3.names,
    qwen3.unused,
    _layouts,
)

QWEN3_4B = qwen3.Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=1e6,
    tied=True,
)
QWEN3_8B = dataclasses.replace(QWEN3_4B, hidden_size=4096, intermediate_size=12288, tied=False)


class TextPipeline(Pipeline):
    """A pipeline whose text encoder is Qwen3."""

    @functools.cached_property
    def tokenizer(self) -> Any:
        return read_tokenizer(self.folder, self.part_config("text_encoder").vocab_size)

    @functools.cached_property
    def text_encoder(self) -> qwen3.Qwen3:
        return load_component(
            self.part_folder("text_encoder"),
            self.family.NETWORKS["text_encoder"],
            sharding_for=self.encoder_place(),
            build=lambda cfg, rngs: qwen3.Qwen3(cfg, attention=self.attention, rngs=rngs),
        )


def user_turn(prompt: str) -> str:
    """The prompt in Qwen3's chat template: one user turn, and the start of the answer.

    Raises `UserError` for one that is no text: half a character, as a terminal of another encoding
    or a client of `serve` may send it.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt[:57]!a} is no UTF-8 text; write it again") from None
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


@functools.partial(jax.jit, static_argnames=("hidden", "dtype", "mesh"))
def hidden_states(
    encoder: qwen3.Qwen3,
    ids: Int[Array, "b n"],
    lengths: Int[Array, " b"],
    hidden: tuple[int, ...],
    dtype: Any,
    mesh: Mesh | None,
) -> Float[Array, "b n c"]:
    """The chosen hidden states of texts, joined along the channels; see `Qwen3.__call__`.

    `mesh`: the encoder is whole on each of its devices, and each takes an equal share of the texts.
    """

    def run(encoder, ids, lengths):
        return jnp.concatenate(encoder(ids, lengths, hidden=hidden, dtype=dtype), axis=-1)

    return spread(run, mesh, encoder)(ids, lengths)


def spread(run: Callable, mesh: Mesh | None, weights: Any) -> Callable:
    """`run(weights, *batch)` on every device of `mesh` with its own samples."""
    if mesh is None:
        return functools.partial(run, weights)
    samples = PartitionSpec(BATCH_AXES)
    return lambda *batch: jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(PartitionSpec(), *(samples for _ in batch)),
        out_specs=samples,
        check_vma=False,  # attention kernels do not say how their results vary
    )(weights, *batch)
