"""What `remat=dots` keeps of a layer for its backward pass; all else is computed again from it.

Kept is what a matrix product gave and a backward pass asks for, each once: a `Dense`'s output with
its adapters in it, the small side of a LoRA, attention's output, and of a kernel the sums of its
softmax. Between these are norms, rotations, gates: cheap to repeat.
"""

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

NAME = "kept"
# cuDNN's forward kernel gives its output and its log-sum-exp inside a rule of jax's own, where no
# name can be put on them.
_CUDNN = "dot_product_attention_fwd_wrapper"


def keep(x: Array) -> Array:
    """x, marked as one of what is kept."""
    return checkpoint_name(x, NAME)


POLICY = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(NAME),
    lambda primitive, *_, **__: primitive.name == _CUDNN,
)
