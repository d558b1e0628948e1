"""TPU slices by name, and devices to compile for that need not be here.

A slice is named by its chips, `v5p:2x2x1`, or as Google's tools name it, `v5p-8`. The number there
counts chips for v5e and v6e and TensorCores, two a chip, for v5p and 7x: v5p-8 has four chips, and
tpu7x-8 too. To JAX a 7x chip is two devices, with half of its memory each; any other chip is one.
"""

import importlib.util
import math
import os

import jax
from jax.experimental import topologies

from dopsd_jax.common.errors import UserError

LOCAL = "local"
_SQUARES = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_CUBES = {
    **{8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"},
    **{512: "4x8x8", 1024: "8x8x8"},
}  # fmt: skip
# Generation in a product's name -> the compiler's name of it, and the chips of each size. 7x
# is sold by its chips (docs.cloud.google.com/tpu/docs/tpu7x); xpk and MaxText give it such names.
PRODUCTS = {
    "v5e": ("v5e", _SQUARES),
    "v5litepod": ("v5e", _SQUARES),
    "v5p": ("v5p", _CUBES),
    "v6e": ("v6e", _SQUARES),
    "tpu7x": ("tpu7x", {2: "1x1x1", **_CUBES}),
}


def chips(name: str) -> str:
    """The slice `name` as generation and chips, such as `v5p:2x2x1`.

    Raises `UserError` for a product that is not sold. A name that is no product's stays as it is.
    """
    kind, dash, size = name.partition("-")
    if kind not in PRODUCTS or not dash:
        return name
    generation, shapes = PRODUCTS[kind]
    if not size.isdigit() or int(size) not in shapes:
        counted = "TensorCores, two a chip" if kind in ("v5p", "tpu7x") else "chips"
        raise UserError(
            f"--topology: {name}: there is no such slice; the number counts {counted}, and there "
            f"are {kind}-{', '.join(map(str, shapes))}; or give chips, such as "
            f"{generation}:{shapes[8]}"
        )
    return f"{generation}:{shapes[int(size)]}"


def devices(name: str) -> list[jax.Device]:
    """Devices to compile for: of this machine (`local`) or of a TPU slice; see the module.

    Raises `UserError` if the TPU compiler is not installed or does not know the slice.
    """
    if name == LOCAL:
        return jax.devices()
    layout = chips(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology: {name} needs the TPU compiler, libtpu, which this Python does not have; "
            "pip install 'jax[tpu]', or give --topology=local"
        )
    # Read when libtpu is loaded: it then neither asks the cloud which machine this is, nor warns.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    # One process at a time may hold a TPU; any number may compile.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    sides = layout.partition(":")[2].split("x")
    one = all(side.isdigit() for side in sides) and math.prod(map(int, sides)) == 1
    options = {"chips_per_host_bounds": (1, 1, 1)} if one else {}  # else four chips a host
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=layout, **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(
            f"--topology: {name}: {str(error).partition(chr(10))[0]}; give local, a product such "
            "as v5p-8, v5e-4, v6e-8 or tpu7x-8, or chips such as v5p:2x2x1, v6e:2x4 or tpu7x:2x2x1"
        ) from None
    return list(found.devices)
