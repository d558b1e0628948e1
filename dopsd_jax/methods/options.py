"""Fields of the configuration that several methods share. Imports no JAX."""

from dopsd_jax.common.config_fields import NEVER, Field

OTHER_CAPTION = "prompt"  # the teacher.context of every family: no picture

# fmt: off
TEACHER = (
    Field("teacher.weights", "ema",
          "the teacher's weights: a moving average of the student's, its start, or its own",
          choices=("ema", "frozen", "live"), change=NEVER),
    Field("teacher.decay", 0.9999, "of the average, in a step; kept in float32", low=0, high=1),
    Field("teacher.warmup_steps", 0, "first steps, in which warmup_decay is used", low=0,
          high=10**9, unit="steps"),
    Field("teacher.warmup_decay", 0.999, "decay in these steps", low=0, high=1),
    Field("teacher.context", "vlm",
          "what the teacher is told: the picture, as the model's family can show it, or another "
          "caption (prompt)"),
    Field("teacher.prompt_key", "", "the key of the captions that it is told",
          when={"teacher.context": (OTHER_CAPTION,)}),
)
NODES = (
    Field("loss", "x0",
          "weight of a node: x0 (sigma squared), velocity (1), step (squared length), or a list",
          "name or list"),
    Field("loss_steps", "all", "nodes that are learned: all, random:m, or a list", "name or list"),
)
LEVELS = (
    Field("sft.sigma", "logit_normal", "how noise levels are drawn; nodes: those of the grid",
          choices=("logit_normal", "uniform", "shifted", "nodes")),
    Field("sft.samples", 4,
          "noise levels of a picture and step; K of them: as many gradients as D-OPSD", low=1,
          high=4096),
)
# fmt: on
