"""Compiles a configuration's step for a TPU that is not here: does it fit, and what does it cost?

    python -m dopsd_jax.aot --config configs/zimage.py[:arg] --topology v5p:2x2x1

Nothing is loaded or allocated. The exit status is 1 if the step does not fit.
"""

import jax
from absl import flags
from ml_collections import config_flags

from dopsd_jax import errors, flops, footprint, settings, slices
from dopsd_jax.trained import trained

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configuration file, with :argument", lock_config=True
)
TOPOLOGY = flags.DEFINE_string(
    "topology", slices.LOCAL, "local, or a TPU slice such as v5p-8 or v5p:2x2x1"
)
FULL_SIZE = flags.DEFINE_bool("full_size", False, "the published network, not config.model's")
HEIGHT = flags.DEFINE_integer("height", 0, "pixels; 0: config.data.resolution")
WIDTH = flags.DEFINE_integer("width", 0, "pixels; 0: config.data.resolution")
STUDENT_ROWS = flags.DEFINE_integer("student_rows", 512, "caption tokens of the student")
TEACHER_ROWS = flags.DEFINE_integer("teacher_rows", 1024, "caption tokens of the teacher")


def main() -> int:
    config = CONFIG.value
    settings.check({**config.to_dict(), "data": {**config.data.to_dict(), "path": "not read"}})
    if TOPOLOGY.value != slices.LOCAL:
        jax.config.update("jax_platforms", "cpu")  # whatever else is here is left alone
    devices = slices.devices(TOPOLOGY.value)
    size, origin = footprint.network_size(config.model, FULL_SIZE.value)
    case = footprint.Case(
        height=HEIGHT.value or config.data.resolution,
        width=WIDTH.value or config.data.resolution,
        rows_student=STUDENT_ROWS.value,
        rows_teacher=TEACHER_ROWS.value,
    )
    memory = flops.memory(size, trained(config, size).chosen, config.lora.rank, base_bytes=1)
    print(
        f"network: {origin}, {memory.base_parameters:,} parameters, adapters "
        f"{memory.adapter_parameters:,}",
        flush=True,
    )
    report = footprint.compile_step(config, size, case, devices)
    print("\n".join(footprint.describe(report, config, case)))
    return 0 if report.fits else 1


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    errors.run(main)
