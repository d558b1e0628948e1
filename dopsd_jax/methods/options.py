"""Fields of the configuration that several methods share. Imports no JAX."""

from dopsd_jax.common.config_fields import NEVER, POSITIVE, Field

OTHER_CAPTION = "prompt"  # the teacher.context of every family: no picture
OTHER_PICTURE = "other"  # the teacher.context that shows another picture of the row's concept
ROUNDED = "fp8"  # the teacher.products that are rounded
DECOUPLED = "decoupled"  # the loss that is no mean square; see `distance`
SPLIT = {"loss": (DECOUPLED,)}
AVERAGE = {"teacher.weights": ("ema",)}

# fmt: off
TEACHER = (
    Field("teacher.weights", "ema",
          "teacher's weights: ema (average of the student's), frozen (initial), live (student's)",
          choices=("ema", "frozen", "live"), change=NEVER),
    Field("teacher.decay", 0.9999, "decay of the moving average per step", low=0, high=1,
          when=AVERAGE),
    Field("teacher.warmup_steps", 0, "first steps, which use teacher.warmup_decay", low=0,
          high=10**9, unit="steps", when=AVERAGE),
    Field("teacher.warmup_decay", 0.999, "decay per step in these steps", low=0, high=1,
          when={"teacher.warmup_steps": POSITIVE}),
    Field("teacher.context", "vlm",
          "what the teacher sees that the student does not: the picture (vlm: of Z-Image; "
          "edit_ref, gt_ref: of FLUX.2-klein), another one of its concept (other), or another "
          "caption (prompt)"),
    Field("teacher.vision_dropout", 0.0,
          "share of the picture's tokens that the teacher is not shown; they are drawn anew for "
          "every picture and step", low=0, high=0.99),
    Field("teacher.products", "dtype",
          "type that the large products of the teacher's forward pass multiply: dtype (that of "
          "config.dtype) or fp8 (both operands rounded to 8 bits, for GPUs that multiply these "
          "faster; docs/running.md)", choices=("dtype", ROUNDED)),
    Field("teacher.prompt_key", "", "key of the teacher's captions, such as detailed_en",
          when={"teacher.context": (OTHER_CAPTION,)}),
)
NODES = (
    Field("loss", "x0",
          "weight of a node: x0 (sigma squared), velocity (1), step (squared length), a list; or "
          "decoupled: 1, with magnitude and direction of the velocities apart",
          "name or list"),
    Field("loss_steps", "all", "nodes that have a loss: all, random:m, or a list", "name or list"),
)
DISTANCE = (
    Field("decoupled.magnitude", 1.0,
          "weight of the difference of the velocities' norms; that of their directions has 1",
          low=0, high=10, when=SPLIT),
    Field("decoupled.mean", 1.0,
          "weight of the mean of each channel, the palette, in the magnitude and the direction",
          low=0, high=10, when=SPLIT),
)
TOLD = (
    Field("teacher.told", "all",
          "nodes at which the teacher has its context: all, or a list (0 is the noisiest); at the "
          "others the network before training is asked, in the student's context (or the teacher, "
          "if anchors have anchor.teacher = teacher)", "name or list",
          change=NEVER),
)
LEVELS = (
    Field("sft.sigma", "logit_normal", "distribution of noise levels; nodes: those of config.grid",
          choices=("logit_normal", "uniform", "shifted", "nodes")),
    Field("sft.samples", 4,
          "noise levels per picture and step", low=1,
          high=4096),
)
# fmt: on
